"""The study as pages that need no network: a site of the executed notebooks, and what a class
needs. Formulas become MathML, which browsers draw by themselves."""

import base64
import html
import importlib
import inspect
import os
import re
import shutil
from pathlib import Path

import mistune
import nbformat
import pandas as pd
from latex2mathml.converter import convert
from nbconvert import HTMLExporter

from kdlib.lab import notebooks
from kdlib.text.files import ROOT, saving, write_text

PAGES = {"README.md": "index", "figures/README.md": "figures", "data/README.md": "data"}
FACE = ("crf", "losses", "methods", "batches", "models", "twin_tower", "lab.study", "ship.runtime")
FORMULA = re.compile(
    r"(```.*?```|`[^`]*`)|\$\$(.+?)\$\$|(?<![\\$\w])\$(?=\S)([^$\n]+?)(?<=\S)\$", re.DOTALL
)
LINK = re.compile(r'(<\w[^<>]*\s(?:href|src)=")(?!https?:|data:|mailto:|#)([^"#]+)(#[^"]*)?"')
STYLE = """
body { max-width: 56rem; margin: 2rem auto; padding: 0 1rem; line-height: 1.5; color: #222;
       font-family: system-ui, sans-serif }
nav a { margin-right: 1rem } img, svg { max-width: 100% } table { border-collapse: collapse }
td, th { border: 1px solid #ddd; padding: .2rem .5rem } blockquote { color: #555 }
pre { background: #f6f6f6; padding: .6rem; overflow-x: auto; font-size: .85rem }
section.slide { min-height: 95vh; scroll-snap-align: start; text-align: center }
.jp-InputPrompt, .jp-OutputPrompt, .anchor-link { display: none }
"""


def site(out: Path, repository: str = "") -> Path:
    """Write the executed notebooks, README, gallery, data page and an API page into `out`, with
    every file they link to; returns its index.html. With the repository's address (such as
    https://github.com/NAME/PROJECT) each notebook links to Colab and Binder.

    FileNotFoundError where `kdlib study` has not run, or a page links to what is not there.
    """
    stems = sorted(notebooks.study())
    executed = {stem: notebooks.BUILD / f"{stem}.default.ipynb" for stem in stems}
    missing = [stem for stem, file in executed.items() if not file.exists()]
    if missing:
        raise FileNotFoundError(f"expected executed notebooks, got none of {missing}: kdlib study")
    listed = [("index", "the study"), *((s, s[:3].strip("_")) for s in stems)]
    listed += [("figures", "figures"), ("data", "data"), ("api", "API")]
    nav = "".join(f'<a href="{name}.html">{title}</a>' for name, title in listed)
    with saving(out) as folder:
        for source, name in PAGES.items():
            text = (ROOT / source).read_text(encoding="utf8")
            body = _linked(_markdown(text), ROOT / source, folder)
            write_text(folder / f"{name}.html", _page(name, body, nav))
        for stem, file in executed.items():
            body = _linked(_notebook(file), ROOT / "notebooks" / file.name, folder)
            write_text(folder / f"{stem}.html", _page(stem, _open_in(stem, repository) + body, nav))
        write_text(folder / "api.html", _page("API", _api(), nav))
    return Path(out) / "index.html"


def teach(out: Path) -> Path:
    """Write what a class needs into `out`: the notebooks without their solutions, and with them,
    the 90-minute path as a page, slides of the findings; returns the page."""
    with saving(out) as folder:
        for file in sorted((ROOT / "notebooks").glob("*.ipynb")):
            for name, kept in (("students", False), ("solutions", True)):
                nb = nbformat.read(file, 4)
                for cell in nb.cells:
                    if not kept and "solution" in cell.metadata.get("tags", []):
                        cell.source = "# your answer"
                    back = os.path.relpath(ROOT, Path(out).absolute() / name)
                    cell.source = re.sub(r"\]\(\.\./", f"]({back}/", cell.source)
                (folder / name).mkdir(exist_ok=True)
                nbformat.write(nb, folder / name / file.name)
        lesson = (ROOT / "notebooks" / "class.md").read_text(encoding="utf8")
        write_text(folder / "index.html", _page("A class of 90 minutes", _markdown(lesson)))
        write_text(folder / "slides.html", _page("What we found", _slides()))
    return Path(out) / "index.html"


def _slides() -> str:
    """One slide a figure of the claims: the figure, what it shows, the number."""
    told = pd.read_csv(ROOT / "figures" / "claims.csv")
    slides = []
    for figure, own in told.groupby("figure", sort=False):
        svg = base64.b64encode((ROOT / "figures" / figure).read_bytes()).decode()
        lines = [
            f"<p>{html.escape(r.says)} {r.difference:+.2f} [{r.low:.2f}, {r.high:.2f}], "
            f"{r.verdict}</p>"
            for r in own.itertuples()
        ]
        alt = html.escape(own["says"].iloc[0], quote=True)
        picture = f'<img alt="{alt}" src="data:image/svg+xml;base64,{svg}">'
        slides.append(f'<section class="slide">{"".join(lines)}{picture}</section>')
    return "<style>html { scroll-snap-type: y mandatory }</style>" + "".join(slides)


def _page(title: str, body: str, nav: str = "") -> str:
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body><nav>{nav}</nav>{body}</body>'


def _mathml(text: str) -> str:
    """Markdown with its formulas, those in code left alone, as MathML."""

    def drawn(found: re.Match) -> str:
        code, block, inline = found.groups()
        if code:
            return code
        return convert(block or inline, display="block" if block else "inline").replace("\n", " ")

    return FORMULA.sub(drawn, text)


def _markdown(text: str) -> str:
    return mistune.create_markdown(escape=False, plugins=["table"])(_mathml(text))


def _notebook(file: Path) -> str:
    nb = nbformat.read(file, 4)
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = _mathml(cell.source)
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(nb)
    return body


def _linked(body: str, source: Path, folder: Path) -> str:
    """The same page with its links to files of the checkout turned to pages of the site, or to
    copies in it."""

    def turned(found: re.Match) -> str:
        begins, target, place = found.groups()
        file = (source.parent / target).resolve()
        if not file.exists() or not file.is_relative_to(ROOT):
            raise FileNotFoundError(f"{source.name} links to {target}: expected a file there")
        inside = str(file.relative_to(ROOT))
        if inside in PAGES:
            return f'{begins}{PAGES[inside]}.html{place or ""}"'
        if file.suffix == ".ipynb":
            return f'{begins}{file.stem}.html"'
        if inside.startswith("kdlib"):
            return f'{begins}api.html"'
        copy = folder / "files" / inside
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.exists():
            shutil.copy(file, copy)
        return f'{begins}files/{inside}"'

    return LINK.sub(turned, body)


def _open_in(stem: str, repository: str) -> str:
    owner = repository.removeprefix("https://github.com/").strip("/")
    if not owner:
        return ""
    path = f"notebooks/{stem}.ipynb"
    colab = f"https://colab.research.google.com/github/{owner}/blob/main/{path}"
    binder = f"https://mybinder.org/v2/gh/{owner}/main?labpath={path}"
    return f'<p><a href="{colab}">Open in Colab</a> · <a href="{binder}">on Binder</a></p>'


def _api() -> str:
    """What is public in the modules one reads first, by signature and docstring."""
    body = [
        f"<h1>API</h1><pre>{html.escape(inspect.getdoc(importlib.import_module('kdlib')))}</pre>"
    ]
    for name in FACE:
        module = importlib.import_module(f"kdlib.{name}")
        told = html.escape(inspect.getdoc(module) or "")
        body.append(f'<h2 id="{name}">kdlib.{name}</h2><p>{told}</p>')
        for public, item in vars(module).items():
            own = getattr(item, "__module__", None) == module.__name__
            if (
                public.startswith("_")
                or not own
                or not (inspect.isroutine(item) or inspect.isclass(item))
            ):
                continue
            try:
                signature = str(inspect.signature(item))
            except ValueError:
                signature = "(…)"
            about = html.escape(f"{public}{signature}\n\n{inspect.getdoc(item) or ''}")
            body.append(f"<pre>{about}</pre>")
    return "".join(body)
