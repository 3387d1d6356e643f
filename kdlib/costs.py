"""What one update of a student costs, method by method: milliseconds and peak memory, measured side by side in one process."""

import ctypes
import gc
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from kdlib import experiments, losses, teachers, train
from kdlib.experiments import Parts, Protocol
from kdlib.meta import Feedback
from kdlib.models import Tagger

UPDATES = 4  # a turn
ALONE = ("teacher", "student alone")
ROWS = (
    *ALONE,
    "student alone",
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
    teacher, _ = experiments.trained_teacher(protocol, parts, 0)
    text = parts.labelled + parts.transfer
    student = experiments.new_student(protocol, parts, 0)
    labelled = student.encode(parts.labelled)
    seen = teachers.with_surrogates(teachers.with_teacher(student.encode(text), text, teacher), teacher, protocol.k)
    settings = train.Settings(UPDATES, protocol.student_batch or protocol.batch_size, evaluations=1)

    def turn(row: str) -> float:
        own = (experiments.new_teacher if row == "teacher" else experiments.new_student)(protocol, parts, 0)
        loss = _loss(row, own, teacher, protocol, parts)
        history = train.fit(own, seen if row not in ALONE else labelled, loss, lambda: {"dev_f1": 0.0}, settings)
        return 1000 * history[-1]["seconds"] / UPDATES

    taken: dict[str, list[tuple[float, float]]] = {row: [] for row in rows}
    for _ in range(rounds):
        for row in rows:
            taken[row].append(peak_mb(lambda row=row: turn(row)))
    found = []
    for row, own in taken.items():
        milliseconds, peaks = zip(*(own[1:] or own), strict=True)  # the first warms up
        found.append({"row": row, "ms_per_update_p50": statistics.median(milliseconds), "peak_mb": statistics.median(peaks)})
    table = pd.DataFrame(found).set_index("row")
    for name, plain in (("stored", "posterior"), ("read anew", "posterior, teacher read anew")):
        table[f"time over {name}"] = table["ms_per_update_p50"] / table["ms_per_update_p50"][plain]
        table[f"memory over {name}"] = table["peak_mb"] / table["peak_mb"][plain]
    return table.round(2).reset_index()


def _loss(row: str, student: Tagger, teacher: Tagger, protocol: Protocol, parts: Parts) -> train.Loss:
    if row.startswith("msd"):
        quiz = student.encode(parts.labelled[-protocol.quiz :])
        way = "exact" if "exact" in row else "central"
        every = protocol.meta.every if row.endswith("then") else 1
        return Feedback(teacher, student, quiz, protocol.alpha, replace(protocol.meta, way=way, every=every))
    if not row.endswith("anew"):
        return experiments.objective(row, None if row in ALONE else teacher, protocol)

    def read_anew(model: Tagger, emissions: torch.Tensor, batch: experiments.Batch, _: float) -> torch.Tensor:
        with torch.no_grad():
            said = teacher(batch)
        gold = losses.labelled_nll(model.crf, emissions, batch.tags, batch.mask, batch.labelled)
        return losses.mix(gold, losses.posterior(model.crf, emissions, teacher.crf, said, batch.mask), protocol.alpha)

    return read_anew
