"""`python -m kdlib bench inference`: what a user waits for, from text to entities with offsets."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from kdlib.lab import bench, timing
from kdlib.lab.study import Fitted, Study
from kdlib.models import Tagger
from kdlib.ship import runtime
from kdlib.ship.export import export
from kdlib.students import pretrained
from kdlib.text import calls, corpora
from kdlib.text.tags import Sentence
from kdlib.twin_tower import TwinTower

BATCHES, THREADS = (1, 32), (1, 2)
RUNTIMES = {"onnxruntime": False, "onnxruntime int8": True}
FRESH = """
{load}
model({text!r})
status = open("/proc/self/status").read().splitlines()
print(next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024)
"""
IN_TORCH = """
from kdlib.models import Tagger
from kdlib.text.tags import Sentence
tagger = Tagger.from_pretrained('{folder}/torch')
model = lambda text: tagger.predict([Sentence(tuple(text.split()))])
"""
TWIN_IN_TORCH = """
from kdlib.twin_tower import TwinTower
tower = TwinTower.from_pretrained('{folder}/torch')
model = lambda text: tower.predict_entities(text, {labels})
"""
FAST_GLINER = "KDLIB_FAST_GLINER"  # a Python that has the package, which pins older libraries
BY_FAST_GLINER = """
import json, os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:{threads}])  # it has no such option
from fast_gliner import FastGLiNER
model = FastGLiNER({folder!r}, onnx_path="model.onnx")
for line in sys.stdin:
    print(len(model.predict_entities(json.loads(line), {labels})), flush=True)
"""
IN_ONNX = """
from kdlib.ship import runtime
model = runtime.load('{folder}', int8={int8}).predict_entities
"""


def inference(seconds: float = 10.0) -> pd.DataFrame:
    """Every model on the same texts of 20 words, in turns, at batch 1 and 32, on one thread and on
    two; speed does not depend on what they have learnt. ratio: how many times as fast as a GLiNER
    of gliner_small's shape in torch. load_ms, resident_mb: a fresh process from its start to the
    first answer, on one thread. fast_gliner is there where $KDLIB_FAST_GLINER names a Python that
    has it."""
    texts = bench.sentences()
    study = Study(corpora.shuffled(corpora.load("demo"), 100, 100), Fitted())
    own = {"MiniLM-CRF, the teacher": study.new_teacher().eval()}
    for name, kind in (("thin Transformer-CRF", "thin"), ("BiLSTM-CRF", "bilstm")):
        own[name] = study.new_student(kind, 0).eval()
    own["twin tower"] = TwinTower(pretrained.load().tokenizer).eval()
    shapes = {"gliner_small's shape": (True, "markerV0"), "MiniLM": (False, "token_level")}
    gliners = {name: bench.untrained_gliner(*shape) for name, shape in shapes.items()}
    asked = {
        f"GLiNER, {name}|{run}": model
        for name, gliner in gliners.items()
        for run, model in bench.runtimes(gliner).items()
    }
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / str(i) for i, name in enumerate(own)}
        for name, model in own.items():
            export(model, folders[name], {}, labels=bench.LABELS)
            model.save_pretrained(folders[name] / "torch")
        if FAST_GLINER in os.environ:
            gliners["gliner_small's shape"].export_to_onnx(Path(scratch) / "gliner")
        tables = []
        for threads in THREADS:
            torch.set_num_threads(threads)
            models = {name: _in_torch(model) for name, model in asked.items()}
            for name, model in own.items():
                models[f"{name}|torch"] = _in_torch(model)
                for run, int8 in RUNTIMES.items():
                    models[f"{name}|{run}"] = runtime.load(folders[name], int8, threads).inference
            with contextlib.ExitStack() as stack:
                if FAST_GLINER in os.environ:
                    fast = stack.enter_context(_fast_gliner(Path(scratch) / "gliner", threads))
                    models["GLiNER, gliner_small's shape|fast_gliner"] = fast
                tables += [_timed(models, texts, batch, threads, seconds) for batch in BATCHES]
        started = [r for name in folders for r in _started(name, folders[name], texts[0])]
    table = pd.concat(tables).merge(pd.DataFrame(started), on=["model", "runtime"], how="left")
    print(table.to_string(index=False))
    return table


def _started(name: str, folder: Path, text: str) -> Iterator[dict]:
    """What it costs to start with a model's folder, by runtime."""
    for run, int8 in {"torch": False, **RUNTIMES}.items():
        in_torch = TWIN_IN_TORCH if name == "twin tower" else IN_TORCH
        load = in_torch if run == "torch" else IN_ONNX
        load = load.format(folder=folder, int8=int8, labels=list(bench.LABELS))
        file = "onnx/model_int8.onnx" if int8 else "model.safetensors"
        taken, resident = _fresh(load, text)
        row = {"model": name, "runtime": run, "load_ms": round(taken, 1)}
        row["resident_mb"] = round(resident, 1)
        yield row | {"disk_mb": round((folder / file).stat().st_size / 1e6, 1)}


def _in_torch(model: Any) -> Callable[[list[str]], object]:
    """A tagger's own call, or GLiNER's."""
    if isinstance(model, Tagger):
        return lambda part: model.predict(_words(part))
    return lambda part: model.inference(part, list(bench.LABELS), batch_size=len(part))


@contextlib.contextmanager
def _fast_gliner(folder: Path, threads: int) -> Iterator[Callable[[list[str]], object]]:
    """The same GLiNER's ONNX graph by the package fast_gliner, in a process of its own."""
    code = BY_FAST_GLINER.format(threads=threads, folder=str(folder), labels=list(bench.LABELS))
    how = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([os.environ[FAST_GLINER], "-c", code], **how) as child:

        def answer(part: list[str]) -> int:
            child.stdin.write(json.dumps(part) + "\n")
            child.stdin.flush()
            told = child.stdout.readline()
            if told != f"{len(part)}\n":
                raise RuntimeError(f"fast_gliner: expected {len(part)} answers, got {told!r}")
            return len(part)

        yield answer


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
