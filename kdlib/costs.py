"""What one update of a student costs, method by method: milliseconds and peak memory, measured side by side in one process."""

import copy
import ctypes
import gc
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from kdlib import experiments, teachers, train
from kdlib.data import Parts
from kdlib.experiments import Protocol
from kdlib.meta import Feedback, Meta
from kdlib.models import Tagger

UPDATES = 4  # a turn
ALONE = ("teacher", "student alone")
ROWS = (
    *ALONE,
    "top-k",
    "posterior",
    "structural",
    "posterior, teacher read anew",
    "msd central",
    "msd exact",
    "msd central, now and then",
)


def peak_mb(call: Callable[[], float]) -> tuple[float, float]:
    """What the call returns, and the MiB that it holds at its peak beyond what was held before: the GPU's, else resident memory.

    NaN where the system cannot tell: resident memory's peak can be set back on Linux alone.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return call(), (torch.cuda.max_memory_allocated() - before) / 2**20
    if sys.platform != "linux":
        return call(), float("nan")
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is given back, so that it is not used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
    before = _status("VmRSS")
    return call(), (_status("VmHWM") - before) / 2**10


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def of_updates(protocol: Protocol, parts: Parts, rounds: int = 4, rows: tuple[str, ...] = ROWS) -> pd.DataFrame:
    """Per row: median milliseconds of an update, peak MiB of a few (model, optimizer and a teacher that must be at hand included), and both
    over those of plain posterior distillation, whose teacher is stored, or read anew for every batch as MSD has to. 'now and then': the
    teacher learns once in `protocol.meta.every` updates, else at each.
    """
    unknown = set(rows) - set(ROWS)
    plain = {"stored": "posterior", "read anew": "posterior, teacher read anew"}
    if unknown or not set(plain.values()) <= set(rows) or rounds < 1 or not 0 < protocol.quiz < len(parts.labelled):
        raise ValueError(
            f"expected rows of {ROWS}, both plain ones among them, a round or more and some of {len(parts.labelled)} sentences as quiz, "
            f"got rows={rows}, rounds={rounds}, quiz={protocol.quiz}"
        )
    teacher, _ = experiments.trained_teacher(protocol, parts, 0)
    text = parts.labelled + parts.transfer
    student = experiments.new_student(protocol, parts, 0)
    labelled = student.encode(parts.labelled)
    told = teachers.with_teacher(student.encode(text), text, teacher)
    seen = (
        dict.fromkeys(rows, told)
        | dict.fromkeys(ALONE, labelled)
        | {"top-k": teachers.with_surrogates(told, teacher, protocol.k)}
    )

    def turn(row: str) -> float:
        own = (experiments.new_teacher if row == "teacher" else experiments.new_student)(protocol, parts, 0)
        loss = _loss(row, own, teacher, protocol, parts)
        settings = train.Settings(_updates(row, protocol), protocol.student_batch or protocol.batch_size, evaluations=1)
        history = train.fit(own, seen[row], loss, lambda: {"dev_f1": 0.0}, settings)
        return 1000 * history[-1]["seconds"] / settings.steps

    taken: dict[str, list[tuple[float, float]]] = {row: [] for row in rows}
    for _ in range(rounds):
        for row in rows:
            taken[row].append(peak_mb(lambda row=row: turn(row)))
    found = []
    for row, own in taken.items():
        milliseconds, peaks = zip(*(own[1:] or own), strict=True)  # the first warms up
        found.append({"row": row, "ms_per_update_p50": statistics.median(milliseconds), "peak_mb": statistics.median(peaks)})
    table = pd.DataFrame(found).set_index("row")
    for name, row in plain.items():
        table[f"time over {name}"] = table["ms_per_update_p50"] / table["ms_per_update_p50"][row]
        table[f"memory over {name}"] = table["peak_mb"] / table["peak_mb"][row]
    return table.round(2).reset_index()


def _updates(row: str, protocol: Protocol) -> int:
    """How many in a turn: whole rounds of one with and some without a lesson for the teacher."""
    every = protocol.meta.every if row.endswith("then") else 1
    return every * math.ceil(UPDATES / every)


def _loss(row: str, student: Tagger, teacher: Tagger, protocol: Protocol, parts: Parts) -> train.Loss:
    if row.startswith("msd"):
        every = protocol.meta.every if row.endswith("then") else 1
        learns = replace(protocol.meta, way=row.split()[1].strip(","), every=every, rate=protocol.meta.rate or Meta.rate)
        return Feedback(teacher, student, student.encode(parts.labelled[-protocol.quiz :]), protocol.alpha, learns)
    if not row.endswith("anew"):
        return experiments.objective(row, None if row in ALONE else teacher, protocol)
    at_hand = copy.deepcopy(teacher)  # counted as memory, as MSD's copy is

    plain = experiments.objective("posterior", at_hand, protocol)

    def read_anew(model: Tagger, emissions: torch.Tensor, batch: experiments.Batch, progress: float) -> torch.Tensor:
        with torch.no_grad():
            said = at_hand.to(emissions.device)(batch)
        return plain(model, emissions, replace(batch, teacher=said), progress)

    return read_anew
