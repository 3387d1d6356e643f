"""`python -m kdlib bench inference`: what a user waits for, from text to entities with offsets."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from kdlib.lab import bench, timing
from kdlib.lab.study import Fitted, Study
from kdlib.ship import runtime
from kdlib.ship.export import export
from kdlib.students import pretrained
from kdlib.text import calls, corpora
from kdlib.text.tags import Sentence
from kdlib.twin_tower import TwinTower

BATCHES, THREADS = (1, 32), (1, 2)
FRESH = """
{load}
model({text!r})
status = open("/proc/self/status").read().splitlines()
print(next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024)
"""
IN_TORCH = """
from kdlib.models import Tagger
from kdlib.text.tags import Sentence
tagger = Tagger.from_pretrained({folder!r})
model = lambda text: tagger.predict([Sentence(tuple(text.split()))])
"""
IN_ONNX = """
from kdlib.ship import runtime
model = runtime.load({folder!r}, int8={int8}).predict_entities
"""


def inference(seconds: float = 10.0) -> pd.DataFrame:
    """Every model on the same texts of 20 words, in turns, at batch 1 and 32, on one thread and on
    two; speed does not depend on what they have learnt. ratio: how many times as fast as a GLiNER
    of gliner_small's shape in torch. load_ms, resident_mb: a fresh process from its start to the
    first answer, on one thread."""
    texts = bench.sentences()
    study = Study(corpora.shuffled(corpora.load("demo"), 100, 100), Fitted())
    teacher, student = study.new_teacher().eval(), study.new_student("bilstm", 0).eval()
    twin = TwinTower(pretrained.load().tokenizer).eval()
    peers = {
        f"GLiNER, {name}|{run}": model
        for name, small, mode in (
            ("gliner_small's shape", True, "markerV0"),
            ("MiniLM", False, "token_level"),
        )
        for run, model in bench.runtimes(bench.untrained_gliner(small, mode)).items()
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, model in (("teacher", teacher), ("student", student)):
            model.save_pretrained(folder / name)
        export(student, folder / "shipped", {})
        tables = []
        for threads in THREADS:
            torch.set_num_threads(threads)
            ships = {
                int8: runtime.load(folder / "shipped", int8, threads) for int8 in (False, True)
            }
            models: dict[str, Callable[[list[str]], object]] = {
                name: lambda part, m=m: m.inference(part, list(bench.LABELS), batch_size=len(part))
                for name, m in (peers | {"twin tower|torch": twin}).items()
            }
            models |= {
                "MiniLM-CRF, the teacher|torch": lambda part: teacher.predict(_words(part)),
                "BiLSTM-CRF|torch": lambda part: student.predict(_words(part)),
                "BiLSTM-CRF|onnxruntime": ships[False].inference,
                "BiLSTM-CRF|onnxruntime int8": ships[True].inference,
            }
            tables += [_timed(models, texts, batch, threads, seconds) for batch in BATCHES]
        table = pd.concat(tables, ignore_index=True)
        fresh = {
            "MiniLM-CRF, the teacher|torch": (IN_TORCH, folder / "teacher", False),
            "BiLSTM-CRF|torch": (IN_TORCH, folder / "student", False),
            "BiLSTM-CRF|onnxruntime": (IN_ONNX, folder / "shipped", False),
            "BiLSTM-CRF|onnxruntime int8": (IN_ONNX, folder / "shipped", True),
        }
        for name, (load, where, int8) in fresh.items():
            model, run = name.split("|")
            rows = (table["model"] == model) & (table["runtime"] == run)
            milliseconds, megabytes = _fresh(load.format(folder=str(where), int8=int8), texts[0])
            table.loc[rows, ["load_ms", "resident_mb"]] = round(milliseconds), round(megabytes)
            file = "onnx/model_int8.onnx" if int8 else "model.safetensors"
            table.loc[rows, "disk_mb"] = round((where / file).stat().st_size / 1e6, 1)
    print(table.to_string(index=False))
    return table


def _words(texts: list[str]) -> list[Sentence]:
    return [
        Sentence(tuple(text[a:b] for a, b in next(calls.windows(text, len(text)), ())))
        for text in texts
    ]


def _timed(
    models: dict[str, Callable], texts: list[str], batch: int, threads: int, seconds: float
) -> pd.DataFrame:
    chunks = [texts[i : i + batch] for i in range(0, len(texts), batch)]
    turns = {name: lambda i, call=call: call(chunks[i]) for name, call in models.items()}
    taken = timing.in_turns(turns, len(chunks), seconds * len(models) / 4)
    first = float(np.median(next(iter(taken.values()))))
    rows = []
    for name, ms in taken.items():
        model, run = name.split("|")
        p50, p95 = (float(np.quantile(ms, q)) / batch for q in (0.5, 0.95))
        rows.append(
            {"operation": f"batch {batch}", "threads": threads, "model": model, "runtime": run}
            | {"p50_ms": round(p50, 3), "p95_ms": round(p95, 3)}
            | {"texts_per_second": round(1000 / p50, 1), "ratio": round(first / batch / p50, 1)}
        )
    return pd.DataFrame(rows)


def _fresh(load: str, text: str) -> tuple[float, float]:
    """Milliseconds and MiB of a process of its own, up to its first answer."""
    code = FRESH.format(load=load, text=text)
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    taken = 1000 * (time.perf_counter() - began)
    return taken, float(done.stdout.split()[-1])
