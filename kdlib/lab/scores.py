"""Scores of predicted entities, their uncertainty, and tests between methods. Scores are in
percent.

The headline is seqeval's default, the CoNLL scorer's reading; on legal IOB2, which is all a Tagger
predicts, its strict mode agrees.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from scipy import special
from seqeval.metrics import classification_report
from seqeval.scheme import IOB2
from torch import Tensor

from kdlib.text.tags import Sentence, Span, to_iob2

Entities = Sequence[Sequence[Span]]


def scores(gold: Sequence[Sentence], predicted: Entities, strict: bool = False) -> dict[str, float]:
    """Micro precision, recall and F1 over entities, by seqeval; `strict` asks for its strict IOB2
    mode."""
    return per_type(gold, predicted, strict)["all"]


def per_type(
    gold: Sequence[Sentence], predicted: Entities, strict: bool = False
) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and support for each entity type, and for 'all' of them."""
    _same_length(gold, predicted)
    mode = {"mode": "strict", "scheme": IOB2} if strict else {}
    guess = [to_iob2(spans, len(s.tokens)) for s, spans in zip(gold, predicted, strict=True)]
    report = classification_report(
        [s.tags for s in gold], guess, output_dict=True, zero_division=0, **mode
    )
    report["all"] = report.pop("micro avg")
    return {
        kind: {
            name.removesuffix("-score"): float(v) * (1 if name == "support" else 100)
            for name, v in row.items()
        }
        for kind, row in report.items()
        if kind not in ("macro avg", "weighted avg")
    }


def counts(gold: Entities, predicted: Entities) -> np.ndarray:
    """Per sentence: right, predicted, gold entities [n, 3]; what every F1 below is made of."""
    _same_length(gold, predicted)
    return np.array(
        [
            [len(set(g) & set(p)), len(set(p)), len(set(g))]
            for g, p in zip(gold, predicted, strict=True)
        ]
    )


def f1(counted: np.ndarray) -> np.ndarray:
    """Micro F1 of counts [..., n, 3], in percent; 0 where nothing is predicted and nothing is
    there."""
    right, guessed, there = np.moveaxis(counted.sum(-2), -1, 0)
    return 200 * right / np.maximum(guessed + there, 1)


def word_scores(
    reference: Entities, predicted: Entities, lengths: Sequence[int]
) -> dict[str, float]:
    """Accuracy over all words; precision, recall and F1 over the words of entities, in percent: the
    GLiNER -> LSTM paper's measures.

    An entity's word counts as right when both sides give it the same type. Most words have none, so
    accuracy is high for a model that finds nothing.
    """
    _same_length(reference, predicted)
    there, guessed = (
        np.concatenate([_types_of_words(spans, n) for spans, n in zip(side, lengths, strict=True)])
        for side in (reference, predicted)
    )
    right = ((there == guessed) & (there != "")).sum()
    found, wanted = (guessed != "").sum(), (there != "").sum()
    return {
        "accuracy": 100 * float((there == guessed).mean()),
        "precision": 100 * float(right / max(found, 1)),
        "recall": 100 * float(right / max(wanted, 1)),
        "f1": 200 * float(right / max(found + wanted, 1)),
    }


def _types_of_words(spans: Sequence[Span], length: int) -> np.ndarray:
    """The entity type over each word, '' where there is none."""
    types = np.full(length, "", dtype=object)
    for start, end, kind in spans:
        types[start:end] = kind
    return types


def all_scores(
    sentences: Sequence[Sentence], reference: Entities, predicted: Entities
) -> dict[str, float]:
    """`word_scores`, and precision, recall and F1 over whole entities as span_precision and so
    on."""
    right, guessed, there = counts(reference, predicted).sum(0)
    return word_scores(reference, predicted, [len(s.tokens) for s in sentences]) | {
        "span_precision": 100 * float(right / max(guessed, 1)),
        "span_recall": 100 * float(right / max(there, 1)),
        "span_f1": 200 * float(right / max(guessed + there, 1)),
    }


def agreement(predicted: Entities, teacher: Entities) -> float:
    """F1 of the student's entities with the teacher's taken as gold, in percent."""
    return float(f1(counts(teacher, predicted)))


def calibration_error(
    marginals: Sequence[Tensor], tags: Sequence[Sequence[int]], bins: int = 15
) -> float:
    """ECE = sum over bins of |B| / n |accuracy(B) - confidence(B)| (Guo et al. 2017, eq. 3), in
    percent: words by the probability [L, K] of their most probable label, in equal bins."""
    confidence, guess = torch.cat(list(marginals)).max(1)
    right = (guess == torch.tensor([tag for own in tags for tag in own])).float()
    place = (confidence * bins).long().clamp(max=bins - 1)
    sums = [torch.zeros(bins).index_add(0, place, x.float()) for x in (right, confidence)]
    return 100 * float((sums[0] - sums[1]).abs().sum()) / len(right)


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Mean and half-width of Student's t interval over seeds; NaN half-width for a single seed."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), float("nan")
    error = values.std(ddof=1) / np.sqrt(len(values))
    half = special.stdtrit(len(values) - 1, (1 + confidence) / 2) * error
    return float(values.mean()), float(half)


def paired_bootstrap(
    ours: np.ndarray,
    theirs: np.ndarray,
    samples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, float]:
    """Difference of F1, its interval and two-sided p, from sentences drawn with replacement (Efron
    and Tibshirani 1993, ch. 16).

    Counts [n, 3] of one run each, or [seeds, n, 3] of the same seeds: every draw takes the same
    sentences for both sides and for every seed, and averages over seeds. Says how far the
    difference depends on the test sentences, not on the seeds.
    """
    differences = _differences_of_draws(ours, theirs, samples, seed)
    return _spread(ours, theirs, differences.mean(0), confidence)


def hierarchical_bootstrap(
    ours: np.ndarray,
    theirs: np.ndarray,
    samples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, float]:
    """The same where every draw draws the seeds too, with replacement, the same for both sides: one
    interval for both kinds of luck. A few seeds drawn again and again spread less than they should
    (by 1 - 1/n in variance), so read it beside Student's t interval."""
    differences = _differences_of_draws(ours, theirs, samples, seed)
    runs = len(differences)
    drawn = np.random.default_rng(seed + 1).integers(0, runs, (runs, samples))
    return _spread(ours, theirs, differences[drawn, np.arange(samples)].mean(0), confidence)


def _differences_of_draws(
    ours: np.ndarray, theirs: np.ndarray, samples: int, seed: int
) -> np.ndarray:
    """Difference of F1 [runs, samples] on sentences drawn with replacement."""
    if ours.shape != theirs.shape:
        raise ValueError(
            f"expected counts of the same runs and sentences, got {ours.shape} and {theirs.shape}"
        )
    ours, theirs = (c.reshape(-1, *c.shape[-2:]) for c in (ours, theirs))
    times = _times_drawn(ours.shape[1], samples, seed)
    pairs = zip(ours, theirs, strict=True)
    return np.stack([_f1_of_draws(times, a) - _f1_of_draws(times, b) for a, b in pairs])


@functools.lru_cache(maxsize=2)
def _times_drawn(sentences: int, samples: int, seed: int) -> np.ndarray:
    """How often each sentence is drawn [samples, sentences]."""
    drawn = np.random.default_rng(seed).integers(0, sentences, (samples, sentences))
    return np.stack([np.bincount(d, minlength=sentences) for d in drawn]).astype(float)


def _spread(
    ours: np.ndarray, theirs: np.ndarray, difference: np.ndarray, confidence: float
) -> dict[str, float]:
    low, high = np.quantile(difference, [(1 - confidence) / 2, (1 + confidence) / 2])
    tail = min((difference <= 0).mean(), (difference >= 0).mean())
    return {
        "difference": float(np.mean(f1(ours) - f1(theirs))),
        "low": float(low),
        "high": float(high),
        "p": float(min(1.0, 2 * max(tail, 1 / len(difference)))),
    }


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for so many tests (Holm 1979): the smallest times n, the next times n - 1,
    and so on, never below the one before."""
    adjusted, least = [0.0] * len(p), 0.0
    for rank, place in enumerate(np.argsort(p, kind="stable")):
        least = max(least, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = least
    return adjusted


def _f1_of_draws(times: np.ndarray, counted: np.ndarray) -> np.ndarray:
    right, guessed, there = (times @ counted).T
    return 200 * right / np.maximum(guessed + there, 1)


def _same_length(a: Sequence, b: Sequence) -> None:
    if len(a) != len(b):
        raise ValueError(f"expected as many predictions as sentences, got {len(b)} for {len(a)}")
