"""Run the notebooks in batch: what `kdlib study` does.

A notebook that ran before with the same code, data and parameters is not run again. One that fails
is reported with its cell and error, and the others still run.
"""

import contextlib
import hashlib
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import nbformat
import pandas as pd
import papermill as pm
import yaml
from papermill.engines import NBClientEngine, papermill_engines
from traitlets.config import Config

from kdlib.lab import cache, claims, plots
from kdlib.text.corpora import NAMES, locate
from kdlib.text.files import ROOT, replacing, write_text

BUILD = ROOT / "build"
PROFILES = ("default", "quick", "full")
# parameters that name experiments with records
EXPERIMENTS = {"common", "readings", "searched", "grown"}
EVERY = 15.0  # seconds between two lines of a run that goes on


class _Reporting(NBClientEngine):
    """Papermill's own engine, which also says which cell each run is in, and gives a kernel the
    name of its run, for `cache.spent`."""

    at: ClassVar[dict[str, int]] = {}
    starting: ClassVar[threading.Lock] = threading.Lock()  # a kernel inherits the environment

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **kwargs: Any) -> None:
        name, start, waits = nb_man.nb.metadata["kdlib_name"], nb_man.cell_start, [True]
        before: dict[str, str] = {}

        def started() -> None:
            if waits.pop() if waits else False:
                os.environ.update(before)  # a JupyterLab that starts later is no batch run
                cls.starting.release()

        def cell_start(cell: Any, cell_index: int | None = None, **more: Any) -> None:
            started()
            start(cell, cell_index, **more)
            cls.at[name] = (cell_index or 0) + 1

        nb_man.cell_start = cell_start
        cls.starting.acquire()
        before |= {key: os.environ.get(key, "") for key in (cache.RUN, plots.BATCH)}
        os.environ |= {cache.RUN: name, plots.BATCH: "1"}
        try:
            super().execute_managed_notebook(nb_man, kernel_name, **kwargs)
        finally:
            started()


papermill_engines.register("kdlib", _Reporting)


def _line(name: str, at: int, total: int, seconds: float, result: str) -> None:
    print(f"{name:42} cell {at:>2}/{total}  {seconds:6.0f} s  {result}", flush=True)


@contextlib.contextmanager
def _beating(name: str, total: int) -> Iterator[None]:
    """A line now and then while the block runs, and one when it ends: done, or FAILED."""
    began, stop = time.perf_counter(), threading.Event()
    _Reporting.at[name] = 0

    def say(result: str) -> None:
        _line(name, _Reporting.at[name], total, time.perf_counter() - began, result)

    def beat() -> None:
        while not stop.wait(EVERY):
            say("...")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        say("FAILED")
        raise
    finally:
        stop.set()
        thread.join()
    _Reporting.at[name] = total
    say("done")


def study() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """notebooks/study.yaml: notebook -> profile -> list of parameter sets."""
    file = ROOT / "notebooks" / "study.yaml"
    if not file.exists():
        raise FileNotFoundError(
            f"{file}: the notebooks come with a checkout, not with an installed package: clone the "
            "repository, then `pip install -e .` in it"
        )
    rows = yaml.safe_load(file.read_text(encoding="utf8"))
    return {
        stem: {
            name: sets if isinstance(sets, list) else [sets or {}]
            for name, sets in profiles.items()
        }
        | {"default": [{}]}
        for stem, profiles in rows.items()
    }


def declared(stem: str) -> dict[str, dict[str, Any]]:
    """The parameters a notebook declares, with papermill's reading of their types, defaults and
    help."""
    return pm.inspect_notebook(ROOT / "notebooks" / f"{stem}.ipynb")


def check(stem: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters, converted to the types the notebook declares; ValueError for an unknown one
    or one of another type."""
    known = declared(stem)
    unknown = sorted(parameters.keys() - known.keys())
    if unknown:
        raise ValueError(
            f"{stem} declares no parameter {unknown}: expected some of {sorted(known)}"
        )
    return {
        name: _typed(stem, name, value, known[name]["inferred_type_name"])
        for name, value in parameters.items()
    }


def _typed(stem: str, name: str, value: Any, kind: str) -> Any:
    """YAML reads 1e-5 as text, and a command line gives text alone: text is read as the declared
    type, all else must have it."""
    readers = {
        "int": int,
        "float": float,
        "str": str,
        "bool": lambda text: {"true": True, "false": False}[text.lower()],
    }
    try:
        if isinstance(value, str):
            return readers[kind](value)
    except (ValueError, KeyError):
        value = repr(value)
    if type(value).__name__ == kind or (kind == "float" and type(value) is int):
        return value
    raise ValueError(f"{stem}: {name}: expected {kind}, got {value}")


def _sources() -> list[Path]:
    """kdlib's own files, at any depth."""
    kinds = (".py", ".yaml", ".mplstyle")
    return sorted(f for f in (ROOT / "kdlib").rglob("*") if f.suffix in kinds)


def key(stem: str, parameters: Mapping[str, Any]) -> str:
    """A digest of all that a run depends on: the notebook, kdlib's files, the parameters, the
    data."""
    used = {name: cell["default"] for name, cell in declared(stem).items()} | {
        k: repr(v) for k, v in parameters.items()
    }
    notebook = ROOT / "notebooks" / f"{stem}.ipynb"
    timed = re.findall(r'bench\\" / \\"(\w+\.csv)', notebook.read_text(encoding="utf8"))
    files = [notebook, *_sources(), *(ROOT / "figures" / "bench" / name for name in timed)]
    for name in (used.get(parameter, "").strip("'\"") for parameter in ("dataset", "unseen")):
        files += filter(None, locate(name) if name else [])
    for name in (used.get(p, "").strip("'\"") for p in ("encoder", "teacher", "text", "gold")):
        if name.startswith("/"):  # a file or folder of the user's own, by its whole path
            files += sorted(f for f in (Path(name), *Path(name).rglob("*")) if f.is_file())
    if "results" in used:
        files += sorted(
            (ROOT / "figures").glob("*/[0-9][0-9]_table*.csv")
        )  # what other notebooks have left to read
    if EXPERIMENTS & used.keys():
        files += [ROOT / "notebooks" / "evidence.yaml", *sorted((ROOT / "data" / "runs").glob("*"))]
    return cache.digest(used, [_sha(f) for f in files])


def _transport(folder: str) -> Config:
    """Sockets of this run's own: TCP ports clash now and then, and kernels that start in one folder
    would share their sockets' names."""
    ipc = {"transport": "ipc", "ip": f"{folder}/kernel"}
    return Config({"KernelManager": ipc} if os.name == "posix" else {})


def run(stem: str, parameters: Mapping[str, Any], out: Path) -> Path:
    """Execute one notebook into `out`; unknown parameters are errors. PapermillExecutionError names
    a failing cell."""
    parameters, source = check(stem, parameters), ROOT / "notebooks" / f"{stem}.ipynb"
    out.parent.mkdir(parents=True, exist_ok=True)
    notebook = nbformat.read(source, 4)
    notebook.metadata["kdlib_name"] = out.stem
    entered = out.with_suffix(".input.ipynb")
    with replacing(entered) as aside:
        nbformat.write(notebook, aside)
    try:
        with tempfile.TemporaryDirectory() as sockets, _beating(out.stem, len(notebook.cells)):
            pm.execute_notebook(
                entered,
                out,
                parameters,
                engine_name="kdlib",
                kernel_name="python3",
                cwd=source.parent,
                progress_bar=False,
                config=_transport(sockets),
            )
    finally:
        entered.unlink(missing_ok=True)
    return out


def planned(
    asked: list[str], profile: str, extra: Mapping[str, Any]
) -> dict[str, tuple[str, dict[str, Any]]]:
    """Run name -> (notebook, checked parameters) of those a profile has, or of those whose names
    begin as asked: 03, or 03a_structured_distillation.full.2 for its second set. Everything is
    checked before anything runs; ValueError for what does not fit."""
    rows = {
        f"{stem}.{profile}" + (f".{i + 1}" if i else ""): (stem, parameters)
        for stem, profiles in study().items()
        for i, parameters in enumerate(profiles.get(profile, []))
    }
    wanted = set() if asked else set(rows)
    for a in asked:
        found = {a} & rows.keys() or {name for name in rows if name.startswith(a)}
        if not found:
            raise ValueError(
                f"--profile {profile}: no run {a!r}: expected the beginning of one of {list(rows)}"
            )
        wanted |= found
    kept = BUILD if profile == "quick" else ROOT  # only whole runs leave evidence
    runs: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in (name for name in rows if name in wanted):
        stem, parameters = rows[name]
        where = {"figures": str(kept / "figures")} if "figures" in declared(stem) else {}
        runs[name] = stem, _absolute(check(stem, parameters | where | dict(extra)))
    return runs


def _absolute(parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters with files and folders of the user's own by their whole path: notebooks run in
    a folder of theirs.

    A data set is a folder where it is no known name, an encoder or teacher where there is one.
    """
    found = dict(parameters)
    for name, value in parameters.items():
        path = Path(str(value)).expanduser()
        data = name in ("dataset", "unseen") and value not in NAMES
        there = name in ("encoder", "teacher") and path.exists()
        if value and (data or there or name in ("figures", "results", "text", "gold", "out")):
            found[name] = str(path.absolute())
    return found


def _written(parameters: Mapping[str, Any], since: float) -> dict[str, str]:
    """Digests of the figures and tables that a run has left, by path."""
    folder = Path(parameters.get("figures", ROOT / "figures"))
    files = (f for f in folder.glob("*/*") if f.suffix in (".csv", ".svg"))
    return {str(f): _sha(f) for f in sorted(files) if f.stat().st_mtime >= since}


def _sha(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _unchanged(stamp: Path, out: Path, content: str) -> bool:
    """Whether a run with this key is there, and all that it left is as it left it."""
    if not (out.exists() and stamp.exists()):
        return False
    try:
        said = json.loads(stamp.read_text(encoding="utf8"))
        left = said["wrote"].items()
    except (ValueError, KeyError, TypeError):  # damaged, or of an earlier version: run again
        return False
    return said["key"] == content and all(Path(f).exists() and _sha(Path(f)) == d for f, d in left)


def run_all(
    runs: Mapping[str, tuple[str, dict[str, Any]]], force: bool, jobs: int = 1
) -> list[str]:
    """Run what was planned, so many at a time; returns what failed, one line each. Notebooks that
    read what others have left come after them. Two jobs of one thread each do more than one of two
    threads: the cores are shared out."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        os.environ.setdefault(name, str(2**34))  # glibc: keep the memory of large gradients
    readers = [name for name, (stem, _) in runs.items() if "results" in declared(stem)]
    failures, seconds = [], {}
    for part in ([name for name in runs if name not in readers], readers):
        with ThreadPoolExecutor(jobs) as pool:
            ends = {name: pool.submit(_one, name, *runs[name], force) for name in part}
            try:
                for name, end in ends.items():
                    failure, stages = end.result()
                    failures += [failure] if failure else []
                    seconds |= {name: stages} if stages else {}
            except KeyboardInterrupt:
                pool.shutdown(cancel_futures=True)
                raise
    figures = ROOT / "figures"
    if all(Path(p.get("figures", figures)) != figures for _, p in runs.values()):
        return failures  # nothing of it is evidence
    try:
        with cache.locked(figures / "README.md"):  # a grid of jobs ends here many times
            if seconds:
                _write_times(seconds)
            plots.gallery()
            update_readme(ROOT / "README.md", claims.write(ROOT))
    except (OSError, ValueError, KeyError) as error:  # a damaged index, say
        failures.append(f"figures/: {type(error).__name__}: {error}")
    return failures


def _one(
    name: str, stem: str, parameters: dict[str, Any], force: bool
) -> tuple[str, dict[str, float]]:
    """What failed of a run, and where its time went; both empty for one that was skipped."""
    out, stamp = BUILD / f"{name}.ipynb", BUILD / f"{name}.key"
    content = key(stem, parameters)
    if not force and _unchanged(stamp, out, content):
        print(f"{name:42} nothing has changed since it ran: skipped (--force runs it)", flush=True)
        return "", {}
    stamp.unlink(missing_ok=True)
    began, noted, since = time.perf_counter(), len(_spent(name)), time.time()
    try:
        run(stem, parameters, out)
    except pm.PapermillExecutionError as error:
        where = f"{name}: cell {error.cell_index}"
        return f"{where}: {error.ename}: {error.evalue} (see {out})", {}
    except Exception as error:  # a dead kernel, say: reported, and the others still run
        where = f"{name}: cell {_Reporting.at.get(name, 0)}"
        return f"{where}: {type(error).__name__}: {error} (see {out})", {}
    write_text(stamp, json.dumps({"key": content, "wrote": _written(parameters, since)}))
    return "", _stages(time.perf_counter() - began, _spent(name)[noted:])


def _spent(name: str) -> list[tuple[str, float]]:
    """What `cache.spent` has noted of a run so far: stages and seconds."""
    log = cache.folder() / "spent.csv"
    lines = log.read_text(encoding="utf8").splitlines() if log.exists() else []
    of_run = (
        line.removeprefix(f"{name},").split(",") for line in lines if line.startswith(f"{name},")
    )
    return [(stage, float(seconds)) for stage, seconds in of_run]


def _stages(wall: float, noted: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Seconds by stage of a run; the rest are figures, toy examples, starting the kernel."""
    stages: dict[str, float] = {}
    for stage, seconds in noted:
        stages[stage] = stages.get(stage, 0.0) + seconds
    return stages | {"the rest": wall - sum(stages.values())}


def _write_times(runs: Mapping[str, Mapping[str, float]]) -> None:
    """figures/bench/study.csv: where the time of each run went, runs of earlier calls kept."""
    file = ROOT / "figures" / "bench" / "study.csv"
    rows = [
        {"run": name, "stage": stage, "seconds": round(s, 1), "cores": os.cpu_count()}
        for name, stages in runs.items()
        for stage, s in stages.items()
    ]
    table = pd.DataFrame(rows)
    if file.exists():
        kept = pd.read_csv(file)
        table = pd.concat([kept[~kept["run"].isin(runs)], table])
    caption = "Where the time of `python -m kdlib study` went; what is remembered costs none."
    plots.save(file.with_suffix(""), table.sort_values("run", kind="stable"), caption)


def update_readme(readme: Path, known: pd.DataFrame) -> None:
    """Print the numbers of every claim in the README anew."""
    write_text(readme, claims.fill(readme.read_text(encoding="utf8"), known))


def command(
    names: list[str], profile: str, pairs: list[str], force: bool, jobs: int | None
) -> list[str]:
    """What `kdlib study` does; returns what failed. ValueError or FileNotFoundError, before
    anything runs, for what does not fit."""
    if profile not in PROFILES:
        raise ValueError(f"--profile: expected one of {PROFILES}, got {profile!r}")
    wrong = [pair for pair in pairs if "=" not in pair]
    if wrong:
        raise ValueError(f"--set: expected NAME=VALUE, got {wrong[0]!r}")
    extra = dict(pair.split("=", 1) for pair in pairs)
    for name in ("KDLIB_DATA", "KDLIB_CACHE"):
        if os.environ.get(name):
            os.environ[name] = str(Path(os.environ[name]).expanduser().absolute())
    runs = planned(names, profile, extra)
    for stem, parameters in runs.values():
        key(stem, parameters)  # finds the data, or says what is missing
    return run_all(runs, force, jobs or min(os.cpu_count() or 1, len(runs)))
