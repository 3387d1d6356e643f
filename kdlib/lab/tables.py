"""What comes of runs: tables of scores, and paired differences with intervals over test sentences
and over seeds."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kdlib.lab import scores
from kdlib.text.corpora import Parts
from kdlib.text.files import ROOT
from kdlib.text.tags import Sentence, Span


@dataclass
class Run:
    """One trained model's results; `student` is empty for a teacher."""

    method: str
    seed: int
    predicted: list[list[Span]]  # on test
    history: list[dict]
    parameters: int
    train_seconds: float
    student: str = ""


Counted = Mapping[str, Mapping[int, np.ndarray]]  # counts [n, 3] by method and seed
CONTRASTS = (  # the questions of notebook 05, named before its first run
    ("pseudo-labels", "student alone"),
    ("weighted top-k", "pseudo-labels"),
    ("posterior", "pseudo-labels"),
    ("structural", "pseudo-labels"),
    ("structural", "posterior"),
    ("multi-grained", "weighted top-k"),
    ("msd", "msd, teacher at rest"),
    ("adaptive", "adaptive, constant weight"),
)
MARGIN = 0.5  # points of F1: within them, two methods are called equal


def line(run: Run, parts: Parts) -> str:
    """What to print of a run that has ended."""
    scored = scores.scores(parts.test, run.predicted)
    return (
        f"{run.method:14} seed {run.seed}: test F1 {scored['f1']:5.2f}  ({run.train_seconds:.0f} s)"
    )


def table(results: Iterable[Run], parts: Parts) -> pd.DataFrame:
    """One row a run: method, seed, precision, recall, f1, parameters; scores in percent."""
    rows = []
    for r in results:
        scored = scores.scores(parts.test, r.predicted)
        rows.append(
            {"method": r.method, "seed": r.seed}
            | {name: round(scored[name], 3) for name in ("precision", "recall", "f1")}
            | {"parameters": r.parameters}
        )
    return pd.DataFrame(rows)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Per method the mean over seeds, and the half-width of its 95 % interval, of f1; means of the
    other columns."""
    out = []
    for method, own in rows.groupby("method", sort=False):
        mean, half = scores.interval(own["f1"])
        means = own[["precision", "recall", "parameters"]].mean()
        out.append(
            {"method": method, "seeds": len(own), "f1": mean, "f1_half": half} | means.to_dict()
        )
    return pd.DataFrame(out).set_index("method")


def closer_look(results: Iterable[Run], parts: Parts) -> pd.DataFrame:
    """Means over seeds, in percent: F1 as seqeval counts by default and strictly, agreement with
    the teacher, F1 of each type.

    Agreement takes the entities of the run's own teacher as gold; NaN where that teacher is not
    among the results.
    """
    results = list(results)
    teachers_of = {r.seed: r.predicted for r in results if not r.student}
    rows = []
    for r in results:
        teacher = teachers_of.get(
            r.seed, next(iter(teachers_of.values())) if len(teachers_of) == 1 else None
        )
        kinds = scores.per_type(parts.test, r.predicted)
        rows.append(
            {
                "method": r.method,
                "f1": kinds.pop("all")["f1"],
                "strict f1": scores.scores(parts.test, r.predicted, True)["f1"],
            }
            | {
                "agreement with teacher": float("nan")
                if teacher is None
                else scores.agreement(r.predicted, teacher)
            }
            | {f"f1 of {kind}": kinds[kind]["f1"] for kind in sorted(kinds)}
        )
    return pd.DataFrame(rows).groupby("method", sort=False).mean().reset_index()


def compare(
    results: Iterable[Run],
    parts: Parts,
    baseline: str = "student alone",
    reference: scores.Entities | None = None,
) -> pd.DataFrame:
    """F1 of each method minus the baseline's: `differences` of the runs' counts against gold, or
    another reference of the test sentences."""
    reference = [s.spans for s in parts.test] if reference is None else reference
    return differences(counted(results, reference), baseline)


def paired(
    results: Sequence[Run], parts: Parts, against: Mapping[str, Sequence[str]]
) -> pd.DataFrame:
    """`compare` with each baseline of `against` in turn, of the methods it names alone."""
    found = [compare(results, parts, base).query("method in @own") for base, own in against.items()]
    return pd.concat(found, ignore_index=True)


def shown(compared: pd.DataFrame) -> pd.Series:
    """Whether both intervals of a difference, over sentences and over seeds, leave out 0."""
    return _apart(compared, "") & _apart(compared, "seeds_")


def counted(results: Iterable[Run], reference: scores.Entities) -> Counted:
    """The runs' counts against a reference of the test sentences."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for r in results:
        found.setdefault(r.method, {})[r.seed] = scores.counts(reference, r.predicted)
    return found


References = Mapping[str, scores.Entities]  # such as gold's, and the teacher's own


def by_reference(
    results: Iterable[Run], sentences: Sequence[Sentence], references: References
) -> pd.DataFrame:
    """One row a run and reference: scores over words, span_* over whole entities, in percent."""
    return pd.DataFrame(
        {"model": r.method, "seed": r.seed, "reference": name}
        | _rounded(scores.all_scores(sentences, there, r.predicted))
        | {"parameters": r.parameters}
        for r in results
        for name, there in references.items()
    )


def paper_table(
    teacher: Run, results: Iterable[Run], sentences: Sequence[Sentence], references: References
) -> pd.DataFrame:
    """The same columns by the GLiNER -> LSTM paper's protocol: on the last test sentences, each
    student after its last epoch."""
    last = replace(teacher, predicted=teacher.predicted[-len(sentences) :])
    rows = []
    for r in results:
        for name in references:
            prefix, end = f"last_{name}_", r.history[-1]
            own = {k.removeprefix(prefix): v for k, v in end.items() if k.startswith(prefix)}
            row = {"model": r.method, "seed": r.seed, "reference": name} | _rounded(own)
            rows.append(row | {"parameters": r.parameters})
    return pd.concat([by_reference([last], sentences, references), pd.DataFrame(rows)])


def printed(stem: str) -> pd.DataFrame:
    """A paper's table, data/papers/STEM.csv, by method; beside its F1 the one that follows from its
    own precision and recall."""
    table = pd.read_csv(ROOT / "data" / "papers" / f"{stem}.csv").set_index("method")
    p, r = table["precision"], table["recall"]
    return table.assign(**{"f1 from p and r": 2 * p * r / (p + r)})


def histories(results: Iterable[Run]) -> pd.DataFrame:
    """Every evaluation of every run, its seconds left out: they are the machine's."""
    rows = [{"method": r.method, "seed": r.seed} | row for r in results for row in r.history]
    return pd.DataFrame(rows).drop(columns="seconds")


def _rounded(scored: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in scored.items()}


def differences(counted: Counted, baseline: str) -> pd.DataFrame:
    """F1 of each method minus the baseline's, seed by seed, from counts [n, 3] by method and seed:
    how sure is it?

    difference, low, high, p: paired bootstrap over test sentences, averaged over seeds. seeds_low,
    seeds_high: Student's t interval of the differences per seed. The first asks whether other
    sentences would agree, the second whether other seeds would.
    """
    rows = []
    for method, own in counted.items():
        seeds = [seed for seed in own if seed in counted[baseline]]
        if method == baseline or not seeds:
            continue
        ours, theirs = (np.stack([c[seed] for seed in seeds]) for c in (own, counted[baseline]))
        mean, half = scores.interval(scores.f1(ours) - scores.f1(theirs))
        tested = scores.paired_bootstrap(ours, theirs)
        rows.append(
            {"method": method, "against": baseline}
            | tested
            | {"seeds_low": mean - half, "seeds_high": mean + half}
        )
    return pd.DataFrame(rows)


def contrasts(counted: Counted, asked: Iterable[tuple[str, str]] = CONTRASTS) -> pd.DataFrame:
    """A method against another, for the pairs `asked`, as far as both sides have at least two equal
    seeds.

    difference, low, high, p: `scores.hierarchical_bootstrap`. seeds_low, seeds_high: Student's t
    interval over seeds. holm: p adjusted for the contrasts of the table. verdict: 'shown' where
    both intervals leave out 0 and holm < 0.05; 'equal' where the 90 % intervals of both kinds lie
    within MARGIN of 0; else 'not shown'.
    """
    rows = []
    for method, against in asked:
        own, other = counted.get(method, {}), counted.get(against, {})
        seeds = [seed for seed in own if seed in other]
        if len(seeds) < 2:
            continue
        ours, theirs = (np.stack([side[seed] for seed in seeds]) for side in (own, other))
        if not np.array_equal(ours[..., 2], theirs[..., 2]):
            raise ValueError(f"{method}, {against}: expected runs on one test set, got two")
        per_seed = scores.f1(ours) - scores.f1(theirs)
        (mean, half), (_, narrow) = (scores.interval(per_seed, c) for c in (0.95, 0.9))
        within = scores.hierarchical_bootstrap(ours, theirs, confidence=0.9)
        reach = max(-within["low"], within["high"], narrow - mean, narrow + mean)
        rows.append(
            {"method": method, "against": against}
            | scores.hierarchical_bootstrap(ours, theirs)
            | {"seeds_low": mean - half, "seeds_high": mean + half, "seeds": len(seeds)}
            | {"equal": reach < MARGIN}
        )
    table = pd.DataFrame(rows)
    if len(table):
        table["holm"] = scores.holm(table["p"])
        equal = table.pop("equal")
        sure = (table["holm"] < 0.05) & shown(table)
        table["verdict"] = np.where(sure, "shown", np.where(equal, "equal", "not shown"))
    return table


def told(row: Any) -> str:
    """A row of `contrasts` in words: both sides, difference, both intervals, seeds, verdict."""
    within = f"{row.difference:+.2f} [{row.low:+.2f}, {row.high:+.2f}]"
    over = f"seeds [{row.seeds_low:+.2f}, {row.seeds_high:+.2f}], n = {int(row.seeds)}"
    return f"{row.method} - {row.against}: {within}, {over}: {row.verdict}"


def power_law(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """a and b of y = a x^-b, by least squares of the logarithms; ValueError for fewer than two
    different x, and for what is not above 0."""
    if len(set(x)) < 2 or min(*x, *y) <= 0:
        raise ValueError(f"expected two different x and numbers above 0, got {list(x)}, {list(y)}")
    slope, level = np.polyfit(np.log(x), np.log(y), 1)
    return float(np.exp(level)), -float(slope)


def _apart(table: pd.DataFrame, name: str) -> pd.Series:
    """Whether an interval leaves out 0."""
    return (table[f"{name}low"] > 0) | (table[f"{name}high"] < 0)


def markdown(csv: Path) -> str:
    """A table of runs for a page to show: one row a method or model, mean over seeds and
    half-width of the 95 % interval."""
    runs = pd.read_csv(csv)
    return _reference_table(runs) if "reference" in runs else _method_table(summary(runs))


def _method_table(rows: pd.DataFrame) -> str:
    lines = ["| method | test F1 | precision | recall | parameters |", "|---|---|---|---|---|"]
    for name, r in rows.iterrows():
        f1 = f"{r['f1']:.2f}" + (f" ± {r['f1_half']:.2f}" if r["f1_half"] == r["f1_half"] else "")
        size = f"{r['parameters'] / 1e6:.1f} M"
        lines.append(f"| {name} | {f1} | {r['precision']:.2f} | {r['recall']:.2f} | {size} |")
    return "\n".join(lines)


def _reference_table(runs: pd.DataFrame) -> str:
    lines = [
        "| model | entity F1 against gold | against the teacher's output | parameters |",
        "|---|---|---|---|",
    ]
    for model, own in runs.groupby("model", sort=False):
        cells = []
        for reference in ("gold", "teacher"):
            mean, half = scores.interval(own.loc[own["reference"] == reference, "span_f1"])
            cells.append(f"{mean:.2f}" + (f" ± {half:.2f}" if half == half else ""))
        lines.append(f"| {model} | {' | '.join(cells)} | {own['parameters'].iloc[0] / 1e6:.1f} M |")
    return "\n".join(lines)
