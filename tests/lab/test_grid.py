"""notebooks/Snakefile: the study as jobs that share the runner's keys, cache and records."""

import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
import yaml

from kdlib.text.files import ROOT

pytest.importorskip("snakemake")
OWN = {"corpus": "demo", "methods": ["student alone", "pseudo-labels"], "updates": [1]}
OWN |= {"seeds": 2, "labelled": 6, "transfer": 6, "dev": 2, "test": 4, "teacher_updates": 1}


def snakemake(home, *arguments, **config):
    """Run it on the project in a folder; returns what it said."""
    command = [sys.executable, "-m", "snakemake", "-s", str(home / "notebooks" / "Snakefile")]
    told = [f"{name}={value}" for name, value in config.items()]
    done = subprocess.run(
        [*command, *arguments, "--config", *told],
        cwd=home,
        env=os.environ | {"PYTHONPATH": str(home)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def home(tmp_path):
    """A project with this kdlib, two notebooks of one line and an experiment of six runs."""
    shutil.copytree(ROOT / "kdlib", tmp_path / "kdlib")
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "figures").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "demo").symlink_to(ROOT / "data" / "demo")
    shutil.copy(ROOT / "notebooks" / "Snakefile", tmp_path / "notebooks")
    for stem, line in (("01_writes", "x + 1"), ("00_reads", "results")):
        first = nbformat.v4.new_code_cell("x: int = 1  # a number")
        if stem == "00_reads":
            first.source = 'results: str = "../figures"  # what others left'
        first.metadata.tags = ["parameters"]
        nb = nbformat.v4.new_notebook(cells=[first, nbformat.v4.new_code_cell(line)])
        nb.metadata.kernelspec = {"name": "python3", "display_name": "x", "language": "python"}
        nbformat.write(nb, tmp_path / "notebooks" / f"{stem}.ipynb")
    sets = {"01_writes": {"full": [{"x": 2}, {"x": 3}]}, "00_reads": {}}
    (tmp_path / "notebooks" / "study.yaml").write_text(yaml.safe_dump(sets))
    (tmp_path / "notebooks" / "evidence.yaml").write_text(yaml.safe_dump({"own": OWN}))
    (tmp_path / "notebooks" / "claims.yaml").write_text("{}\n")
    (tmp_path / "README.md").write_text("no tables\n")
    return tmp_path


@pytest.mark.notebook
def test_a_grid_of_jobs_fills_records_and_notebooks_and_has_nothing_left_to_do(home):
    """Jobs go to a cluster of one machine: each job's script is handed to a shell of its own."""
    (home / "submit.sh").write_text('nohup sh "$1" > "$1.log" 2>&1 &\necho $!\n')
    cluster = ["--executor", "cluster-generic", "--seconds-between-status-checks", "1"]
    cluster += ["--cluster-generic-submit-cmd", f"sh {home}/submit.sh"]
    snakemake(home, "-j", "2", *cluster, experiments="own")
    records = (home / "data" / "runs" / "demo.jsonl").read_text().splitlines()
    assert len(records) == 1 + 2 * 2 + 4  # test set, teachers, doubts, two methods of two seeds
    assert {f.name for f in (home / "build").glob("*.key")} == {
        "00_reads.default.key",
        "01_writes.default.key",
    }
    assert "Nothing to be done" in snakemake(home, "-j", "2", experiments="own")


def test_a_plan_has_a_job_a_parameter_set_and_a_cell_and_teachers_come_first(home):
    said = snakemake(home, "-n", "-p", profile="full", experiments="own")
    assert re.search(r"notebook +2\b", said) and re.search(r"cell +3\b", said)
    first = said.index("--method teacher")
    assert first < said.index("--method pseudo-labels")
    said = snakemake(home, "-n", "-p", profile="full", only="01_writes.full.2")
    assert re.search(r"notebook +1\b", said) and "cell" not in said
