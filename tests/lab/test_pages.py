import re
import shutil

import nbformat
import pytest
from typer.testing import CliRunner

from kdlib.__main__ import app
from kdlib.lab import notebooks, pages
from kdlib.text.files import ROOT

FETCHED = re.compile(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="https?:')


def broken(folder):
    """Links of the pages in a folder to files that are not there."""
    return [
        (page.name, target)
        for page in folder.glob("*.html")
        for _, target, _ in pages.LINK.findall(page.read_text(encoding="utf8"))
        if not (folder / target).exists()
    ]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The site of the notebooks as they are stored, in place of executed ones."""
    home = tmp_path_factory.mktemp("pages")
    for file in (ROOT / "notebooks").glob("*.ipynb"):
        shutil.copy(file, home / f"{file.stem}.default.ipynb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(notebooks, "BUILD", home)
        pages.site(home / "site", "https://github.com/someone/study")
    return home / "site"


def test_every_link_of_the_site_leads_somewhere_and_nothing_is_fetched(written):
    assert broken(written) == []
    names = {page.stem for page in written.glob("*.html")}
    assert names == {"index", "figures", "data", "api", *notebooks.study()}
    for page in written.glob("*.html"):
        assert not FETCHED.search(page.read_text(encoding="utf8")), page.name


def test_formulas_are_mathml_and_code_stays_code(written):
    text = (written / "03a_structured_distillation.html").read_text(encoding="utf8")
    assert text.count("<math") > 20 and "$$" not in text
    assert pages._mathml("`$x$` costs $5 and $y^2$") == "`$x$` costs $5 and $y^2$".replace(
        "$y^2$", pages.convert("y^2")
    )


def test_the_api_has_every_loss_with_its_equation(written):
    text = (written / "api.html").read_text(encoding="utf8")
    assert 'id="losses"' in text and "MSD" in text and "structural(" in text


def test_the_repositorys_address_is_one_setting(written):
    text = (written / "03a_structured_distillation.html").read_text(encoding="utf8")
    where = "someone/study/blob/main/notebooks/03a_structured_distillation.ipynb"
    assert f"https://colab.research.google.com/github/{where}" in text


def test_without_executed_notebooks_the_site_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "BUILD", tmp_path)
    done = CliRunner().invoke(app, ["site", str(tmp_path / "x")], env={"COLUMNS": "300"})
    assert done.exit_code == 2 and "kdlib study" in done.stderr
    assert not (tmp_path / "x").exists()


def test_a_link_to_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="README.md links to no/such.md"):
        pages._linked('<a href="no/such.md">x</a>', ROOT / "README.md", tmp_path)
    shown = '<pre>HTML(value=&lt;img src="no/such.png"&gt;)</pre>'  # a cell's text, no tag
    assert pages._linked(shown, ROOT / "README.md", tmp_path) == shown


def test_a_class_has_notebooks_with_and_without_solutions(tmp_path):
    done = CliRunner().invoke(app, ["teach", str(tmp_path / "class")])
    assert done.exit_code == 0
    for file in (ROOT / "notebooks").glob("*.ipynb"):
        own, theirs = (
            nbformat.read(tmp_path / "class" / name / file.name, 4)
            for name in ("solutions", "students")
        )
        solved = [i for i, c in enumerate(own.cells) if "solution" in c.metadata.get("tags", [])]
        assert all(theirs.cells[i].source == "# your answer" for i in solved)
        rest = [i for i in range(len(own.cells)) if i not in solved]
        assert all(own.cells[i].source == theirs.cells[i].source for i in rest)
        for cell in (c for c in own.cells if c.cell_type == "markdown"):
            for link in re.findall(r"\]\((?!http)([^)#]+)\)", cell.source):
                assert (tmp_path / "class" / "solutions" / link).exists(), link
    slides = (tmp_path / "class" / "slides.html").read_text(encoding="utf8")
    assert slides.count('<section class="slide">') >= 5 and not FETCHED.search(slides)
    assert broken(tmp_path / "class") == []
