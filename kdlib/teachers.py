"""What a trained teacher says about sentences, computed once.

A CRF teacher's emissions and its CRF's parameters determine every target the losses ask for, k-best paths and marginals at any
temperature alike, so the emissions are what is kept, under a digest of the weights and of the sentences. The k best paths cost more
than the marginals, and every epoch needs them again: what they count to is kept too.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from kdlib import cache
from kdlib.batches import Encoded, in_turn
from kdlib.data import Sentence
from kdlib.layers import Layers, watched
from kdlib.models import Tagger
from kdlib.surrogates import Surrogates, surrogate_labels


def with_teacher(data: Encoded, sentences: Sequence[Sentence], teacher: Tagger) -> Encoded:
    """The sentences as a student reads them, `data`, with their teacher's emissions; the teacher reads them in its own way.

    ValueError if teacher and data number labels differently, or hold other words.
    """
    _same_labels(data, teacher)
    own = teacher.encode([s.without_labels() for s in sentences])
    if own.lengths != data.lengths:
        raise ValueError(f"expected the data's own {len(data)} sentences, got {len(own)} of other lengths")
    key = cache.digest("emissions", teacher, own.windows, own.firsts, *([own.shapes] if own.shapes else []))
    stored = cache.tensors("emissions", key, lambda: {str(i): e for i, e in enumerate(teacher.emissions(own))})
    return replace(data, teacher=[stored[str(i)] for i in range(len(data))], surrogates=None)


def with_surrogates(data: Encoded, teacher: Tagger, k: int, weight_temperature: float = 1.0) -> Encoded:
    """The same sentences with the surrogate labels of the teacher's k best paths; ValueError unless `with_teacher` came first.

    Their counts of neighbouring labels take K^2 numbers a word, in memory and in the cache.
    """
    if data.teacher is None:
        raise ValueError("expected sentences with their teacher's emissions (teachers.with_teacher), got none")
    _same_labels(data, teacher)
    key = cache.digest("surrogates", teacher.crf, data.teacher, k, weight_temperature)
    stored = cache.tensors("surrogates", key, lambda: _counted(data, teacher, k, weight_temperature))
    words = data.lengths
    parts = stored["unary"].split(words), stored["pairwise"].split([n - 1 for n in words]), stored["allowed"].split(words)
    return replace(data, surrogates=[Surrogates(*own) for own in zip(*parts, strict=True)])


def with_layers(data: Encoded, sentences: Sequence[Sentence], teacher: Tagger) -> Encoded:
    """The sentences with what the teacher's layers hold on them, which is read when the first batch is asked for.

    ValueError unless both cut every word into as many pieces: scores and states are compared piece by piece.
    """
    own = teacher.encode([s.without_labels() for s in sentences])
    if len(own) != len(data):
        raise ValueError(f"expected the data's own {len(data)} sentences, got {len(own)}")
    cuts = [[([len(w) for w in windows], first) for windows, first in zip(d.windows, d.firsts, strict=True)] for d in (data, own)]
    differ = [i for i, (a, b) in enumerate(zip(*cuts, strict=True)) if a != b]
    if differ:
        raise ValueError(f"expected student and teacher to read as many word pieces; sentences {differ[:5]} are cut differently")
    return replace(data, layers=_Held(teacher, own))


class _Held:
    """What a teacher's layers hold on sentences, in half precision in memory: it would fill a disk sooner than it pays."""

    def __init__(self, teacher: Tagger, data: Encoded) -> None:
        self._teacher, self._data = teacher, data

    @cached_property
    def _of(self) -> list[list[tuple[Tensor, Tensor]]]:
        return _windows(cache.digest("layers", self._teacher, self._data.windows), self._teacher, self._data)

    def collate(self, rows: Sequence[int]) -> Layers:
        """The layers on the windows of the given sentences, padded with 0."""
        windows = [window for row in rows for window in self._of[row]]
        width = max(hidden.shape[1] for _, hidden in windows)
        gaps = [(scores, hidden, width - hidden.shape[1]) for scores, hidden in windows]
        scores = torch.stack([F.pad(s, (0, gap, 0, gap)) for s, _, gap in gaps], 1)
        hidden = torch.stack([F.pad(h, (0, 0, 0, gap)) for _, h, gap in gaps], 1)
        return Layers(dict(enumerate(scores, 1)), dict(enumerate(hidden)))


_LATEST: dict[str, list] = {}  # a few readings: every method and seed asks for the same again


@torch.no_grad()
def _windows(key: str, teacher: Tagger, data: Encoded) -> list[list[tuple[Tensor, Tensor]]]:
    """Per sentence and window: attention scores [M, H, p, p] and hidden states [M + 1, p, D]."""
    if key not in _LATEST:
        while len(_LATEST) > 2:  # the general stage's text and its held-out end, the fine-tuned teacher's text
            del _LATEST[next(iter(_LATEST))]
        held: list[list] = [[] for _ in data.windows]
        for rows, batch in in_turn(data):
            batch = batch.to(next(teacher.parameters()).device)
            with watched(teacher.encoder) as found:
                teacher.eval().encoder(batch.pieces, batch.piece_mask)
            scores, hidden = (torch.stack([part[m] for m in sorted(part)], 1).half().cpu() for part in found)
            if not bool(hidden.isfinite().all()):
                raise ValueError(
                    f"expected hidden states that half precision can hold, got some beyond it in sentences {rows[:5]} ..."
                )
            sizes = iter(zip(scores, hidden, batch.piece_mask.sum(1).tolist(), strict=True))
            for row in rows:
                own = (next(sizes) for _ in data.windows[row])
                held[row] = [(s[:, :, :n, :n].clone(), h[:, :n].clone()) for s, h, n in own]
        _LATEST[key] = held
    return _LATEST[key]


def _same_labels(data: Encoded, teacher: Tagger) -> None:
    if data.labels != teacher.labels:
        raise ValueError(f"expected a teacher with the labels {data.labels}, got {teacher.labels}")


def _counted(data: Encoded, teacher: Tagger, k: int, weight_temperature: float) -> dict[str, Tensor]:
    """The surrogate labels of all words in a row, sentence after sentence."""
    of: list[tuple[Tensor, ...]] = [()] * len(data)
    device = teacher.crf.start.device
    for rows, batch in in_turn(data):
        emissions, mask = batch.teacher.to(device), batch.mask.to(device)
        found = surrogate_labels(teacher.crf, emissions, mask, k, weight_temperature).to("cpu")
        for i, row in enumerate(rows):
            words = data.lengths[row]
            of[row] = found.unary[i, :words], found.pairwise[i, : words - 1], found.allowed[i, :words]
    return {name: torch.cat(own) for name, own in zip(Surrogates._fields, zip(*of, strict=True), strict=True)}
