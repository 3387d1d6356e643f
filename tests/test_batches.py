import pytest
import torch
from conftest import SENTENCES, tagger

from kdlib import batches
from kdlib.lab import cache
from kdlib.text.pieces import shape
from kdlib.text.tags import Sentence


def encode(tiny, sentences, max_pieces=24):
    return batches.encode(
        sentences, tiny.tokenizer, ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"], max_pieces
    )


def test_each_word_is_read_at_its_first_piece(tiny):
    batch = encode(tiny, SENTENCES[:3]).collate([0, 2])
    pieces = tiny.tokenizer.convert_ids_to_tokens(batch.pieces.flatten()[batch.first[0]].tolist())
    assert pieces[:5] == ["anna", "l", "in", "paris", "."]
    assert batch.mask.sum(1).tolist() == [5, 9] and batch.tags[0].tolist()[:5] == [3, 0, 0, 1, 0]
    assert batch.labelled.tolist() == [True, True]


def test_long_sentences_are_cut_between_words_and_no_word_is_lost(tiny):
    long = Sentence(("anna", "lives", "in", "paris") * 30)
    encoded = encode(tiny, [long, SENTENCES[1]])
    assert len(encoded.windows[0]) > 4 and max(map(len, encoded.windows[0])) <= 24
    batch = encoded.collate([1, 0])
    firsts = tiny.tokenizer.convert_ids_to_tokens(batch.pieces.flatten()[batch.first[1]].tolist())
    assert firsts == ["anna", "l", "in", "paris"] * 30
    assert len(tagger(tiny).predict([long])) == 1
    model = tagger(tiny)
    assert model.emissions(model.encode([long]))[0].shape == (120, 5)


def test_words_without_pieces_and_words_longer_than_a_window(tiny):
    odd = Sentence(("\u200b", "x" * 100, "paris"))
    encoded = encode(tiny, [odd])
    assert len(encoded.firsts[0]) == 3 and max(map(len, encoded.windows[0])) <= 24
    first = [encoded.windows[0][w][p] for w, p in encoded.firsts[0]]
    assert (
        tiny.tokenizer.convert_ids_to_tokens(first) == ["[UNK]", "[UNK]", "paris"]
        or first[0] == tiny.tokenizer.unk_token_id
    )


def test_every_sentence_comes_once_an_epoch_and_the_order_repeats(tiny):
    encoded = encode(tiny, SENTENCES)
    first, again, other = (batches.order(encoded, 3, seed) for seed in (0, 0, 1))
    assert sorted(r for rows in first for r in rows) == list(range(16))
    assert first == again != other


def test_batches_hold_sentences_of_like_length(tiny):
    lengths = torch.randint(1, 40, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    encoded = encode(tiny, [Sentence(("a",) * n) for n in lengths])
    waste = sum(
        max(lengths[r] for r in rows) * len(rows) - sum(lengths[r] for r in rows)
        for rows in batches.order(encoded, 8, 0)
    )
    assert waste < 0.05 * sum(lengths)


def test_windows_without_room_for_a_word_are_refused(tiny):
    with pytest.raises(
        ValueError, match="max_pieces: expected room for a word beside 2 special pieces, got 2"
    ):
        encode(tiny, SENTENCES, max_pieces=2)


def test_the_same_pieces_in_other_words_are_other_content(tiny):
    one, two = (encode(tiny, [Sentence(words)]) for words in (("a.b", "c"), ("a", ".", "b", "c")))
    assert one.windows == two.windows and cache.digest(one.content()) != cache.digest(two.content())


def test_a_tag_that_is_no_label(tiny):
    with pytest.raises(ValueError, match=r"expected tags among .*B-PER"):
        batches.encode(SENTENCES, tiny.tokenizer, ["O", "B-LOC"], 24)


def test_shapes_are_the_words_letter_cases():
    words = ["...", "1999", "rose", "Rose", "USA", "A", "McDonald", "B2B", "Écoles", "北京"]
    assert [shape(word) for word in words] == [1, 1, 2, 3, 4, 5, 6, 7, 3, 2]


def test_every_piece_has_its_words_shape(tiny):
    sentences = [Sentence(("Anna", "in", "PARIS", "IBM")), Sentence(("ok",))]
    data = batches.encode(
        sentences, tiny.tokenizer, ["O"], tiny.encoder.max_pieces, with_shapes=True
    )
    assert [[len(w) for w in own] for own in data.shapes] == [
        [len(w) for w in own] for own in data.windows
    ]
    batch = data.collate([0, 1])
    assert batch.shapes.shape == batch.pieces.shape and not batch.shapes[1, 4:].any()
    assert batch.shapes.flatten()[batch.first[0]].tolist() == [3, 2, 4, 4]
    assert batch.shapes[0, 0] == 0, "special pieces have none"
    plain = batches.encode(sentences, tiny.tokenizer, ["O"], tiny.encoder.max_pieces)
    assert plain.collate([0]).shapes is None and plain.content() != data.content()
