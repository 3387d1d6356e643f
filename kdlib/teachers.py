"""What a trained teacher says about sentences, computed once.

A CRF teacher's emissions and its CRF's parameters determine every target the losses ask for, k-best paths and marginals at any
temperature alike, so the emissions are what is kept, under a digest of the weights and of the sentences. The k best paths cost more
than the marginals, and every epoch needs them again: what they count to is kept too.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kdlib import cache
from kdlib.batches import Encoded, in_turn
from kdlib.data import Sentence
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
