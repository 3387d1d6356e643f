"""Milliseconds and memory, taken in turns: comparable within one run on one machine, nowhere
else."""

import ctypes
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from kdlib.lab import cache, train
from kdlib.lab.study import Lessons, Study
from kdlib.methods import Method
from kdlib.models import Tagger
from kdlib.text.tags import Sentence

TURN = 16  # calls
UPDATES = 24  # a turn


def in_turns(
    calls: Mapping[str, Callable[[int], object]], inputs: int, seconds: float
) -> dict[str, list[float]]:
    """Milliseconds of each call by name, all taking turns of some calls on the same `inputs`
    (numbers from 0), for about `seconds`.

    Several calls a turn, the first not counted: a served model runs again and again and has its
    weights in the processor's cache.
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
    taggers: Mapping[str, Tagger],
    sentences: Sequence[Sentence],
    seconds: float = 8.0,
    batches: Sequence[int] = (1, 32),
) -> pd.DataFrame:
    """Per tagger and batch size: median milliseconds a sentence from words to entities, the same
    without tokenisation, and how many times the first tagger's sentences per second that is.
    ValueError for fewer sentences than a batch.
    """
    rows, start = [], time.perf_counter()
    for batch in batches:
        chunks = [sentences[i : i + batch] for i in range(0, len(sentences) - batch + 1, batch)]
        if not chunks:
            raise ValueError(
                f"sentences: expected at least a batch of {batch}, got {len(sentences)}"
            )
        calls: dict[str, Callable[[int], object]] = {}
        for name, tagger in taggers.items():
            encoded = [tagger.eval().encode(chunk) for chunk in chunks]
            calls[f"{name} words"] = lambda i, tagger=tagger, chunks=chunks: tagger.predict(
                chunks[i]
            )
            calls[f"{name} pieces"] = lambda i, tagger=tagger, encoded=encoded: tagger.predict(
                encoded[i]
            )
        taken = {
            name: statistics.median(t) / batch
            for name, t in in_turns(calls, len(chunks), seconds).items()
        }
        first = next(iter(taggers))
        for name in taggers:
            words, pieces = taken[f"{name} words"], taken[f"{name} pieces"]
            row = {"model": name, "batch": batch, "parameters": taggers[name].parameters_in_all}
            row |= {
                "ms_per_sentence_p50": round(words, 3),
                "without_tokenisation": round(pieces, 3),
            }
            row |= {
                "sentences_per_second": round(1000 / words, 1),
                "speedup": round(taken[f"{first} words"] / words, 2),
            }
            rows.append(
                row | {"speedup_without_tokenisation": round(taken[f"{first} pieces"] / pieces, 2)}
            )
    cache.spent("timing", time.perf_counter() - start)
    return pd.DataFrame(rows)


def peak_mb(call: Callable[[], float]) -> tuple[float, float]:
    """What the call returns, and the MiB that it holds at its peak beyond what was held before: the
    GPU's, else resident memory.

    NaN where the system cannot tell: resident memory's peak can be set back on Linux alone.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return call(), (torch.cuda.max_memory_allocated() - before) / 2**20
    if sys.platform != "linux":
        return call(), float("nan")
    ctypes.CDLL(None).malloc_trim(
        0
    )  # what was freed is given back, so that it is not used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
    before = _status("VmRSS")
    return call(), (_status("VmHWM") - before) / 2**10


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def of_updates(
    study: Study,
    student: str,
    rows: Mapping[str, Method | None],
    plain: Mapping[str, str],
    rounds: int = 4,
) -> pd.DataFrame:
    """Per row: median milliseconds of an update, peak MiB of a few (model, optimizer and a teacher
    that must be at hand included), and both over those of the rows of `plain`. A row is a method,
    or None for the teacher itself; one whose teacher learns now and then has whole rounds of it."""
    if rounds < 1 or not set(plain.values()) <= set(rows):
        raise ValueError(
            f"expected a round or more and rows named {list(plain.values())}, "
            f"got rounds={rounds}, rows={list(rows)}"
        )
    for method in filter(None, rows.values()):
        study.check(method, student)
    taken: dict[str, list[tuple[float, float]]] = {row: [] for row in rows}
    start = time.perf_counter()
    for _ in range(rounds):
        for row, method in rows.items():
            if method is None:
                own, updates = study.lessons_of_teacher(0), UPDATES
            else:
                own, every = study.lessons(method, student, 0), method.knobs.get("every") or 1
                updates = every * -(-UPDATES // every)
            settings = replace(own.settings, steps=updates, evaluations=1)
            taken[row].append(peak_mb(lambda own=own, settings=settings: _turn(own, settings)))
    cache.spent("timing", time.perf_counter() - start)
    found = []
    for row, own in taken.items():
        milliseconds, peaks = zip(*(own[1:] or own), strict=True)  # the first warms up
        medians = statistics.median(milliseconds), statistics.median(peaks)
        found.append({"row": row, "ms_per_update_p50": medians[0], "peak_mb": medians[1]})
    table = pd.DataFrame(found).set_index("row")
    for name, row in plain.items():
        for column, unit in (("ms_per_update_p50", "time"), ("peak_mb", "memory")):
            table[f"{unit} over {name}"] = table[column] / table[column][row]
    return table.round(2).reset_index()


def _turn(own: Lessons, settings: train.Settings) -> float:
    """Milliseconds of an update."""
    history = train.fit(own.model, own.rows, own.loss, settings)
    return 1000 * history[-1]["seconds"] / settings.steps
