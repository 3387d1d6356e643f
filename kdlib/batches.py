"""From words to tensors: word pieces, batches of like length, padding.

Everything a model is asked about is a word: the vector of a word is that of its first word piece. A
sentence of more pieces than the encoder takes is read in several windows, cut between words, and
put together again before the CRF sees it: no word is lost.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from kdlib.losses import Surrogates
from kdlib.text.pieces import in_windows, shape, special_pieces, word_pieces
from kdlib.text.tags import Sentence


class Layers(NamedTuple):
    """scores[m] [N, H, P, P]: Q K^T / sqrt(d) of layer m = 1 to M, padding not masked; hidden[m]
    [N, P, D]: its output, m = 0 its input."""

    scores: dict[int, Tensor]
    hidden: dict[int, Tensor]

    def to(self, device: torch.device | str) -> "Layers":
        """The same on another device."""
        return Layers(*({m: x.to(device) for m, x in part.items()} for part in self))


@dataclass
class Batch:
    """B sentences: word pieces in N >= B windows, and for every word where its first piece lies.

    pieces, piece_mask [N, P]; first [B, L], an index into the N * P pieces; mask [B, L]; tags [B,
    L] (0 on padding and where unlabelled); labelled [B]; teacher [B, L, K] emissions, where a
    teacher was asked; surrogates, its k best paths, and layers, what its layers hold on the N
    windows, likewise; shapes [N, P], the letter case of the pieces' words, for a model that reads
    it.
    """

    pieces: Tensor
    piece_mask: Tensor
    first: Tensor
    mask: Tensor
    tags: Tensor
    labelled: Tensor
    teacher: Tensor | None = None
    surrogates: Surrogates | None = None
    shapes: Tensor | None = None
    layers: Layers | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if v is not None})


class Collates(Protocol):
    """Anything held for each sentence that can be had as one padded batch."""

    def collate(self, rows: Sequence[int]) -> Any:
        """The given sentences as a batch, which has `.to(device)`."""


class Rows(Collates, Protocol):
    """What training needs of sentences as numbers: any of them as a batch, and how many words each
    has."""

    @property
    def lengths(self) -> list[int]:
        """Words of each sentence."""


@dataclass
class Encoded:
    """Sentences as numbers, padded only when batched: one list entry a sentence."""

    windows: list[list[list[int]]]  # piece numbers, special pieces included
    firsts: list[list[tuple[int, int]]]  # per word: window, position in it
    tags: list[list[int] | None]
    pad: int
    labels: list[str]
    teacher: list[Tensor] | None = None
    surrogates: list[Surrogates] | None = None
    shapes: list[list[list[int]]] | None = None  # as windows: of each piece its word's
    layers: Collates | None = None  # what a teacher's layers hold on the windows

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def lengths(self) -> list[int]:
        """Words of each sentence."""
        return [len(first) for first in self.firsts]

    def content(self) -> list:
        """All that a batch is made of, for a digest; layers by their own `key`."""
        made_of = [getattr(self, f.name) for f in fields(self) if f.name != "layers"]
        return [*made_of, self.layers and self.layers.key]

    def collate(self, rows: Sequence[int]) -> Batch:
        """The given sentences as one padded batch."""
        windows = [w for r in rows for w in self.windows[r]]
        width, length = max(map(len, windows)), max(len(self.firsts[r]) for r in rows)
        pieces = torch.tensor([w + [self.pad] * (width - len(w)) for w in windows])
        sizes = torch.tensor([len(w) for w in windows])
        first, tags = torch.zeros(2, len(rows), length, dtype=torch.long)
        offset = 0
        for i, r in enumerate(rows):
            places = [(offset + w) * width + p for w, p in self.firsts[r]]
            first[i, : len(places)] = torch.tensor(places)
            tags[i, : len(self.tags[r] or ())] = torch.tensor(self.tags[r] or (), dtype=torch.long)
            offset += len(self.windows[r])
        return Batch(
            pieces,
            torch.arange(width) < sizes[:, None],
            first,
            torch.arange(length) < torch.tensor([len(self.firsts[r]) for r in rows])[:, None],
            tags,
            torch.tensor([self.tags[r] is not None for r in rows]),
            self.teacher and pad_sequence([self.teacher[r] for r in rows], batch_first=True),
            self.surrogates and _padded([self.surrogates[r] for r in rows]),
            self.shapes
            and torch.tensor([w + [0] * (width - len(w)) for r in rows for w in self.shapes[r]]),
            self.layers and self.layers.collate(rows),
        )


def _padded(surrogates: Sequence[Surrogates]) -> Surrogates:
    own = zip(*surrogates, strict=True)
    return Surrogates(*(pad_sequence(part, batch_first=True) for part in own))


def encode(
    sentences: Sequence[Sentence],
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    max_pieces: int = 512,
    with_shapes: bool = False,
) -> Encoded:
    """Word pieces and label numbers of every sentence, `with_shapes` each piece's `shape`;
    ValueError for a tag not among `labels`.

    A word the tokenizer finds nothing in (a lone control character) is read as the unknown piece;
    of a single word longer than a whole window only the beginning is read, and the word is still
    predicted.
    """
    number = {label: k for k, label in enumerate(labels)}

    before, after = special_pieces(tokenizer)
    room = max_pieces - len(before) - len(after)
    if room < 1:
        raise ValueError(
            f"max_pieces: expected room for a word beside {len(before) + len(after)} special "
            f"pieces, got {max_pieces}"
        )
    windows, firsts, tags, shapes = [], [], [], []
    pieces_of = word_pieces([s.tokens for s in sentences], tokenizer)
    for sentence, pieces in zip(sentences, pieces_of, strict=True):
        cut, where = in_windows(pieces, room)
        windows.append([before + c + after for c in cut])
        firsts.append([(window, len(before) + place) for window, place in where])
        if with_shapes:
            alike = zip(map(shape, sentence.tokens), map(len, pieces), strict=True)
            shaped, _ = in_windows([[letters] * many for letters, many in alike], room)
            shapes.append([[0] * len(before) + s + [0] * len(after) for s in shaped])
        own = None if sentence.spans is None else sentence.tags
        unknown = sorted(set(own or ()) - number.keys())
        if unknown:
            raise ValueError(f"expected tags among {list(labels)}, got {unknown}")
        tags.append(own and [number[t] for t in own])
    found = Encoded(windows, firsts, tags, tokenizer.pad_token_id, list(labels))
    return replace(found, shapes=shapes) if with_shapes else found


def order(data: Rows, size: int, seed: int) -> list[list[int]]:
    """Rows in batches of `size` sentences: shuffled by `seed`, sentences of like length together,
    batches shuffled again."""
    lengths, generator = data.lengths, torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(lengths), generator=generator).tolist()
    pool = 50 * size
    batches = []
    for i in range(0, len(rows), pool):
        alike = sorted(rows[i : i + pool], key=lengths.__getitem__)
        batches += [alike[j : j + size] for j in range(0, len(alike), size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def in_turn(data: Rows, size: int = 64) -> Iterator[tuple[list[int], Any]]:
    """Every sentence once, long ones first, with its row numbers: for prediction."""
    lengths = data.lengths
    rows = sorted(range(len(lengths)), key=lambda r: -lengths[r])
    for i in range(0, len(rows), size):
        yield rows[i : i + size], data.collate(rows[i : i + size])
