"""What a reader sees: JupyterLab, the site and the slides in a real browser, Debian's chromium.

Screenshots are left in build/browser/.
"""

import os
import re
import shutil
import subprocess
import sys
import time

import nbformat
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from kdlib.lab import notebooks, pages
from kdlib.text.files import ROOT

driver = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium here (apt-get install chromium)"),
]
STEMS = sorted(notebooks.study())
SHOTS = ROOT / "build" / "browser"
# Every cell is drawn, also those that are scrolled out of sight.
SETTINGS = '{"windowingMode": "none"}'
# A command given before the kernel is connected is lost.
READY = """() => { const session = window.jupyterapp.shell.currentWidget.sessionContext;
    const kernel = session.isReady && session.session.kernel;
    return kernel && kernel.connectionStatus === "connected" && kernel.status === "idle" }"""
# The cells of code that have not run to their end.
WAITING = """() => [...window.jupyterapp.shell.currentWidget.content.widgets]
    .filter(cell => cell.model.type === "code" && cell.model.sharedModel.source.trim())
    .filter(cell => !cell.model.executionCount || cell.model.executionState === "running").length"""
ERRORS = """() => [...window.jupyterapp.shell.currentWidget.content.model.cells]
    .filter(cell => cell.type === "code")
    .flatMap(cell => cell.outputs.toJSON().filter(out => out.output_type === "error"))
    .map(out => out.ename + ": " + out.evalue)"""
CUT = """() => [...document.querySelectorAll(".jp-CodeCell .cm-scroller")]
    .filter(box => box.scrollWidth > box.clientWidth + 1)
    .map(box => box.innerText.slice(0, 200))"""
BROKEN = "() => [...document.images].filter(i => !i.naturalWidth).map(i => i.src)"
FLAT = "() => [...document.querySelectorAll('math')].filter(m => !m.clientHeight).length"
STILL = ["in I-X"]  # 03a: no sentence may begin with I, whatever its score
# Not awaited: a command that never ends would hang the test.
COMMAND = "name => { window.jupyterapp.commands.execute(name) }"


@pytest.fixture(scope="module")
def page():
    """A window of 1,400 x 900 points."""
    with driver.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": 1400, "height": 900})
        browser.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory, quick_cache):
    """The address of a JupyterLab on copies of the notebooks, their quick parameters set, and the
    folder of the copies."""
    home = tmp_path_factory.mktemp("lab")
    for name in ("figures", "data"):
        (home / name).symlink_to(ROOT / name)
    (home / "notebooks").mkdir()
    for stem in STEMS:
        nb = load_notebook_node(str(ROOT / "notebooks" / f"{stem}.ipynb"))
        quick = notebooks.check(stem, notebooks.study()[stem]["quick"][0])
        nbformat.write(parameterize_notebook(nb, quick), home / "notebooks" / f"{stem}.ipynb")
    settings = home / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    (settings / "tracker.jupyterlab-settings").write_text(SETTINGS)
    own = {"JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "KDLIB_CACHE": str(quick_cache)}
    own |= {"JUPYTERLAB_WORKSPACES_DIR": str(home / "spaces"), "JUPYTER_TOKEN": "t"}
    own |= {"JUPYTER_RUNTIME_DIR": str(home / "runtime"), "OMP_NUM_THREADS": "1"}
    options = ["--no-browser", "--allow-root", "--ServerApp.port=0", "--ServerApp.token=t"]
    options += ["--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={home}"]
    log = home / "lab.log"
    command = [sys.executable, "-m", "jupyter", "lab", *options]
    with (
        log.open("w") as said,
        subprocess.Popen(command, env=os.environ | own, stderr=said) as server,
    ):
        try:
            for _ in range(240):
                if found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text()):
                    break
                time.sleep(0.5)
            assert found, log.read_text()
            yield found[0], home / "notebooks"
        finally:
            server.terminate()


def shown(page, name):
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png")


def moved(page):
    """Move every control of the open notebook once; the labels of those whose picture changed, and
    of those whose picture did not."""
    told = {True: [], False: []}
    for box in page.locator(".widget-vbox:has(.widget-html)").all():
        picture = box.locator(".widget-html")
        for control in box.locator(".widget-slider, .widget-dropdown, .widget-text").all():
            before = picture.inner_html()
            if control.locator("select").count():
                control.locator("select").select_option(index=1)
            elif control.locator("input[type=text]").count():
                control.locator("input").fill("Ada Lovelace lives in Berlin .")
                control.locator("input").press("Enter")
            else:
                handle = control.locator(".noUi-handle")
                now, end = (handle.get_attribute(f"aria-value{which}") for which in ("now", "max"))
                handle.press("ArrowLeft" if now == end else "ArrowRight")
            changed = next((True for _ in range(300) if differs(page, picture, before)), False)
            told[changed].append(control.locator(".widget-label").inner_text())
            assert not picture.locator("pre").count(), picture.inner_text()  # an error
    return told[True], told[False]


def differs(page, picture, before):
    page.wait_for_timeout(100)
    return picture.inner_html() != before


@pytest.mark.parametrize("stem", STEMS)
def test_a_notebook_opens_runs_and_answers_in_jupyterlab(stem, lab, page):
    """Run All ends without an error; each control moves its picture; no code line is cut."""
    address, folder = lab
    page.goto(f"{address}/lab/tree/notebooks/{stem}.ipynb?token=t&reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    page.wait_for_function(READY, timeout=120_000)
    page.evaluate(COMMAND, "notebook:run-all-cells")
    page.wait_for_function(f"({WAITING})() === 0 || ({ERRORS})().length", timeout=300_000)
    assert page.evaluate(ERRORS) == []
    assert page.evaluate(CUT) == []
    source = (folder / f"{stem}.ipynb").read_text(encoding="utf8")
    if "plots.live(" in source or "plots.side_by_side(" in source:
        page.wait_for_selector(".widget-html")
        answered, dumb = moved(page)
        assert answered
        assert set(dumb) <= set(STILL)
    shown(page, stem)
    page.evaluate(COMMAND, "docmanager:save")
    page.evaluate(COMMAND, "kernelmenu:shutdown")
    page.wait_for_timeout(2000)  # both are on their way before the next notebook opens


def test_the_site_and_the_slides_need_no_network(lab, page, tmp_path, monkeypatch):
    """Formulas and figures are drawn from what lies in the folder."""
    page.goto("about:blank")  # JupyterLab goes on asking its server
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    (tmp_path / "build").mkdir()
    for stem in STEMS:
        shutil.copy(lab[1] / f"{stem}.ipynb", tmp_path / "build" / f"{stem}.default.ipynb")
    monkeypatch.setattr(notebooks, "BUILD", tmp_path / "build")
    pages.site(tmp_path / "site")
    pages.teach(tmp_path / "class")
    for file in [*sorted((tmp_path / "site").glob("*.html")), tmp_path / "class" / "slides.html"]:
        page.goto(file.as_uri(), wait_until="load")
        assert page.evaluate(BROKEN) == [], file.name
        assert page.evaluate(FLAT) == 0, file.name
        shown(page, f"site_{file.stem}")
    page.goto((tmp_path / "site" / "03a_structured_distillation.html").as_uri())
    assert page.locator("math").count() > 20
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
