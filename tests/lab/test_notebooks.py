import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pandas as pd
import papermill as pm
import pytest
import yaml
from typer.testing import CliRunner

from kdlib.__main__ import app
from kdlib.lab import notebooks as study

NOTEBOOKS = sorted((study.ROOT / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
STEM = "03a_structured_distillation"


@each
def test_is_stored_clean(path):
    nb = nbformat.read(path, 4)
    code = [c for c in nb.cells if c.cell_type == "code"]
    assert all(not c.outputs and c.execution_count is None for c in code)
    assert (
        set(nb.metadata) == {"kernelspec", "language_info"}
        and nb.metadata.kernelspec.name == "python3"
    )
    assert all("id" not in c for c in nb.cells)


@each
def test_every_parameter_is_declared_with_help_and_used(path):
    nb = nbformat.read(path, 4)
    tagged = [c for c in nb.cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    lines = tagged[0].source.splitlines()
    declared = pm.inspect_notebook(path)
    assert len(declared) == len(lines), "papermill does not see every line"
    assert all(re.fullmatch(r"\w+: (int|float|str|bool) = [^=]+  # [^=]+", line) for line in lines)
    rest = "\n".join(c.source for c in nb.cells if c.cell_type == "code" and c is not tagged[0])
    assert all(re.search(rf"\b{name}\b", rest) for name in declared)
    for profile, sets in study.study()[path.stem].items():
        assert profile in study.PROFILES
        for parameters in sets:
            study.check(path.stem, parameters)


@each
def test_no_cell_overwrites_a_parameter(path):
    """What stands in the parameters cell is what the whole notebook means by the name."""
    declared = set(pm.inspect_notebook(path))
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", []):
            body = ast.parse(cell.source).body
            top = [t for node in body if isinstance(node, ast.Assign) for t in node.targets]
            names = {n.id for t in top for n in ast.walk(t) if isinstance(n, ast.Name)}
            assert not names & declared, cell.source


@each
def test_no_measured_number_stands_in_the_prose(path):
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "markdown":
            prose = re.sub(r"\]\([^)]*\)", "]", cell.source)  # without the links' targets
            assert not re.search(r"\b\d{2}\.\d+\b", prose), cell.source


@each
def test_a_chapter_is_short(path):
    """At most 160 lines of code beside the solutions, 1,450 words, median text cells of 65."""
    cells = nbformat.read(path, 4).cells
    code = [
        c for c in cells if c.cell_type == "code" and "solution" not in c.metadata.get("tags", [])
    ]
    lines = [line.strip() for c in code for line in c.source.splitlines()]
    assert sum(bool(line) and not line.startswith("#") for line in lines) <= 160
    words = [len(c.source.split()) for c in cells if c.cell_type == "markdown"]
    assert sum(words) <= 1450
    assert sorted(words)[len(words) // 2] <= 65


@each
def test_no_code_line_is_longer_than_100_characters(path):
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code":
            assert max(map(len, cell.source.splitlines())) <= 100, cell.source


@each
def test_its_pictures_links_and_claims_are_there(path):
    known = yaml.safe_load((study.ROOT / "notebooks" / "claims.yaml").read_text(encoding="utf8"))
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "markdown":
            links = re.findall(r"\]\((?!http)([^)#]+)\)", cell.source)
            assert [x for x in links if not (path.parent / x).exists()] == []
            told = re.findall(r"claims\.csv\): ((?:`\w+`(?:, )?)+)", cell.source)
            assert {name for names in told for name in re.findall(r"\w+", names)} <= known.keys()


@pytest.mark.notebook
@each
def test_runs_at_quick(path, tmp_path, quick_cache, monkeypatch):
    monkeypatch.setenv("KDLIB_CACHE", str(quick_cache))
    for parameters in study.study()[path.stem]["quick"]:
        extra = (
            {"figures": str(tmp_path / "figures")} if "figures" in study.declared(path.stem) else {}
        )
        study.run(path.stem, parameters | extra, tmp_path / path.name)


def test_a_notebook_that_reads_records_runs_again_when_they_change():
    for path in NOTEBOOKS:
        reads = "evidence.experiments()" in path.read_text(encoding="utf8")
        assert reads == bool(study.EXPERIMENTS & study.declared(path.stem).keys()), path.stem


def test_a_notebook_that_reads_a_bench_runs_again_when_it_changes(monkeypatch):
    def keys(changed):
        monkeypatch.setattr(study, "_sha", lambda file: f"{file.name} {file.name == changed}")
        return {p.stem: study.key(p.stem, {}) for p in NOTEBOOKS}

    before, after = keys(""), keys("updates.csv")
    differ = {stem for stem in before if before[stem] != after[stem]}
    text = {p.stem: p.read_text(encoding="utf8") for p in NOTEBOOKS}
    assert differ == {stem for stem in text if "updates.csv\\" in text[stem]} != set()


def test_study_lists_every_notebook():
    assert sorted(study.study()) == [p.stem for p in NOTEBOOKS]


def test_unknown_parameters_and_wrong_types_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"declares no parameter \['tempreature'\]"):
        study.run(STEM, {"tempreature": 4}, tmp_path / "x.ipynb")
    for name, value in (
        ("seeds", "three"),
        ("seeds", 2.5),
        ("seeds", True),
        ("alpha", "half"),
        ("one_teacher", "maybe"),
        ("dataset", 3),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            study.check(STEM, {name: value})
    assert study.check(STEM, {"seeds": "4", "alpha": "1e-1", "one_teacher": "true"}) == {
        "seeds": 4,
        "alpha": 0.1,
        "one_teacher": True,
    }


def small_study(tmp_path, monkeypatch, sources):
    """A study of its own: notebooks of one cell each."""
    (tmp_path / "notebooks").mkdir()
    for stem, source in sources.items():
        cells = [
            nbformat.v4.new_code_cell("x: int = 1  # a number"),
            nbformat.v4.new_code_cell(source),
        ]
        cells[0].metadata.tags = ["parameters"]
        nb = nbformat.v4.new_notebook(
            cells=cells,
            metadata={"kernelspec": {"name": "python3", "display_name": "x", "language": "python"}},
        )
        nbformat.write(nb, tmp_path / "notebooks" / f"{stem}.ipynb")
    (tmp_path / "notebooks" / "study.yaml").write_text(
        "".join(f"{stem}: {{}}\n" for stem in sources)
    )
    (tmp_path / "kdlib").mkdir()
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(study, "BUILD", tmp_path / "build")
    monkeypatch.setattr(study.plots, "gallery", lambda: None)
    (tmp_path / "README.md").write_text("no tables\n")
    (tmp_path / "notebooks" / "claims.yaml").write_text("{}\n")
    (tmp_path / "figures").mkdir()


@pytest.mark.notebook
def test_a_failing_notebook_is_reported_and_the_others_run(tmp_path, monkeypatch):
    small_study(
        tmp_path,
        monkeypatch,
        {"01_bad": "1 / 0", "02_good": f"open(r'{tmp_path}/log', 'a').write(str(x))"},
    )

    def command(*arguments):
        return CliRunner().invoke(app, ["study", *arguments])

    log = tmp_path / "log"
    done = command()
    assert done.exit_code == 1
    assert "FAILED 01_bad.default: cell 1: ZeroDivisionError: division by zero" in done.stderr
    assert re.search(r"02_good\.default +cell +2/2 +\d+ s +done", done.stdout)
    assert log.read_text() == "1"
    assert "skipped" in command().stdout and log.read_text() == "1"
    assert command("02", "--set", "x=5").exit_code == 0
    command("02", "--set", "x=5", "--force")
    assert log.read_text() == "155"
    assert [command("01").exit_code for _ in range(2)] == [
        1,
        1,
    ]  # a failed one is never 'unchanged'
    (tmp_path / "kdlib" / "__pycache__").mkdir()
    (tmp_path / "kdlib" / "__pycache__" / "new.pyc").write_text("z")
    assert "skipped" in command("02", "--set", "x=5").stdout
    (tmp_path / "kdlib" / "lab").mkdir()
    (tmp_path / "kdlib" / "lab" / "new.py").write_text("y = 1")
    command("02", "--set", "x=5")
    assert log.read_text() == "1555"


@pytest.mark.notebook
def test_what_was_deleted_or_changed_is_made_again_and_a_damaged_index_is_told(
    tmp_path, monkeypatch
):
    table = tmp_path / "figures" / "x" / "t.csv"
    small_study(tmp_path, monkeypatch, {"01_a": f"open(r'{table}', 'w').write('1')"})
    table.parent.mkdir()

    def command(*arguments):
        return CliRunner().invoke(app, ["study", *arguments])

    assert command().exit_code == 0 and "skipped" in command().stdout
    table.unlink()
    assert "skipped" not in command().stdout and table.exists()
    table.write_text("mine")
    assert "skipped" not in command().stdout and table.read_text() == "1"

    def gallery():
        raise json.JSONDecodeError("damaged", "{", 0)

    monkeypatch.setattr(study.plots, "gallery", gallery)
    done = command()
    assert done.exit_code == 1 and "FAILED figures/: JSONDecodeError: damaged" in done.stderr


@pytest.mark.notebook
def test_two_at_a_time_each_with_its_own_times_and_readers_last(tmp_path, monkeypatch):
    log = tmp_path / "log"
    spends = "from kdlib.lab import cache; cache.spent('training', {0}); "
    spends += f"open(r'{log}', 'a').write('{{0}}')"
    sources = {f"0{i}_x": spends.format(i) for i in (1, 2)}
    small_study(tmp_path, monkeypatch, {"00_reads": f"open(r'{log}', 'a').write('0')"} | sources)
    path = tmp_path / "notebooks" / "00_reads.ipynb"
    notebook = nbformat.read(path, 4)
    notebook.cells[0].source = 'results: str = "x"  # what others left'
    nbformat.write(notebook, path)
    monkeypatch.setattr(study, "EVERY", 0.01)
    done = CliRunner().invoke(app, ["study", "-j", "2"])
    assert done.exit_code == 0 and log.read_text() in ("120", "210")
    assert not os.environ.get(study.plots.BATCH)  # what starts later here is no batch run
    assert re.search(r"01_x\.default +cell +\d/2 +\d+ s +\.\.\.", done.stdout)
    rows = pd.read_csv(tmp_path / "figures" / "bench" / "study.csv").set_index(["run", "stage"])
    for i in (1, 2):
        assert rows.loc[(f"0{i}_x.default", "training"), "seconds"] == i


@pytest.mark.notebook
def test_a_kernel_that_dies_is_told_with_its_cell_and_the_others_run(tmp_path, monkeypatch):
    sources = {"01_dies": "import os; os._exit(9)", "02_good": "x + 1"}
    small_study(tmp_path, monkeypatch, sources)
    done = CliRunner().invoke(app, ["study"])
    assert done.exit_code == 1 and "FAILED 01_dies.default: cell 2: " in done.stderr
    assert re.search(r"02_good\.default .* done", done.stdout)


def test_quick_leaves_the_figures_alone_and_folders_are_made_absolute(tmp_path, monkeypatch):
    ((_, parameters),) = study.planned([STEM], "quick", {}).values()
    assert parameters["figures"] == str(study.BUILD / "figures")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bert").mkdir()
    own = {"figures": "f", "encoder": "bert"}
    ((_, parameters),) = study.planned([STEM], "default", own).values()
    assert parameters == {"figures": str(tmp_path / "f"), "encoder": str(tmp_path / "bert")}
    ((_, parameters),) = study.planned([STEM], "default", {"encoder": "some/hub-name"}).values()
    assert parameters == {"encoder": "some/hub-name", "figures": str(study.ROOT / "figures")}
    given = {"text": "t.txt", "out": "o", "gold": ""}
    ((_, parameters),) = study.planned(["06_distil_your_own"], "default", given).values()
    there = {"text": str(tmp_path / "t.txt"), "out": str(tmp_path / "o"), "gold": ""}
    assert parameters == there | {"figures": str(study.ROOT / "figures")}
    with pytest.raises(ValueError, match=r"--profile full: no run '00_start_here'"):
        study.planned(["00_start_here"], "full", {})


def test_one_parameter_set_can_be_asked_for_by_the_name_of_its_run():
    whole = study.planned(["03a"], "full", {})
    assert len(whole) > 2 and all(name.startswith("03a_structured_dist") for name in whole)
    for name, run in whole.items():
        assert study.planned([name], "full", {}) == {name: run}
    both = list(study.planned(["03a", "00"], "default", {}))
    assert both == ["03a_structured_distillation.default", "00_start_here.default"]


def test_a_run_depends_on_its_local_models_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = study.key(STEM, {"encoder": str(tmp_path)})
    assert study.key(STEM, {"encoder": str(tmp_path)}) == before
    (tmp_path / "config.json").write_text("{ }")
    assert study.key(STEM, {"encoder": str(tmp_path)}) != before


def test_ctrl_c_is_one_line(monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "command", interrupted)
    done = CliRunner().invoke(app, ["study"])
    assert done.exit_code == 130
    assert done.stderr == "stopped; the same command goes on from here\n"


def test_outside_a_checkout_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "ROOT", tmp_path)
    done = CliRunner().invoke(app, ["study"], env={"COLUMNS": "300"})
    assert done.exit_code == 2 and "come with a checkout" in done.stderr


@pytest.mark.notebook
def test_two_studies_in_one_folder_do_not_share_sockets(tmp_path, monkeypatch):
    small_study(tmp_path, monkeypatch, {"01_a": "import time; time.sleep(2)", "02_b": "x + 1"})
    with ThreadPoolExecutor() as pool:
        outs = [pool.submit(study.run, s, {}, tmp_path / f"{s}.ipynb") for s in ("01_a", "02_b")]
        assert all(out.result(timeout=120).exists() for out in outs)
    assert not list((tmp_path / "notebooks").glob("kernel*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["07"], "no run '07'"),
        (["03", "--set", "nope=1"], "declares no parameter"),
        (["--set", "x"], "expected NAME=VALUE, got 'x'"),
        (["03", "--set", "dataset=no"], "no data set"),
    ],
)
def test_the_command_line_refuses_what_it_does_not_know(arguments, message):
    done = CliRunner().invoke(app, ["study", *arguments], env={"COLUMNS": "200"})
    assert done.exit_code == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_the_command_line_explains_itself():
    command = [sys.executable, "-m", "kdlib"]
    for name, word in (("study", "NAME=VALUE"), ("bench", "surrogates")):
        done = subprocess.run([*command, name, "--help"], capture_output=True, text=True)
        assert done.returncode == 0 and word in done.stdout


def test_what_kdlib_needs_is_declared_and_pinned():
    """`pip install .` brings it; requirements.txt holds the versions of the committed numbers."""
    project = tomllib.loads((study.ROOT / "pyproject.toml").read_text())["project"]
    lines = (study.ROOT / "requirements.txt").read_text().splitlines()
    pinned = {re.split(r"[<>=\s]", line)[0] for line in lines}
    pulled_in = {"ipython", "nbformat", "numpy", "tokenizers", "traitlets"}
    assert set(project["dependencies"]) - pulled_in <= pinned
    names = {"IPython": "ipython", "yaml": "pyyaml", "huggingface_hub": "huggingface_hub"}
    bench = {"spacy", "presidio_analyzer", "haystack", "torchcrf", "torch_struct", "datasets"}
    used = set()
    for file in (study.ROOT / "kdlib").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        found = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
        found += [n.module for n in nodes if isinstance(n, ast.ImportFrom)]
        found = [name.split(".")[0] for name in found]
        used |= set(found) - sys.stdlib_module_names - bench - {"kdlib"}
    assert {names.get(u, u) for u in used} <= {d.replace("-", "_") for d in project["dependencies"]}


def test_the_readmes_test_command_is_cis():
    readme = (study.ROOT / "README.md").read_text(encoding="utf8")
    blocks = re.findall(r"^```bash\n(.*?)^```", readme, re.S | re.M)
    assert "python -m kdlib study" in blocks[0] and "python -m pytest" in blocks[1]
    ci = (study.ROOT / ".ci" / "run").read_text(encoding="utf8")
    assert blocks[1].strip() in ci


def test_the_gallery_is_made_of_what_lies_in_figures():
    """And prints its tables from their files: nothing in it is typed."""
    figures = study.ROOT / "figures"
    assert (figures / "README.md").read_text(encoding="utf8") == study.plots.page(figures)
    for index in figures.glob("*/index.json"):
        for stem, entry in json.loads(index.read_text(encoding="utf8")).items():
            assert (index.parent / f"{stem}.csv").exists()
            assert (index.parent / f"{stem}.svg").exists() is entry["figure"]


@pytest.mark.parametrize("page", ["README.md", "data/README.md", "figures/README.md"])
def test_no_link_of_a_page_is_broken(page):
    file = study.ROOT / page
    links = re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", file.read_text(encoding="utf8"))
    assert [link for link in links if not (file.parent / link).exists()] == []


def test_the_readmes_python_runs(capsys):
    readme = (study.ROOT / "README.md").read_text(encoding="utf8")
    for snippet in re.findall(r"^```python\n(.*?)^```", readme, re.S | re.M):
        exec(compile(snippet, "README.md", "exec"), {})
    assert "pseudo-labels" in capsys.readouterr().out
