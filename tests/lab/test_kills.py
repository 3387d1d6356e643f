"""What a kill at any moment leaves behind: nothing half-made, and the same numbers in the end."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from kdlib.text.files import ROOT

METHODS = "student alone|pseudo-labels|top-k|posterior|structural|msd"
SCRIPT = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from dataclasses import replace
from conftest import tiny_study
from kdlib.lab import cache, train
train.KEPT_EVERY = 0
study = tiny_study(sys.argv[1])
study = study.with_budget(replace(study.budget, updates=40))
print("begins", flush=True)
runs = study.runs({METHODS!r}.split("|"), ["bilstm"], [0], show=False)
print(cache.digest([[m.method, m.predicted, [h["loss"] for h in m.history]] for m in runs]))
"""


def started(folder, home):
    """The study in a process of its own, once its imports are done."""
    command = [sys.executable, "-c", SCRIPT, folder]
    environment = {"KDLIB_CACHE": str(home), "PATH": "", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begins\n"
    return process


@pytest.mark.long
def test_killed_at_any_moment_and_started_again_six_methods_end_the_same(tiny_folder, tmp_path):
    began = time.perf_counter()
    (whole,) = started(tiny_folder, tmp_path / "one").stdout.read().split()
    seconds, rng = time.perf_counter() - began, random.Random(0)
    for _ in range(6):
        process = started(tiny_folder, tmp_path / "two")
        time.sleep(rng.uniform(0, seconds / 3))
        process.kill()
        process.wait()
    (again,) = started(tiny_folder, tmp_path / "two").stdout.read().split()
    assert again == whole
    assert not list((tmp_path / "two").rglob("*.damaged"))
    assert not list((tmp_path / "two" / "checkpoints").glob("*.pt"))


@pytest.mark.long
def test_two_processes_on_one_cache_say_the_same(tiny_folder, tmp_path):
    both = [started(tiny_folder, tmp_path / "both") for _ in range(2)]
    said = [process.stdout.read() for process in both]
    assert said[0] == said[1] != ""


@pytest.mark.long
@pytest.mark.notebook
def test_a_quick_study_killed_twice_leaves_the_same_tables(tmp_path):
    rng, command = random.Random(1), [sys.executable, "-m", "kdlib", "study", "04"]
    command += ["--profile", "quick", "--force", "--set"]

    def begun(name):
        environment = os.environ | {"KDLIB_CACHE": str(tmp_path / f"{name} cache")}
        figures = f"figures={tmp_path / name}"
        how = {"cwd": ROOT, "env": environment, "start_new_session": True}
        return subprocess.Popen([*command, figures], stdout=subprocess.DEVNULL, **how)

    start = time.perf_counter()
    assert begun("whole").wait() == 0
    seconds = time.perf_counter() - start
    for _ in range(2):
        process = begun("killed")
        time.sleep(rng.uniform(seconds / 4, 3 * seconds / 4))
        os.killpg(process.pid, signal.SIGKILL)  # its kernel too
        process.wait()
    assert begun("killed").wait() == 0
    whole, killed = (
        {f.name: without_times(f) for f in sorted((tmp_path / name).glob("*/04_*.csv"))}
        for name in ("whole", "killed")
    )
    assert whole.keys() == killed.keys() and len(whole) > 3
    assert [name for name in whole if whole[name] != killed[name]] == []


def without_times(file):
    table = pd.read_csv(file)
    return table.drop(columns=[c for c in table if "seconds" in c]).to_csv()
