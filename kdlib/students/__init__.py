"""Small models, each declared once: how it is made from the pretrained encoder, and what it serves.

A student starts from the pretrained encoder, never from the fine-tuned teacher, for every method
alike; one experiment tries what the other start is worth ('taught').
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from kdlib.losses import layer_map
from kdlib.methods import LAYERS, LIVE, PATHS, SEQUENCES, WIDE, WORDS
from kdlib.models import BiLstm, Transformer
from kdlib.students import encoders, vocabulary
from kdlib.students.layers import stack
from kdlib.students.pretrained import Backbone
from kdlib.twin_tower import TwinTower

Pca = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Student:
    """rate: peak rate of its encoder. keeps: whether a study keeps its weights, as it is small."""

    rate: float
    keeps = False
    serves = frozenset({WORDS, SEQUENCES, PATHS, LIVE})


@dataclass(frozen=True)
class Cut(Student):
    """The encoder with `layers` of its own layers, evenly spread with the last among them; 0: half
    of them."""

    rate: float = 3e-4
    layers: int = 0
    serves = Student.serves | {LAYERS, WIDE}

    def encoder(self, backbone: Backbone, pca: Pca) -> nn.Module:
        """The encoder of an untrained student."""
        total = len(stack(backbone.encoder.model))
        return encoders.take_layers(backbone.encoder, _spread(self.layers or total // 2, total))


@dataclass(frozen=True)
class Thin(Student):
    """Narrower too: its width, feed-forward units, and the width of a factorised table (0: as wide
    as the rest); `pieces`: the 'whole' table or the 'seen' word pieces alone."""

    rate: float = 2e-3
    layers: int = 3
    width: int = 156
    feed_forward: int = 600
    embedding: int = 72
    pieces: str = "whole"
    keeps = True
    serves = Student.serves | {LAYERS}

    def __post_init__(self) -> None:
        if self.pieces not in ("seen", "whole"):
            raise ValueError(f"pieces: expected 'seen' or 'whole', got {self.pieces!r}")

    def read(
        self, backbone: Backbone, texts: Sequence[Sequence[str]]
    ) -> tuple[PreTrainedTokenizerBase, list[int] | None]:
        """Its tokenizer, and the old numbers of the pieces kept (None: all)."""
        if self.pieces == "whole":
            return backbone.tokenizer, None
        return vocabulary.prune(backbone.tokenizer, texts)

    def mapped(self, encoder: Transformer) -> dict[int, int]:
        """Its layers, and those of the encoder they learn from."""
        return layer_map(self.layers, len(stack(encoder.model)))

    def encoder(self, backbone: Backbone, kept: list[int] | None) -> Transformer:
        """The encoder of an untrained student, at random."""
        self.mapped(backbone.encoder)
        sizes = self.layers, self.width, self.feed_forward, self.embedding
        return encoders.thin(backbone.encoder, *sizes, kept)


@dataclass(frozen=True)
class Lstm(Student):
    """A BiLSTM that begins with the encoder's embeddings, reduced by PCA; `shapes`: it sees the
    case of letters, which an uncased encoder drops.
    """

    rate: float = 3e-3
    embedding: int = 128
    hidden: int = 200
    layers: int = 1
    shapes: bool = False

    def encoder(self, backbone: Backbone, pca: Pca) -> BiLstm:
        """The encoder of an untrained student; over characters 64 wide and random."""
        if isinstance(backbone.encoder, BiLstm):
            return encoders.lstm(backbone.encoder, 64, 64)
        sizes = self.embedding, self.hidden, self.layers, self.shapes
        return encoders.lstm(backbone.encoder, *sizes, pca)


@dataclass(frozen=True)
class Twin(Student):
    """A twin tower for any labels."""

    rate: float = 1e-2
    embedding: int = 128
    keeps = True
    serves = frozenset({WORDS})

    def model(self, backbone: Backbone, pca: Pca) -> TwinTower:
        """An untrained twin tower whose word pieces begin as the encoder's, reduced by PCA."""
        width = min(self.embedding, backbone.encoder.width)
        student = TwinTower(backbone.tokenizer, embedding=width)
        rows = pca(backbone.encoder.model.get_input_embeddings().weight.detach(), width)
        student.embedding.weight.data[: len(rows)] = rows
        return student


def _spread(kept: int, total: int) -> list[int]:
    if not 0 < kept <= total:
        raise ValueError(f"layers: expected 1 to the encoder's {total}, got {kept}")
    return [(m + 1) * total // kept - 1 for m in range(kept)]


STUDENTS: dict[str, Student] = {
    "transformer": Cut(),
    "transformer, 4": Cut(layers=4),
    "transformer, 2": Cut(layers=2),
    "transformer, 1": Cut(layers=1),
    "thin": Thin(),
    "bilstm": Lstm(),
    "narrow bilstm": Lstm(embedding=64, hidden=100),
    "deep bilstm": Lstm(rate=5e-3, layers=2, shapes=True),
    "twin tower": Twin(),
}
