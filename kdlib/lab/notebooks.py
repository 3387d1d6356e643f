"""Run the notebooks in batch: what `kdlib study` does.

A notebook that ran before with the same code, data and parameters is not run again. One that fails
is reported with its cell and error, and the others still run.
"""

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


class _Reporting(NBClientEngine):
    """Papermill's own engine, which also says which cell it is in."""

    at = 0

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **kwargs: Any) -> None:
        began, total, start = time.perf_counter(), len(nb_man.nb.cells), nb_man.cell_start

        def cell_start(cell: Any, cell_index: int | None = None, **more: Any) -> None:
            start(cell, cell_index, **more)
            _Reporting.at = (cell_index or 0) + 1
            if sys.stdout.isatty():
                _line(
                    nb_man.nb.metadata["kdlib_name"],
                    _Reporting.at,
                    total,
                    time.perf_counter() - began,
                    end="\r",
                )

        nb_man.cell_start = cell_start
        super().execute_managed_notebook(nb_man, kernel_name, **kwargs)


papermill_engines.register("kdlib", _Reporting)


def _line(
    name: str, at: int, total: int, seconds: float, end: str = "\n", result: str = ""
) -> None:
    print(f"{name:42} cell {at:>2}/{total}  {seconds:6.0f} s  {result}", end=end, flush=True)


def study() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """notebooks/study.yaml: notebook -> profile -> list of parameter sets."""
    rows = yaml.safe_load((ROOT / "notebooks" / "study.yaml").read_text(encoding="utf8"))
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
    files = [ROOT / "notebooks" / f"{stem}.ipynb", *_sources()]
    for name in (used.get(parameter, "").strip("'\"") for parameter in ("dataset", "unseen")):
        files += filter(None, locate(name) if name else [])
    for name in (used.get(parameter, "").strip("'\"") for parameter in ("encoder", "teacher")):
        files += sorted(f for f in Path(name).glob("*") if f.is_file()) if name[:1] == "/" else []
    if "results" in used:
        files += sorted(
            (ROOT / "figures").glob("*/[0-9][0-9]_table*.csv")
        )  # what other notebooks have left to read
    if "ladders" in used:
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
    parameters, _Reporting.at = check(stem, parameters), 0
    source = ROOT / "notebooks" / f"{stem}.ipynb"
    out.parent.mkdir(parents=True, exist_ok=True)
    notebook = nbformat.read(source, 4)
    notebook.metadata["kdlib_name"] = out.stem
    with replacing(out.with_suffix(".input.ipynb")) as aside:
        nbformat.write(notebook, aside)
    began, total = time.perf_counter(), len(notebook.cells)
    os.environ[plots.BATCH] = "1"  # the kernel inherits it
    try:
        with tempfile.TemporaryDirectory() as sockets:
            pm.execute_notebook(
                out.with_suffix(".input.ipynb"),
                out,
                parameters,
                engine_name="kdlib",
                kernel_name="python3",
                cwd=source.parent,
                progress_bar=False,
                config=_transport(sockets),
            )
    except BaseException:
        _line(out.stem, _Reporting.at, total, time.perf_counter() - began, result="FAILED")
        raise
    finally:
        out.with_suffix(".input.ipynb").unlink(missing_ok=True)
        del os.environ[plots.BATCH]
    _line(out.stem, total, total, time.perf_counter() - began, result="done")
    return out


def planned(
    stems: list[str], profile: str, extra: Mapping[str, Any]
) -> dict[str, tuple[str, dict[str, Any]]]:
    """Run name -> (notebook, checked parameters), everything checked before anything runs;
    ValueError for what does not fit."""
    rows = study()
    runs: dict[str, tuple[str, dict[str, Any]]] = {}
    for stem in stems:
        for i, parameters in enumerate(rows[stem].get(profile, [])):
            name = f"{stem}.{profile}" + (f".{i + 1}" if i else "")
            aside = {"figures": str(BUILD / "figures")} if profile == "quick" else {}
            aside = {name: value for name, value in aside.items() if name in declared(stem)}
            runs[name] = stem, _absolute(check(stem, parameters | aside | dict(extra)))
    if not runs:
        raise ValueError(f"--profile: expected one that {stems} have, got {profile!r}")
    return runs


def _absolute(parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters with folders of the user's own by their whole path: notebooks run in theirs.

    A data set is a folder where it is no known name, an encoder or teacher where there is one.
    """
    found = dict(parameters)
    for name in {"dataset", "unseen", "encoder", "teacher", "figures"} & parameters.keys():
        value = parameters[name]
        folder = Path(value).expanduser()
        data = name in ("dataset", "unseen") and value not in (*NAMES, "")
        if data or name == "figures" or (name in ("encoder", "teacher") and folder.is_dir()):
            found[name] = str(folder.absolute())
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
    said = json.loads(stamp.read_text(encoding="utf8"))
    left = said["wrote"].items()
    return said["key"] == content and all(Path(f).exists() and _sha(Path(f)) == d for f, d in left)


def run_all(runs: Mapping[str, tuple[str, dict[str, Any]]], force: bool) -> list[str]:
    """Run what was planned; returns what failed, one line each."""
    failures, seconds = [], {}
    for name, (stem, parameters) in runs.items():
        out, stamp = BUILD / f"{name}.ipynb", BUILD / f"{name}.key"
        content = key(stem, parameters)
        if not force and _unchanged(stamp, out, content):
            print(
                f"{name:42} nothing has changed since it ran: skipped (--force runs it)", flush=True
            )
            continue
        stamp.unlink(missing_ok=True)
        began, noted, since = time.perf_counter(), _spent(), time.time()
        try:
            run(stem, parameters, out)
            said = {"key": content, "wrote": _written(parameters, since)}
            write_text(stamp, json.dumps(said))
            seconds[name] = _stages(time.perf_counter() - began, _spent()[len(noted) :])
        except pm.PapermillExecutionError as error:
            failures.append(
                f"{name}: cell {error.cell_index}: {error.ename}: {error.evalue} (see {out})"
            )
        except Exception as error:  # a dead kernel, say: reported, and the others still run
            failures.append(
                f"{name}: cell {_Reporting.at}: {type(error).__name__}: {error} (see {out})"
            )
    try:
        if seconds:
            _write_times(seconds)
        plots.gallery()
        update_readme(ROOT / "README.md", claims.write(ROOT))
    except (OSError, ValueError, KeyError) as error:  # a damaged index, say
        failures.append(f"figures/: {type(error).__name__}: {error}")
    return failures


def _spent() -> list[str]:
    """What `cache.spent` has noted so far."""
    log = cache.folder() / "spent.csv"
    return log.read_text(encoding="utf8").splitlines() if log.exists() else []


def _stages(wall: float, lines: list[str]) -> dict[str, float]:
    """Seconds by stage of a run; the rest are figures, toy examples, starting the kernel."""
    stages: dict[str, float] = {}
    for stage, seconds in (line.rsplit(",", 1) for line in lines):
        stages[stage] = stages.get(stage, 0.0) + float(seconds)
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


def matching(asked: list[str], known: list[str]) -> list[str]:
    """Notebooks by name or by the beginning of it ('03'); ValueError for one that is not there."""
    if not asked:
        return known
    for a in asked:
        if not any(stem.startswith(a) for stem in known):
            raise ValueError(f"no notebook {a!r}: expected the beginning of one of {known}")
    return [stem for stem in known if any(stem.startswith(a) for a in asked)]


def command(names: list[str], profile: str, pairs: list[str], force: bool) -> list[str]:
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
    runs = planned(matching(names, list(study())), profile, extra)
    for stem, parameters in runs.values():
        key(stem, parameters)  # finds the data, or says what is missing
    return run_all(runs, force)
