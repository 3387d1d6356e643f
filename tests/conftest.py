"""What many tests need: a tiny real encoder in a folder, and sentences that a tiny model can
learn."""

import os

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # two test processes on two cores would spin against each other

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, BertTokenizerFast

from kdlib.lab import train
from kdlib.lab.study import Budget, Fitted, Study
from kdlib.models import Tagger, Transformer
from kdlib.students import STUDENTS, Lstm, pretrained
from kdlib.text.corpora import Dataset, shuffled
from kdlib.text.tags import Sentence, Span, iob2_labels

torch.set_num_threads(1)  # tiny models gain nothing from a second one
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test reads what another one, or the user, has cached, or goes on with its random numbers;
    every evaluation leaves a checkpoint."""
    torch.manual_seed(0)
    monkeypatch.setenv("KDLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(train, "KEPT_EVERY", 0)


@pytest.fixture(scope="session")
def quick_cache(tmp_path_factory):
    """The cache that the notebooks share at their quick profile, as in a study."""
    return tmp_path_factory.mktemp("quick") / "cache"


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A small BERT with random weights and a letter-piece tokenizer, saved like any pretrained
    encoder."""
    return _tiny(tmp_path_factory.mktemp("tiny"), 24)


@pytest.fixture(scope="session")
def long_folder(tmp_path_factory):
    """The same with room for 120 pieces, and a tokenizer that says so."""
    return _tiny(tmp_path_factory.mktemp("long"), 120, model_max_length=120)


def _tiny(folder, positions, **tokenizing):
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *LETTERS,
        *("##" + c for c in LETTERS),
        "paris",
        "anna",
        ".",
        "in",
    ]
    tokenizer = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    BertTokenizerFast(tokenizer_object=tokenizer, **tokenizing).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=positions,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tiny(tiny_folder):
    """The tiny encoder, loaded."""
    return pretrained.load(tiny_folder)


def bert(heads=2):
    """A Transformer of one layer, 8 wide, over 9 pieces."""
    config = BertConfig(
        vocab_size=9,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=heads,
        intermediate_size=16,
    )
    return Transformer(BertModel(config, add_pooling_layer=False))


def tagger(backbone, seed=0, encoder=None):
    torch.manual_seed(seed)
    return Tagger(encoder or backbone.encoder, backbone.tokenizer, iob2_labels(["LOC", "PER"]))


SENTENCES = [
    Sentence(("Anna", "lives", "in", "Paris", "."), (Span(0, 1, "PER"), Span(3, 4, "LOC"))),
    Sentence(("paris",), (Span(0, 1, "LOC"),)),
    Sentence(
        ("Anna", "Anna", "is", "in", "a", "big", "old", "paris", "."),
        (Span(0, 2, "PER"), Span(7, 8, "LOC")),
    ),
    Sentence(("nobody", "is", "in"), ()),
] * 4
CORPUS = Dataset("tiny", list(SENTENCES), list(SENTENCES[:8]), list(SENTENCES[:8]))


def tiny_study(folder, labelled=6, transfer=8, **more):
    """A study of the tiny corpus with a BiLSTM no wider than the tiny encoder's table."""
    students = STUDENTS | {"bilstm": Lstm(embedding=8, hidden=6)}
    settings = {"quiz": 2, "students": students, "teacher": Fitted(updates=5, batch=4)} | more
    parts, budget = shuffled(CORPUS, labelled, transfer), Budget(updates=5, batch=4)
    return Study(parts, budget=budget, encoder=folder, **settings)
