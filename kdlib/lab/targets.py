"""What a teacher says about sentences, computed once and remembered.

A CRF teacher's emissions and its CRF's parameters determine every target the losses ask for, so the
emissions are what is kept, under a digest of the weights and of the sentences. The k best paths
cost more than the marginals, and every epoch needs them again: what they count to is kept too.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from kdlib.batches import Encoded, Layers, in_turn
from kdlib.crf import Chain
from kdlib.lab import cache, scores
from kdlib.losses import Surrogates, surrogate_labels
from kdlib.models import Tagger
from kdlib.students import encoders
from kdlib.students.layers import watched
from kdlib.students.pretrained import load
from kdlib.teachers import gliner
from kdlib.teachers.gliner import Answer, Recipe, Told
from kdlib.teachers.tagger import Taught, words_of
from kdlib.text.corpora import Dataset, Parts, in_words
from kdlib.text.files import replacing
from kdlib.text.tags import Sentence, Span, to_spans
from kdlib.twin_tower import OpenRows

if TYPE_CHECKING:
    from gliner import GLiNER

MOST_SURROGATES = 8e9  # bytes


def pca(table: Tensor, width: int) -> Tensor:
    """`encoders.reduce_by_pca`: eigenvectors differ in the last digit from run to run."""
    key = cache.digest("pca", table, width)
    return cache.tensors("pca", key, lambda: {"rows": encoders.reduce_by_pca(table, width)})["rows"]


def with_teacher(data: Encoded, sentences: Sequence[Sentence], teacher: Taught | Told) -> Encoded:
    """The sentences as a student reads them, `data`, with the teacher's emissions, which reads them
    in its own way. ValueError if both number labels differently, or hold other words."""
    _same_labels(data, teacher)
    said = emissions(teacher, sentences)
    if list(map(len, said)) != data.lengths:
        raise ValueError(
            f"expected the data's own {len(data)} sentences, got {len(said)} of other lengths"
        )
    return replace(data, teacher=said, surrogates=None)


def emissions(teacher: Taught | Told, sentences: Sequence[Sentence]) -> list[Tensor]:
    """The teacher's emissions [L, K]; a GLiNER's follow from answers that are kept already."""
    if isinstance(teacher, Told):
        return teacher.emissions(sentences)
    tagger, asked = teacher.tagger, tuple(s.tokens for s in sentences)
    if asked not in teacher.said:
        own = tagger.encode([s.without_labels() for s in sentences])
        key = cache.digest("emissions", tagger, own.content())
        stored = cache.tensors(
            "emissions", key, lambda: {str(i): e for i, e in enumerate(tagger.emissions(own))}
        )
        teacher.said[asked] = [stored[str(i)] for i in range(len(own))]
    return teacher.said[asked]


def entities(teacher: Taught | Told, sentences: Sequence[Sentence]) -> list[tuple[Span, ...]]:
    """The teacher's one best labels, remembered."""
    if isinstance(teacher, Told):
        return teacher.entities(sentences)
    said = emissions(teacher, sentences)
    key = cache.digest("entities", teacher.labels, teacher.crf, said)
    found = cache.record("entities", key, lambda: {"spans": _best(teacher, said)})
    return [tuple(Span(*span) for span in spans) for spans in found["spans"]]


def _best(teacher: Taught, said: Iterable[Tensor]) -> list[list[Span]]:
    """The entities of the best sequences of these emissions."""
    found = []
    for e in said:
        e = e[None].to(teacher.crf.start.device)
        path = teacher.crf.viterbi(e, torch.ones(e.shape[:2], dtype=torch.bool, device=e.device))
        found.append(to_spans([teacher.labels[k] for k in path[0].tolist()]))
    return found


def with_words(data: OpenRows, sentences: Sequence[Sentence], teacher: Taught | Told) -> OpenRows:
    """A twin tower's sentences with the teacher's distributions over "none" and the labels
    asked."""
    if isinstance(teacher, Told):
        return replace(data, teacher=teacher.words(sentences))
    said = []
    for e, asked in zip(emissions(teacher, sentences), data.asked, strict=True):
        with torch.no_grad():
            q, _ = teacher.crf.marginals(e[None], torch.ones(1, len(e), dtype=torch.bool))
        said.append(words_of(teacher.labels, asked, q[0]))
    return replace(data, teacher=said)


def with_surrogates(
    data: Encoded, teacher: Taught | Told, k: int, weight_temperature: float = 1.0, **asked: float
) -> Encoded:
    """The same sentences with the teacher's `surrogate_labels`, of which `asked` is what else they
    take; ValueError unless `with_teacher` came first, or where they would be too many to hold.

    Their counts of neighbouring labels take K^2 numbers a word, in memory and in the cache.
    """
    if data.teacher is None:
        raise ValueError("expected sentences with their teacher's emissions, got none")
    _same_labels(data, teacher)
    needed = 4 * sum(data.lengths) * len(data.labels) ** 2
    if needed > MOST_SURROGATES:
        raise ValueError(
            f"{len(data.labels)} labels and {sum(data.lengths)} words: expected counts of "
            f"neighbouring labels of at most {MOST_SURROGATES / 1e9:.0f} GB, got "
            f"{needed / 1e9:.0f} GB: take structural or posterior, which store none, or less text"
        )
    asked |= {"k": k, "weight_temperature": weight_temperature}
    key = cache.digest("surrogates", teacher.crf, data.teacher, asked)
    stored = cache.tensors("surrogates", key, lambda: _counted(data, teacher, asked))
    words = data.lengths
    steps = [n - 1 for n in words]
    parts = stored["unary"].split(words), stored["pairwise"].split(steps)
    parts += (stored["allowed"].split(words),)
    return replace(data, surrogates=[Surrogates(*own) for own in zip(*parts, strict=True)])


def with_layers(data: Encoded, sentences: Sequence[Sentence], teacher: Tagger) -> Encoded:
    """The sentences with what the teacher's layers hold on them, read when the first batch is asked
    for. ValueError unless both cut every word into as many pieces: they are compared one by one."""
    own = teacher.encode([s.without_labels() for s in sentences])
    if len(own) != len(data):
        raise ValueError(f"expected the data's own {len(data)} sentences, got {len(own)}")
    cuts = [
        [
            ([len(w) for w in windows], first)
            for windows, first in zip(d.windows, d.firsts, strict=True)
        ]
        for d in (data, own)
    ]
    differ = [i for i, (a, b) in enumerate(zip(*cuts, strict=True)) if a != b]
    if differ:
        raise ValueError(
            "expected student and teacher to read as many word pieces; "
            f"sentences {differ[:5]} are cut differently"
        )
    return replace(data, layers=_Held(teacher, own))


class _Held:
    """What a teacher's layers hold on sentences, in half precision in memory: it would fill a disk
    sooner than it pays."""

    def __init__(self, teacher: Tagger, data: Encoded) -> None:
        self._teacher, self._data = teacher, data
        self.key = cache.digest("layers", teacher, data.windows)

    @cached_property
    def _of(self) -> list[list[tuple[Tensor, Tensor]]]:
        return _windows(self.key, self._teacher, self._data)

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
    if key in _LATEST:
        return _LATEST[key]
    while len(_LATEST) > 2:  # the general stage's text, its held-out end, the fine-tuned teacher's
        del _LATEST[next(iter(_LATEST))]
    held: list[list] = [[] for _ in data.windows]
    for rows, batch in in_turn(data):
        batch = batch.to(next(teacher.parameters()).device)
        with watched(teacher.encoder) as found:
            teacher.eval().encoder(batch.pieces, batch.piece_mask)
        scores, hidden = (
            torch.stack([part[m] for m in sorted(part)], 1).half().cpu() for part in found
        )
        if not bool(hidden.isfinite().all()):
            raise ValueError(
                "expected hidden states that half precision can hold, "
                f"got some beyond it in sentences {rows[:5]} ..."
            )
        sizes = iter(zip(scores, hidden, batch.piece_mask.sum(1).tolist(), strict=True))
        for row in rows:
            own = (next(sizes) for _ in data.windows[row])
            held[row] = [(s[:, :, :n, :n].clone(), h[:, :n].clone()) for s, h, n in own]
    _LATEST[key] = held
    return held


def _same_labels(data: Encoded, teacher: Taught | Told) -> None:
    if data.labels != teacher.labels:
        raise ValueError(f"expected a teacher with the labels {data.labels}, got {teacher.labels}")


def _counted(data: Encoded, teacher: Taught | Told, asked: dict[str, float]) -> dict[str, Tensor]:
    """The surrogate labels of all words in a row, sentence after sentence."""
    of: list[tuple[Tensor, ...]] = [()] * len(data)
    device = teacher.crf.start.device
    for rows, batch in in_turn(data):
        chain, mask = Chain(teacher.crf, batch.teacher.to(device)), batch.mask.to(device)
        found = surrogate_labels(chain, mask, **asked).to("cpu")
        for i, row in enumerate(rows):
            n = data.lengths[row]
            of[row] = found.unary[i, :n], found.pairwise[i, : n - 1], found.allowed[i, :n]
    parts = zip(Surrogates._fields, zip(*of, strict=True), strict=True)
    return {name: torch.cat(own) for name, own in parts}


@torch.no_grad()
def mass_of_k_best(
    teacher: Taught, sentences: Sequence[Sentence], sizes: Sequence[int]
) -> pd.DataFrame:
    """Probability that the teacher's k best sequences hold together: quantiles over sentences, one
    row a k of `sizes`."""
    held = []
    for own in teacher.emissions(sentences):
        own = own[None].to(teacher.crf.start.device)
        whole = torch.ones(own.shape[:2], dtype=torch.bool, device=own.device)
        scores = teacher.crf.k_best(own, whole, max(sizes))[1]
        log_p = scores - teacher.crf.log_partition(own, whole)
        held.append([log_p[0, :k].exp().sum().item() for k in sizes])
    table = pd.DataFrame(held, columns=list(sizes)).quantile([0.1, 0.25, 0.5, 0.75, 0.9]).T
    return table.rename(columns=str).rename_axis("k").reset_index()


def trained_gliner(parts: Parts, recipe: Recipe, encoder: str = "minilm") -> GLiNER:
    """A GLiNER trained on the teaching part's labels, or read back."""
    asked, backbone = [parts.asked(s) for s in parts.teaching], load(encoder)
    pieces = backbone.tokenizer.backend_tokenizer.to_str()
    made_of = [backbone.encoder, pieces, recipe, asked, parts.teaching]
    folder = cache.path("gliner", cache.digest("gliner", *made_of))
    if folder.exists():  # whole: it was renamed to this
        return gliner.load(str(folder))
    with cache.locked(folder):
        if not folder.exists():
            start = time.perf_counter()
            model = gliner.train(parts.teaching, asked, recipe, encoder)
            cache.spent("training teachers", time.perf_counter() - start)
            with replacing(folder) as aside:
                model.save_pretrained(aside, safe_serialization=True)
    return gliner.load(str(folder))


def told(model: GLiNER, parts: Parts, reading: str = "spans") -> Told:
    """What a GLiNER says of all that students read and are tested on, transfer as plain text; no
    sentence is asked twice."""
    once: dict[tuple[str, ...], Sentence] = {}
    for sentence in (*parts.text, *parts.dev, *parts.test):
        once.setdefault(sentence.tokens, sentence)
    sentences = list(once.values())
    found = dict(zip(once, answers(model, sentences, parts), strict=True))
    return Told(found, parts.types, reading, sum(p.numel() for p in model.parameters()))


def answers(model: GLiNER, sentences: Sequence[Sentence], parts: Parts) -> list[Answer]:
    """`gliner.ask` of the types that the parts ask of each sentence, remembered."""
    asked = [parts.asked(s) for s in sentences]
    pieces = model.data_processor.transformer_tokenizer.backend_tokenizer.to_str()
    key = cache.digest("answers", model.model, pieces, [s.tokens for s in sentences], asked)

    def make() -> dict[str, Tensor]:
        stored, start = {}, time.perf_counter()
        said = gliner.ask(model, sentences, asked)
        cache.spent("asking teachers", time.perf_counter() - start)
        for i, answer in enumerate(said):
            place = {label: c for c, label in enumerate(asked[i])}
            spans = [(s.start, s.end, place[s.type]) for s in answer.entities]
            stored[f"{i} entities"] = torch.tensor(spans, dtype=torch.long).reshape(-1, 3)
            for name in ("covering", "inside", "before"):
                if getattr(answer, name) is not None:
                    stored[f"{i} {name}"] = getattr(answer, name).half()
        return stored

    stored = cache.tensors("answers", key, make)
    found = []
    for i, labels in enumerate(asked):
        spans = tuple(Span(a, b, labels[c]) for a, b, c in stored[f"{i} entities"].tolist())
        scores = (stored.get(f"{i} {name}") for name in ("covering", "inside", "before"))
        found.append(Answer(labels, spans, *(s if s is None else s.float() for s in scores)))
    return found


def quality(model: GLiNER, told: Told, parts: Parts, unseen: Dataset | None = None) -> pd.DataFrame:
    """The teacher's own entity scores: on test, and zero-shot on another data set's test sentences
    with types that it was not trained on."""
    own = scores.scores(parts.test, told.entities(parts.test))
    rows = [{"asked for": f"the {len(parts.types)} types of the data"} | own]
    if unseen is not None:
        known = {span.type for s in parts.teaching for span in s.spans}
        sentences, types = unseen_types(unseen, known)
        mentions = [span.type for s in sentences for span in s.spans]
        found = answers(model, sentences, replace(parts, types=types, mentions=mentions))
        zero_shot = scores.scores(sentences, [a.entities for a in found])
        what = f"{len(types)} types of {unseen.name} it was not trained on"
        rows.append({"asked for": what} | zero_shot)
    return pd.DataFrame(rows).round(2)


def unseen_types(
    dataset: Dataset, known: Iterable[str], sentences: int = 300
) -> tuple[list[Sentence], list[str]]:
    """Test sentences of another data set that hold entities of types outside `known`, and these
    types."""
    test = [in_words(s) for s in dataset.test if s.spans is not None]
    types = sorted({span.type for s in test for span in s.spans} - set(known))
    kept = [replace(s, spans=tuple(x for x in s.spans if x.type in types)) for s in test]
    return [s for s in kept if s.spans][:sentences], types
