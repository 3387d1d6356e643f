"""Figures and tables as files, and the few pictures that several notebooks draw.

Teacher grey, student alone blue, distilled orange and its neighbours: a method has the same colour
everywhere.
"""

import base64
import io
import itertools
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import transformers
from IPython.display import HTML, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression
from torch import Tensor

import kdlib
from kdlib.lab import cache, scores, tables
from kdlib.losses import Surrogates
from kdlib.methods import METHODS
from kdlib.models import Tagger
from kdlib.text.corpora import Parts, printable
from kdlib.text.files import ROOT, replacing, write_text
from kdlib.text.tags import Span

BATCH = "KDLIB_BATCH"  # set while notebooks run in batch
COLOURS = {"teacher": "#6b6b6b"} | {m.name: m.colour for m in METHODS.values()}
COLOURS |= {  # what notebooks call a method, or one grain of it
    "sequence": COLOURS["weighted top-k"],
    "label": COLOURS["multi-grained"],
    "token": COLOURS["posterior"],
    "one best": "#556b2f",
    "adaptive, constant weight": "#a9643a",
    "undistilled": COLOURS["student alone"],
    "undistilled thin": "#6fa8d6",
    "pseudo-labels thin": "#b08968",
    "gold on transfer thin": "#8a8a8a",
    "hard student": COLOURS["student alone"],
    "distilled student": COLOURS["soft targets"],
    "distilled, same text": "#e78bb0",
}
PALETTE = ("#f4c7a1", "#b5d3e7", "#cdb7e0", "#f1b3b8", "#bfe0b4", "#e6d690", "#c9c9c9", "#a9d6d0")


@dataclass
class Album:
    """Where a notebook's figures and tables go, and what their captions end with."""

    folder: Path
    suffix: str = ""
    about: str = ""
    seeds: int = 1

    def __post_init__(self) -> None:
        inside = self.folder.name not in ("", ".", "..") and not set(self.suffix) & set("/\\\0")
        if not inside:
            raise ValueError(
                f"expected a folder of figures/ and a suffix without slashes, got {self.folder} "
                f"and {self.suffix!r}"
            )

    def save(
        self,
        stem: str,
        table: pd.DataFrame,
        caption: str,
        figure: Figure | None = None,
        seeds: int | None = None,
    ) -> None:
        """`save` under this album's folder and suffix; the caption ends with what it is about."""
        caption = f"{caption} {self.about}." if self.about else caption
        seeds = self.seeds if seeds is None else seeds
        save(self.folder / f"{stem}{self.suffix}", table, caption, figure, seeds)

    def scores(self, stem: str, rows: pd.DataFrame, caption: str) -> None:
        """Draw and save the test F1 of `tables.table`: `dots` of every method, teacher first."""
        order = list(rows["method"].unique())
        figure, axes = plt.subplots(figsize=(6.4, 0.8 + 0.5 * len(order)))
        dots(axes, rows, "f1", order)
        axes.set(xlabel="test F1 (%)", title="Mean, 95 % interval, one tick a seed")
        self.save(stem, rows[["method", "seed", "f1"]], caption, figure)

    def differences(self, stem: str, compared: pd.DataFrame, caption: str) -> None:
        """Draw and save `tables.paired`: `differences` line by line."""
        figure, axes = plt.subplots(figsize=(8.4, 0.9 + 0.36 * len(compared)))
        differences(axes, compared)
        axes.set(xlabel="difference in test F1 (points)")
        told = "Capped bars: bootstrap. Pale lines: over seeds. Filled: shown"
        axes.set_title(told, loc="right")  # names on the left may be long
        self.save(stem, compared, caption, figure)


def albums(
    figures: str, corpus: str, parts: Parts, about: str = "", suffix: str = "", seeds: int = 1
) -> tuple[Album, Album]:
    """Where a notebook's toy examples go, and what it measures on a corpus; prints what it stands
    on: sentences, types, versions, machine."""
    sizes = f"{corpus}: {len(parts.labelled)} labelled"
    sizes += f", {len(parts.teaching)} teaching" if parts.teaching else ""
    sizes += f", {len(parts.transfer_gold)} transfer sentences"
    print(f"{sizes}; {len(parts.dev)} dev, {len(parts.test)} test; {len(parts.types)} types")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {machine()}")
    told = f"{sizes}, {about}" if about else sizes
    return Album(Path(figures) / "toy"), Album(Path(figures) / corpus, suffix, told, seeds)


def style() -> None:
    """Use the study's look in every figure that follows."""
    plt.style.use(Path(__file__).parent / "kd.mplstyle")


def save(
    stem: Path, table: pd.DataFrame, caption: str, figure: Figure | None = None, seeds: int = 1
) -> None:
    """Write `stem`.csv and, with a figure, `stem`.svg, the same bytes for the same numbers, and
    enter them in the gallery."""
    write_text(stem.with_name(f"{stem.name}.csv"), table.to_csv(index=False, lineterminator="\n"))
    if figure is not None:
        with replacing(stem.with_name(f"{stem.name}.svg")) as aside:
            figure.savefig(aside, format="svg", metadata={"Date": None, "Creator": None})
    index = stem.parent / "index.json"
    with cache.locked(index):
        entries = json.loads(index.read_text(encoding="utf8")) if index.exists() else {}
        entry = {"caption": caption, "figure": figure is not None, "seeds": seeds}
        entries[stem.name] = entry | {"machine": machine(), "code": code()}
        write_text(
            index, json.dumps(dict(sorted(entries.items())), indent=1, ensure_ascii=False) + "\n"
        )


def machine() -> str:
    """What ran this: device and threads, for the gallery and the tables."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def code() -> str:
    """The commit that drew this, '+' if its code had been changed since; kdlib's version outside a
    checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + (
            "+" if git("status", "--porcelain", "kdlib", "notebooks", "data") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return f"kdlib {kdlib.__version__}"


QUESTIONS = {  # a notebook's number, and what its figures answer
    "05": "Soft or hard labels, and from which budget on?",
    "03": "How does a CRF pass on what it knows, and does a teacher that learns help?",
    "04": "What do the k best label sequences say that the best one does not?",
    "02": "How small can a Transformer be, and what do its layers teach?",
    "01": "Can a zero-shot span model teach a small LSTM?",
    "06": "How fast, how small, and why not a faster runtime or spaCy?",
    "00": "What is there at a glance, and how hard is the demo corpus?",
}
SHOWN = (
    "01_table1",
    "02_table3",
    "03_table",
    "03_msd_table",
    "04_table",
)  # tables that a page prints


def gallery(figures: Path = ROOT / "figures") -> None:
    """Write figures/README.md."""
    write_text(figures / "README.md", page(figures))


def page(figures: Path) -> str:
    """Every figure and table by the question it answers, with caption, data set, seeds, machine,
    commit and notebook."""
    found = {
        (index.parent.name, stem): entry
        for index in sorted(figures.glob("*/index.json"))
        for stem, entry in json.loads(index.read_text(encoding="utf8")).items()
    }
    lines = ["# Figures and tables", "", "Written by `python -m kdlib study`; do not edit."]
    questions = QUESTIONS | {"": "How fast is it?"}
    for number, question in questions.items():
        own = {key: e for key, e in found.items() if key[1][:2] == number or not number}
        found = {key: e for key, e in found.items() if key not in own}
        lines += ["", f"## {question}"] if own else []
        for (folder, stem), entry in own.items():
            lines += _entry(figures, folder, stem, entry)
    return "\n".join(lines) + "\n"


def _entry(figures: Path, folder: str, stem: str, entry: Mapping[str, Any]) -> list[str]:
    source = _drawn_by(stem)
    drawn = [f"drawn by [{source.stem}](../notebooks/{source.name})"] if source else []
    lines = ["", f"**{folder} · {stem}** · {entry['caption']}", ""]
    lines += [f"![{folder}: {entry['caption']}]({folder}/{stem}.svg)", ""] * entry["figure"]
    if stem.startswith(SHOWN):
        lines += [tables.markdown(figures / folder / f"{stem}.csv"), ""]
    told = [f"[{stem}.csv]({folder}/{stem}.csv)", f"seeds: {entry['seeds']}"]
    return [*lines, " · ".join([*told, entry["machine"], f"code {entry['code']}", *drawn])]


def _drawn_by(stem: str) -> Path | None:
    """The notebook that names the figure, suffix left out: the longest name that `stem` begins
    with."""
    named = [
        (name, notebook)
        for notebook in sorted((ROOT / "notebooks").glob(f"{stem[:2]}*.ipynb"))
        for name in re.findall(r'"(\d\d_\w+)\\"', notebook.read_text(encoding="utf8"))
        if stem.startswith(name)
    ]
    return max(named, key=lambda pair: len(pair[0]))[1] if named else None


def curves(
    axes: Axes, table: pd.DataFrame, x: str, y: str, by: str = "method", labels: bool = True
) -> None:
    """Mean of y over seeds against x with its 95 % band, one line a method, named at its end where
    `labels`."""
    ends = []
    for name, rows in table.groupby(by, sort=False):
        grouped = rows.groupby(x)[y]
        at = np.array(sorted(rows[x].unique()))
        mean, half = np.array([scores.interval(grouped.get_group(v)) for v in at]).T
        colour = COLOURS.get(name, "#333333")
        axes.plot(at, mean, color=colour, label=name)
        axes.fill_between(at, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
        ends.append((mean[-1], at[-1], name, colour))
    if labels:
        _label_ends(axes, ends)


def ladder(axes: Axes, runs: pd.DataFrame) -> None:
    """F1 over updates, a logarithmic axis: a dot a run, a line a method; the teacher's mean in
    grey."""
    teacher = runs.loc[runs["method"] == "teacher", "f1"].mean()
    axes.axhline(teacher, color=COLOURS["teacher"], linewidth=1)
    named = {"color": COLOURS["teacher"], "xycoords": ("axes fraction", "data")}
    axes.annotate("teacher", (0.01, teacher), (0, 3), textcoords="offset points", **named)
    ends = []
    for name, own in runs[runs["method"] != "teacher"].groupby("method", sort=False):
        mean, colour = own.groupby("updates")["f1"].mean(), COLOURS.get(name, "#333333")
        axes.plot(own["updates"], own["f1"], ".", color=colour, alpha=0.5, markersize=5)
        axes.plot(mean.index, mean, color=colour)
        ends.append((mean.iloc[-1], runs["updates"].max(), name, colour))  # beside, not on, lines
    _doublings(axes, runs.loc[runs["updates"] > 0, "updates"])
    _label_ends(axes, ends)


def gains(axes: Axes, contrasts: pd.DataFrame) -> None:
    """`tables.contrasts` over updates, one line a method: bars are the bootstrap's intervals."""
    axes.axhline(0, color="black", linewidth=0.8)
    methods, ends = list(dict.fromkeys(contrasts["method"])), []
    right = contrasts["updates"].max() * 1.03 ** len(methods)
    for place, name in enumerate(methods):
        own, colour = contrasts[contrasts["method"] == name], COLOURS.get(name, "#333333")
        at = own["updates"] * 1.03 ** (place - len(methods) // 2)  # side by side
        reach = [own["difference"] - own["low"], own["high"] - own["difference"]]
        axes.errorbar(at, own["difference"], yerr=reach, fmt="o-", color=colour, capsize=3)
        ends.append((own["difference"].iloc[-1], right, name, colour))
    _doublings(axes, contrasts["updates"])
    _label_ends(axes, ends)


def _doublings(axes: Axes, updates: pd.Series) -> None:
    at = sorted(updates.unique())
    axes.set_xscale("log", base=2)
    axes.set_xticks(at, [f"{n:,}" for n in at])
    axes.minorticks_off()
    axes.set(xlabel="updates")


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names at the lines' right ends, in order and a gap apart, as near to them as that allows:
    the least squares are an isotonic regression."""
    low, high = axes.get_ylim()
    ends, apart = sorted(ends), (high - low) * 0.065 * np.arange(len(ends))
    places = isotonic_regression(np.array([end[0] for end in ends]) - apart).x + apart
    for place, (_, x, name, colour) in zip(places, ends, strict=True):
        axes.annotate(
            name,
            (x, place),
            (6, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            annotation_clip=False,
        )


def dots(axes: Axes, table: pd.DataFrame, value: str, order: Sequence[str]) -> None:
    """One row a method: a dot a seed, the mean and its 95 % interval."""
    for row, name in enumerate(reversed(order)):
        values = table.loc[table["method"] == name, value].to_numpy()
        mean, half = scores.interval(values)
        colour = COLOURS.get(name, "#333333")
        axes.errorbar(
            mean,
            row,
            xerr=0 if np.isnan(half) else half,
            fmt="o",
            color=colour,
            capsize=3,
            markersize=7,
        )
        axes.plot(values, np.full(len(values), row - 0.22), "|", color=colour, markersize=8)
        axes.annotate(
            f"{mean:.2f}",
            (mean, row),
            (0, 9),
            textcoords="offset points",
            ha="center",
            color=colour,
            fontsize=9,
        )
    axes.set_yticks(range(len(order)), list(reversed(order)))
    axes.set_ylim(-0.6, len(order) - 0.4)


def differences(axes: Axes, compared: pd.DataFrame) -> None:
    """`tables.compare` as a forest plot: capped bars over test sentences, pale lines over seeds, 0
    in black; a dot is filled where the difference is shown."""
    axes.axvline(0, color="black", linewidth=0.8)
    sure = compared["verdict"] == "shown" if "verdict" in compared else tables.shown(compared)
    for place, row in enumerate(compared.assign(sure=sure)[::-1].itertuples()):
        colour = COLOURS.get(row.method, "#333333")
        reach = [[row.difference - row.low], [row.high - row.difference]]
        inside = colour if row.sure else "white"
        axes.errorbar(row.difference, place, xerr=reach, fmt="o", c=colour, mfc=inside, capsize=3)
        axes.plot([row.seeds_low, row.seeds_high], [place - 0.2] * 2, color=colour, alpha=0.5)
    axes.set_yticks(range(len(compared)), (compared["method"] + " − " + compared["against"])[::-1])
    axes.set_ylim(-0.6, len(compared) - 0.4)


def lattice(
    axes: Axes, words: Sequence[str], names: Sequence[str], found: Surrogates, legal: Tensor
) -> None:
    """The surrogate labels of one sentence: a disc a label, a line a step, both as large as their
    counts.

    Circles mark the allowed labels; dashed lines are `legal` [K, K] steps between them that no path
    takes.
    """
    unary, pairwise, allowed = (x[0].tolist() for x in found)
    low = len(names) - 1  # the first label on top
    for i, u, v in itertools.product(range(len(words) - 1), range(len(names)), range(len(names))):
        weight, open_to_both = pairwise[i][u][v], allowed[i][u] and allowed[i + 1][v]
        if weight > 0:
            axes.plot(
                [i, i + 1],
                [low - u, low - v],
                color=COLOURS["sequence"],
                linewidth=1 + 7 * weight,
                zorder=1,
            )
        elif open_to_both and legal[u, v]:
            axes.plot(
                [i, i + 1],
                [low - u, low - v],
                "--",
                color=COLOURS["label"],
                linewidth=1.2,
                zorder=0,
            )
    for i, v in itertools.product(range(len(words)), range(len(names))):
        edge = COLOURS["label"] if allowed[i][v] else "#dddddd"
        axes.scatter(
            i,
            low - v,
            320,
            color="white",
            edgecolors=edge,
            linewidths=2 if allowed[i][v] else 1,
            zorder=2,
        )
        axes.scatter(
            i, low - v, 240 * unary[i][v], color=COLOURS["sequence"], linewidths=0, zorder=3
        )
    axes.set_xticks(range(len(words)), words)
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.set(xlim=(-0.4, len(words) - 0.6), ylim=(-0.6, len(names) - 0.4))
    axes.grid(False)


def quantiles(axes: Axes, table: pd.DataFrame, x: str, colour: str) -> None:
    """Median, middle half and middle 80 % of columns 0.1, 0.25, 0.5, 0.75, 0.9 against column x."""
    axes.fill_between(
        table[x], table["0.1"], table["0.9"], color=colour, alpha=0.15, label="middle 80 %"
    )
    axes.fill_between(
        table[x], table["0.25"], table["0.75"], color=colour, alpha=0.3, label="middle half"
    )
    axes.plot(table[x], table["0.5"], "o-", color=colour, label="median")
    axes.legend(loc="lower right")


def heat(
    axes: Axes,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    signed: bool = False,
) -> None:
    """A small matrix of numbers within [-1, 1], written in the cells; `signed` centres the colours
    on 0."""
    values, bound = np.asarray(values, dtype=float).round(2) + 0.0, 1.0  # + 0.0 turns -0.0 into 0.0
    axes.imshow(
        values,
        cmap="RdBu_r" if signed else "Blues",
        vmin=-bound if signed else 0,
        vmax=bound,
        aspect="auto",
    )
    axes.set_xticks(range(len(columns)), columns, rotation=90 if len(columns) > 8 else 0)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_title(title)
    axes.grid(False)
    for (i, j), value in np.ndenumerate(values):
        axes.text(
            j,
            i,
            f"{value:.2f}",
            ha="center",
            va="center",
            fontsize=8,
            color="white" if abs(value) > 0.6 * bound else "black",
        )


def pushes(
    losses: Mapping[str, Tensor], guess: Tensor, words: Sequence[str], names: Sequence[str]
) -> tuple[Figure, pd.DataFrame]:
    """Minus the gradient of each loss for one sentence's emissions [1, n, K]: red asks for more of
    a label. A `heat` a loss, and the numbers, a row a word and loss."""
    figure, axes = plt.subplots(1, len(losses), figsize=(11.5, 2.6), sharey=True)
    rows = []
    for axis, (name, loss) in zip(axes, losses.items(), strict=True):
        push = -torch.autograd.grad(loss, guess, retain_graph=True)[0][0]
        heat(axis, push, words, names, name, signed=True)
        axis.tick_params(axis="x", labelsize=8)
        rows.append(pd.DataFrame(push.numpy(), columns=names).assign(word=words, loss=name))
    return figure, pd.concat(rows, ignore_index=True)


def type_colours(types: Iterable[str]) -> dict[str, str]:
    """A pale colour for each type of entity, in order; from the ninth on they repeat."""
    return dict(zip(types, itertools.cycle(PALETTE)))


def side_by_side(
    parts: Parts, results: Sequence[tables.Run], dataset: str, tagger: Tagger | None = None
) -> None:
    """A test sentence, which a slider chooses, as gold and each method tell it at the first seed,
    entities in colour; at first that with the word of which `tagger`, if given, is least sure."""
    least = 0
    if tagger is not None:
        sure = [words.amax(1).min() for words in tagger.marginals(tagger.encode(parts.test))]
        least = int(torch.stack(sure).argmin())
    colours, first = type_colours(parts.types), min(r.seed for r in results)

    def told(sentence: int) -> HTML:
        gold = parts.test[sentence]
        says = {r.method: r.predicted[sentence] for r in results if r.seed == first}
        words = printable(dataset, gold.tokens)
        cells = [
            f'<tr><td style="text-align:right"><b>{escape(who)}</b></td>'
            f'<td style="text-align:left">{entities_html(words, spans, colours)}</td></tr>'
            for who, spans in [("gold", gold.spans), *says.items()]
        ]
        return HTML(f"<table>{''.join(cells)}</table>")

    from ipywidgets import IntSlider

    last = len(parts.test) - 1
    live(told, sentence=IntSlider(value=least, max=last))


def live(draw: Callable[..., Any], **controls: "Widget") -> None:  # noqa: F821
    """Show what `draw(**values)` makes, a figure or HTML, now and at every move of a control; in a
    batch run once, without widgets, which nobody could move. What draw raises is shown and raised.

    The picture is the value of one widget: JupyterLab handles moves beside the running cell, where
    captured output lands below another cell.
    """

    def drawn() -> Any:
        return draw(**{name: control.value for name, control in controls.items()})

    if os.environ.get(BATCH):
        display(drawn())
        plt.close("all")
        return
    import ipywidgets

    picture = ipywidgets.HTML()

    def show(_: Any = None) -> None:
        try:
            picture.value = _html(drawn())
        except Exception as error:
            picture.value = f"<pre>{escape(f'{type(error).__name__}: {error}')}</pre>"
            raise

    for name, control in controls.items():
        control.description = control.description or name
        control.observe(show, "value")
    show()
    display(ipywidgets.VBox([*controls.values(), picture]))


def _html(drawn: Any) -> str:
    """A figure, which is closed, or HTML as the text of a page."""
    if not isinstance(drawn, Figure):
        return drawn.data
    png = io.BytesIO()
    drawn.savefig(png, format="png")
    plt.close(drawn)
    return f'<img src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}">'


def entities_html(tokens: Sequence[str], spans: Sequence[Span], colours: Mapping[str, str]) -> str:
    """A sentence of words as HTML with its entities in colour, words joined by spaces."""
    starts = [0]
    for token in tokens:
        starts.append(starts[-1] + len(token) + 1)
    found = [{"start": starts[s.start], "end": starts[s.end] - 1, "label": s.type} for s in spans]
    return marked_html(" ".join(tokens), found, colours)


def marked_html(
    text: str, entities: Sequence[Mapping[str, Any]], colours: Mapping[str, str]
) -> str:
    """A text as HTML with entities {"start", "end", "label"} in colour; the text is escaped, so
    markup in it shows as text.

    ValueError for entities that overlap or leave the text.
    """
    out, at = [], 0
    for entity in sorted(entities, key=lambda e: e["start"]):
        if not at <= entity["start"] < entity["end"] <= len(text):
            raise ValueError(
                f"expected entities that do not overlap, within {len(text)} characters, got "
                f"{dict(entity)}"
            )
        colour = colours.get(entity["label"], "#dddddd")
        if not re.fullmatch(r"#[0-9a-fA-F]{3,8}|[a-z]+", colour):
            raise ValueError(
                f"colour of {entity['label']}: expected a name or #rrggbb, got {colour!r}"
            )
        style = f"background:{colour};padding:1px 4px;border-radius:3px"
        out.append(escape(text[at : entity["start"]]))
        inside, label = text[entity["start"] : entity["end"]], escape(entity["label"])
        out.append(f'<mark style="{style}">{escape(inside)} <small>{label}</small></mark>')
        at = entity["end"]
    return "".join([*out, escape(text[at:])])
