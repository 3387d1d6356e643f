"""What a trained teacher says about sentences, computed once.

A CRF teacher's emissions and its CRF's parameters determine every target the losses ask for, k-best paths and marginals at any
temperature alike, so the emissions are what is kept, under a digest of the weights and of the sentences.
"""

from dataclasses import replace

from kdlib import cache
from kdlib.batches import Encoded
from kdlib.models import Tagger


def with_teacher(data: Encoded, teacher: Tagger) -> Encoded:
    """The same sentences with the teacher's emissions; ValueError if teacher and data number labels differently.

    `data` is as the student reads it; the teacher reads the same word pieces.
    """
    if data.labels != teacher.labels:
        raise ValueError(f"expected a teacher with the labels {data.labels}, got {teacher.labels}")
    key = cache.digest("emissions", teacher, data.windows, data.firsts)
    stored = cache.tensors("emissions", key, lambda: {str(i): e for i, e in enumerate(teacher.emissions(data))})
    return replace(data, teacher=[stored[str(i)] for i in range(len(data))])
