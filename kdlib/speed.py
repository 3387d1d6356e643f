"""Milliseconds, taken in turns: what models cost is comparable within one run on one machine, and nowhere else."""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import pandas as pd

from kdlib.data import Sentence
from kdlib.models import Tagger

TURN = 4  # calls


def in_turns(calls: Mapping[str, Callable[[int], object]], inputs: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each call by name, all taking turns of some calls on the same `inputs` (numbers from 0), for about `seconds`.

    Several calls a turn, the first not counted: a served model runs again and again and has its weights in the processor's cache.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    began, starts = time.perf_counter(), itertools.cycle(range(0, inputs, TURN))
    rounds = 0
    while rounds < 2 or (time.perf_counter() - began < seconds and rounds < 100):
        at = next(starts)
        for name, call in calls.items():
            for number, which in enumerate([at, *range(at, min(at + TURN, inputs))]):
                start = time.perf_counter()
                call(which)
                taken[name] += [1000 * (time.perf_counter() - start)] * (number > 0)
        rounds += 1
    return taken


def of_taggers(
    taggers: Mapping[str, Tagger], sentences: Sequence[Sentence], seconds: float = 8.0, batches: Sequence[int] = (1, 32)
) -> pd.DataFrame:
    """Per tagger and batch size: median milliseconds a sentence from words to entities, the same without tokenisation, and how many times
    the first tagger's sentences per second that is. ValueError for fewer sentences than a batch.
    """
    rows = []
    for batch in batches:
        chunks = [sentences[i : i + batch] for i in range(0, len(sentences) - batch + 1, batch)]
        if not chunks:
            raise ValueError(f"sentences: expected at least a batch of {batch}, got {len(sentences)}")
        calls: dict[str, Callable[[int], object]] = {}
        for name, tagger in taggers.items():
            encoded = [tagger.eval().encode(chunk) for chunk in chunks]
            calls[f"{name} words"] = lambda i, tagger=tagger, chunks=chunks: tagger.predict(chunks[i])
            calls[f"{name} pieces"] = lambda i, tagger=tagger, encoded=encoded: tagger.predict(encoded[i])
        taken = {name: statistics.median(t) / batch for name, t in in_turns(calls, len(chunks), seconds).items()}
        first = next(iter(taggers))
        for name in taggers:
            words, pieces = taken[f"{name} words"], taken[f"{name} pieces"]
            row = {"model": name, "batch": batch, "parameters": taggers[name].parameters_in_all}
            row |= {"ms_per_sentence_p50": round(words, 3), "without_tokenisation": round(pieces, 3)}
            row |= {"sentences_per_second": round(1000 / words, 1), "speedup": round(taken[f"{first} words"] / words, 2)}
            rows.append(row | {"speedup_without_tokenisation": round(taken[f"{first} pieces"] / pieces, 2)})
    return pd.DataFrame(rows)
