import json

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from kdlib.models import Tagger, build
from kdlib.students import encoders, pretrained, vocabulary
from kdlib.text import corpora
from kdlib.text.tags import Sentence, iob2_labels

CORPUS = corpora.load("demo")
TEXT = [s.tokens for s in CORPUS.train[:300]]


@pytest.fixture(scope="module")
def minilm():
    return pretrained.load().tokenizer


def pieces(tokenizer, words):
    told = tokenizer(list(words), is_split_into_words=True)
    return tokenizer.convert_ids_to_tokens(told["input_ids"]), told.word_ids()


def test_the_text_is_cut_as_before(minilm):
    smaller, kept = vocabulary.prune(minilm, TEXT)
    assert len(smaller) == len(kept) < len(minilm) / 4
    for words in TEXT:
        assert pieces(smaller, words) == pieces(minilm, words)
    assert [minilm.convert_ids_to_tokens(old) for old in kept] == smaller.convert_ids_to_tokens(
        list(range(len(kept)))
    )


def test_what_the_text_did_not_have_falls_back_to_shorter_pieces(minilm):
    smaller, _ = vocabulary.prune(minilm, [("anna",)])
    assert smaller.tokenize("anna") == ["anna"]
    assert smaller.tokenize("Zürich") == ["z", "##u", "##r", "##i", "##c", "##h"]
    new = 0
    for sentence in CORPUS.test[:200]:
        old, own = pieces(minilm, sentence.tokens), pieces(smaller, sentence.tokens)
        assert old[0].count("[UNK]") == own[0].count("[UNK]")
        new += len(own[0]) > len(old[0])
    assert new > 100


def test_a_tagger_with_fewer_pieces_is_saved_and_read_back(minilm, tmp_path):
    smaller, kept = vocabulary.prune(minilm, TEXT)
    encoder = encoders.thin(pretrained.load().encoder, 1, 24, 48, pieces=kept)
    tagger = Tagger(encoder, smaller, iob2_labels(["PER"])).eval()
    tagger.save_pretrained(tmp_path / "m")
    sentences = [Sentence(words) for words in TEXT[:5]]
    again = Tagger.from_pretrained(tmp_path / "m")
    assert again.encode(sentences).windows == tagger.encode(sentences).windows
    assert again.predict(sentences) == tagger.predict(sentences)


def test_a_word_longer_than_the_tokenizers_own_limit_is_cut_as_before():
    fresh = (
        pretrained.load().tokenizer
    )  # comes with truncation and padding to 128 pieces switched on
    word = "a-" * 80 + "wonderful-washington"
    smaller, _ = vocabulary.prune(fresh, [(word,)])
    assert smaller.tokenize(word) == fresh.tokenize(word, truncation=False)
    assert "wonderful" in smaller.tokenize(word)


def test_special_pieces_in_odd_places_are_renumbered(tiny_folder):
    told = json.loads(pretrained.load(tiny_folder).tokenizer.backend_tokenizer.to_str())
    vocab = told["model"]["vocab"]
    order = [p for p in vocab if not p.startswith("[")] + [p for p in vocab if p.startswith("[")]
    told["model"]["vocab"] = new = {p: i for i, p in enumerate(order)}
    for added in told["added_tokens"]:
        added["id"] = new[added["content"]]
    own = {"type": "BertProcessing", "sep": ["[SEP]", new["[SEP]"]], "cls": ["[CLS]", new["[CLS]"]]}
    told["post_processor"] = {"type": "Sequence", "processors": [own]}
    special = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
    }
    odd = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(told)), **special)
    smaller, kept = vocabulary.prune(odd, [("anna",)])
    assert (
        pieces(smaller, ["anna"])
        == pieces(odd, ["anna"])
        == (["[CLS]", "anna", "[SEP]"], [None, 0, None])
    )
    config = pretrained.load(tiny_folder).encoder.config() | {"pad_token_id": new["[PAD]"]}
    encoder = encoders.thin(build("transformer", config), 1, 8, 8, pieces=kept)
    assert encoder.model.config.pad_token_id == smaller.pad_token_id


def test_bad_input(minilm):
    with pytest.raises(ValueError, match="got none"):
        vocabulary.prune(minilm, [()])
    byte_pairs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
    with pytest.raises(ValueError, match="expected a WordPiece tokenizer, such as BERT's, got BPE"):
        vocabulary.prune(byte_pairs, TEXT)
