"""The long experiments on real corpora, `notebooks/evidence.yaml`: declared once, run where a
corpus lies, each run recorded as it ends, and read back from its record everywhere else."""

import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from torch import Tensor

from kdlib.lab import cache, records, scores, tables, targets
from kdlib.lab.records import Record
from kdlib.lab.study import Budget, Fitted, Study
from kdlib.lab.tables import Run
from kdlib.methods import Method, chosen
from kdlib.students import STUDENTS, Student
from kdlib.teachers.gliner import Recipe, Told
from kdlib.teachers.tagger import Taught
from kdlib.text.corpora import in_file_order, load, shuffled
from kdlib.text.files import ROOT

FILE = ROOT / "notebooks" / "evidence.yaml"


@dataclass(frozen=True)
class Experiment:
    """Methods x students x updates x seeds on one ground. The last checkpoint counts, so that dev
    chooses nothing; every seed has a teacher of its own.

    methods: names, or {"name", "of", knobs, "start"}: a method with other knobs, or another start
    of a thin student, under a name of its own; students likewise, with other fields. quiz: labelled
    sentences that examine MSD; `unseen`, its teacher learns without them too. cased: its teacher
    sees letter case. softmax: teacher and students label words one by one, without a CRF. teaching:
    sentences with labels that no student reads; a GLiNER learns from them, the one teacher then.
    first: the seed that its seeds begin with.
    """

    corpus: str
    methods: list[str | dict[str, Any]]
    updates: list[int]
    seeds: int = 3
    first: int = 0
    students: list[str | dict[str, Any]] = field(default_factory=lambda: ["bilstm"])
    labelled: int = 1000
    transfer: int = 0
    dev: int = 250
    test: int = 0
    teacher_updates: int = 300
    batch: int = 16
    general: int = 0
    quiz: int = 0
    unseen: bool = False
    cased: bool = False
    softmax: bool = False
    teaching: int = 0

    def __post_init__(self) -> None:
        if self.teaching and (self.unseen or self.cased or self.softmax):
            raise ValueError("teaching: expected a GLiNER without unseen, cased or softmax")

    @property
    def wanted(self) -> list[Method]:
        """The methods, with their knobs."""
        found = []
        for name, of, knobs in map(_varied, self.methods):
            start = knobs.pop("start", None)
            method = chosen([of])[0].tuned(name, **knobs)
            found.append(method if start is None else replace(method, start=tuple(start)))
        return found

    @property
    def learners(self) -> dict[str, Student]:
        """The students by name."""
        varied = map(_varied, self.students)
        return {name: replace(STUDENTS[of], **fields) for name, of, fields in varied}

    @property
    def teacher(self) -> Fitted | Recipe:
        """Its teacher, trained on the students' own labels, or a GLiNER on its own."""
        if self.teaching:
            return Recipe(self.teacher_updates)
        unseen = self.quiz if self.unseen else 0
        own = {"softmax": self.softmax, "unseen": unseen, "cased": self.cased}
        return Fitted(self.teacher_updates, **own)

    def budget(self, updates: int) -> Budget:
        """How long a student learns."""
        return Budget(updates, self.batch, self.general, evaluations=1)

    @property
    def sentences(self) -> int:
        """How many a student with a teacher reads; ValueError where `transfer` is 0, all there are:
        that is not known before the corpus is read."""
        if not self.transfer:
            raise ValueError("transfer: expected a number of sentences, got 0, all there are")
        return self.labelled + self.transfer

    def epochs(self, updates: int) -> float:
        """How often a student with a teacher reads each sentence."""
        return updates * self.batch / self.sentences

    def ground(self) -> Study:
        """What its runs stand on; FileNotFoundError where its corpus is not here."""
        corpus, about = load(self.corpus), {"quiz": self.quiz, "students": self.learners}
        if not self.teaching:
            parts = shuffled(corpus, self.labelled, self.transfer, self.dev, self.test)
            return Study(parts, self.teacher, calibration=True, **about)
        sizes = self.labelled, self.teaching, self.transfer, self.dev, self.test
        parts = in_file_order(corpus, *sizes)
        model = targets.trained_gliner(parts, self.teacher)
        return Study(parts, targets.told(model, parts), **about)

    def declared(self, method: Method | None, student: str, updates: int, seed: int) -> dict:
        """What a run is, in words and numbers: its record is found by it. None: the teacher."""
        sizes = ("corpus", "labelled", "transfer", "dev", "test")
        told = {name: getattr(self, name) for name in sizes} | {"seed": seed}
        told["version"] = cache.VERSION
        if self.teaching:
            told["teaching"] = self.teaching
        if method is None or method.needs:
            told["teacher"] = asdict(self.teacher)
        if method is None:
            return told | {"method": "teacher"}
        told |= {"method": method.name, "loss": method.loss.__name__, "knobs": dict(method.knobs)}
        told |= {"reads": method.reads, "student": student, "budget": asdict(self.budget(updates))}
        shape = self.learners[student]
        if shape != STUDENTS["bilstm"]:  # which alone has records from before this was told
            told |= {"shape": asdict(shape), "start": list(method.start)}
        return told | ({"quiz": self.quiz} if method.quiz else {})

    def grid(self) -> Iterator[tuple[Method | None, str, int, int, dict]]:
        """Method (None: the teacher), student, updates, seed, and what they declare; updates
        outermost, then seeds, so that a stopped experiment has whole rows."""
        seeds = range(self.first, self.first + self.seeds)
        for seed in seeds[:1] if self.teaching else seeds:
            yield None, "", 0, seed, self.declared(None, "", 0, seed)
        for updates, seed in itertools.product(self.updates, seeds):
            for student, method in itertools.product(self.learners, self.wanted):
                told = self.declared(method, student, updates, seed)
                yield method, student, updates, seed, told


def _varied(row: str | Mapping[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """The name of a method or student, which one it is made of, and what is other than there."""
    own = {"of": row} if isinstance(row, str) else dict(row)
    return own.get("name", own["of"]), own["of"], {k: own[k] for k in own.keys() - {"name", "of"}}


def experiments() -> dict[str, Experiment]:
    """Those of notebooks/evidence.yaml, by name."""
    rows = yaml.safe_load(FILE.read_text(encoding="utf8"))
    shown = {name: row for name, row in rows.items() if not name.startswith("_")}
    return {name: Experiment(**row) for name, row in shown.items()}


def named(name: str) -> Experiment:
    """The experiment of this name; ValueError for one that is not there."""
    known = experiments()
    if name not in known:
        raise ValueError(f"experiment: expected one of {list(known)}, got {name!r}")
    return known[name]


def recorded(experiment: Experiment) -> list[tuple[Record, int]]:
    """The runs of an experiment that have a record, with their updates (0: the teacher).

    ValueError where none has.
    """
    found = {key(record.declared): record for record in records.read(experiment.corpus)}
    wanted = [(key(told), updates) for _, _, updates, _, told in experiment.grid()]
    there = [(found[told], updates) for told, updates in wanted if told in found]
    if not there:
        file = records.file_of(experiment.corpus)
        raise ValueError(f"{file}: expected records of this experiment, got none: `kdlib evidence`")
    return there


def key(declared: dict) -> str:
    """What was declared as one text, the same for tuples and the lists that JSON makes of them, and
    for a record from before `Fitted` or `Budget` had a field, which then has its default."""
    told = dict(declared)
    teacher = Recipe if "teaching" in told else Fitted
    for name, kind in (("teacher", teacher), ("budget", Budget)):
        if told.get(name):
            told[name] = asdict(kind(**told[name]))
    return json.dumps(told, sort_keys=True)


def table(experiment: Experiment) -> pd.DataFrame:
    """One row a recorded run: student, method, updates, seed, precision, recall, f1, parameters,
    what was measured beside (dev_f1, `agreement`, ece; of a teacher entropy, best), in percent but
    the last two."""
    rows, beside = [], {"dev_f1", "ece"}
    for record, updates in recorded(experiment):
        right, guessed, there = record.counts.sum((0, 1))
        told = record.declared
        rows.append(
            {"student": told.get("student", ""), "method": told["method"], "updates": updates}
            | {"seed": told["seed"], "precision": round(100 * right / max(guessed, 1), 3)}
            | {"recall": round(100 * right / max(there, 1), 3)}
            | {"f1": round(float(scores.f1(record.units)), 3), "parameters": record.parameters}
            | record.measures
            | {k: v for row in record.history[-1:] for k, v in row.items() if k in beside}
        )
    return pd.DataFrame(rows)


def beside_teachers(experiment: Experiment) -> pd.DataFrame:
    """The students' rows of `table`, with the sentences they read and, in percent: `kept`, of their
    teachers' mean F1; against the teacher, `missed`, words of entities, and `wrong`, all words."""
    rows = table(experiment)
    taught = rows[rows["agreement"].notna()]
    f1 = rows.loc[rows["method"] == "teacher", "f1"].mean()
    return taught.assign(
        sentences=experiment.sentences,
        kept=100 * taught["f1"] / f1,
        missed=100 - taught["word_recall"],
        wrong=100 - taught["word_accuracy"],
    ).drop(columns=["entropy", "best"])


def searched(tried: Iterable[Experiment]) -> pd.DataFrame:
    """Every run of a search for settings, on dev: of (the method of which it is a setting), method,
    rate, seed, dev_f1."""
    found = []
    for e in tried:
        of = {name: method for name, method, _ in map(_varied, e.methods)}
        rates = {name: student.rate for name, student in e.learners.items()}
        rows = table(e).query("method != 'teacher'")
        found.append(rows.assign(of=rows["method"].map(of), rate=rows["student"].map(rates)))
    return pd.concat(found)[["of", "method", "rate", "seed", "dev_f1"]]


def settled(runs: pd.DataFrame) -> pd.DataFrame:
    """Of each method in `searched` the setting with the highest mean dev F1 over seeds."""
    means = runs.groupby(["of", "method", "rate"], sort=False)["dev_f1"].mean().reset_index()
    return means.loc[means.groupby("of", sort=False)["dev_f1"].idxmax()]


def gap_closed(runs: pd.DataFrame) -> pd.DataFrame:
    """Share, in percent, of the way from the student alone to the ceiling, gold on transfer, that a
    method goes: student, method, updates, seed, closed. Rows without both ends are left out."""
    ends = runs.pivot_table(index=["student", "updates", "seed"], columns="method", values="f1")
    if not {"student alone", "gold on transfer"} <= set(ends):
        return pd.DataFrame(columns=["student", "method", "updates", "seed", "closed"])
    low, high = ends["student alone"], ends["gold on transfer"]
    closed = ends.sub(low, axis=0).div(high - low, axis=0).mul(100).round(2)
    long = closed.reset_index().melt(["student", "updates", "seed"], value_name="closed")
    return long.dropna()[["student", "method", "updates", "seed", "closed"]]


def at_equal_seconds(
    runs: pd.DataFrame, ms: Mapping[str, float], updates: int, against: str = "pseudo-labels"
) -> pd.DataFrame:
    """F1 of each method after the seconds that `updates` updates of another one take: student,
    method, seed, updates, f1. Between two budgets a seed's F1 is a straight line over log updates.

    ms: of an update, by method; those without are left out. ValueError where a method would need
    more or fewer updates than it was given.
    """
    rows = []
    known = runs[runs["method"].isin(ms)].sort_values("updates")
    for (student, method, seed), own in known.groupby(["student", "method", "seed"], sort=False):
        due, there = updates * ms[against] / ms[method], own["updates"]
        if not there.min() <= due <= there.max():
            got = f"{there.min()} to {there.max()}"
            raise ValueError(f"{method}: expected budgets around {due:.0f} updates, got {got}")
        f1 = round(float(np.interp(np.log(due), np.log(there), own["f1"])), 3)
        told = {"student": student, "method": method, "seed": seed, "updates": round(due)}
        rows.append(told | {"f1": f1})
    return pd.DataFrame(rows)


def contrasts(
    experiment: Experiment, asked: Iterable[tuple[str, str]] = tables.CONTRASTS
) -> pd.DataFrame:
    """`tables.contrasts` of each student at each budget."""
    found = [
        tables.contrasts(own, asked).assign(student=student, updates=updates)
        for (student, updates), own in counted(experiment).items()
    ]
    return pd.concat(found, ignore_index=True)


def counted(experiment: Experiment) -> dict[tuple[str, int], tables.Counted]:
    """What a bootstrap draws from, by student and updates ("", 0: the teacher), method and seed:
    units are documents, or sentences where the corpus marks none."""
    cells: dict[tuple[str, int], dict[str, dict[int, np.ndarray]]] = {}
    for record, updates in recorded(experiment):
        told = record.declared
        own = cells.setdefault((told.get("student", ""), updates), {})
        own.setdefault(told["method"], {})[told["seed"]] = record.units
    return cells


def by_doubt(
    experiment: Experiment, method: str, against: str = "pseudo-labels", cut: int = 5
) -> pd.DataFrame:
    """F1 of a method minus another's, seed by seed, on the `cut`th of the test sentences that its
    teacher is surest of, on the next, and so on: updates, seed, part (1 to cut), entropy (mean of
    the part's sentences, nats a word), difference."""
    doubts = records.doubts(experiment.corpus)
    doubted = {(key(own.of), own.test): own.entropy for own in doubts}
    found: dict[tuple[int, int], dict[str, Record]] = {}
    for record, updates in recorded(experiment):
        own = found.setdefault((updates, record.declared["seed"]), {})
        own[record.declared["method"]] = record
    rows = []
    for (updates, seed), own in found.items():
        if not {method, against} <= own.keys():
            continue
        teacher, test = key(experiment.declared(None, "", 0, seed)), own[method].test
        entropy = doubted.get((teacher, test))
        if entropy is None or own[against].test != test:
            continue
        for part, some in enumerate(np.array_split(np.argsort(entropy, kind="stable"), cut), 1):
            ours, theirs = (
                float(scores.f1(own[name].counts[some].sum(1))) for name in (method, against)
            )
            about = {"method": method, "updates": updates, "seed": seed, "part": part}
            about["entropy"] = round(float(entropy[some].mean()), 5)
            rows.append(about | {"difference": round(ours - theirs, 3)})
    return pd.DataFrame(rows)


def cells(own: Experiment) -> dict[tuple[str, int], list[dict]]:
    """What one job of a grid makes, all seeds of a method at one budget: (method, updates) -> what
    its runs declare. The teachers, ("teacher", 0), come first: the others learn from them."""
    found: dict[tuple[str, int], list[dict]] = {}
    for _, _, updates, _, told in own.grid():
        found.setdefault((told["method"], updates), []).append(told)
    return found


def missing(name: str) -> dict[tuple[str, int], list[dict]]:
    """Those `cells` of an experiment that have not all their records, as a grid of jobs plans."""
    own = named(name)
    there, every = _made(own.corpus), cells(own).items()
    return {cell: told for cell, told in every if any(key(t) not in there for t in told)}


def _made(corpus: str) -> set[str]:
    """The keys of what is whole: a run with its record, a teacher with its doubt noted too."""
    doubted = {key(own.of) for own in records.doubts(corpus)}
    found = {key(own.declared): own.declared for own in records.read(corpus)}
    return {k for k, told in found.items() if told["method"] != "teacher" or k in doubted}


def run(name: str, methods: Collection[str] = (), updates: Collection[int] = ()) -> None:
    """Make what has no record yet, a line printed and a record written as each run ends; of these
    methods and budgets alone where some are named ("teacher" and 0 are the teachers').

    ValueError for an unknown experiment, method or budget; FileNotFoundError where its corpus is
    not here.
    """
    own = named(name)
    for what, asked, there in (
        ("method", methods, list(dict.fromkeys(method for method, _ in cells(own)))),
        ("updates", updates, [0, *own.updates]),
    ):
        for wrong in set(asked) - set(there):
            raise ValueError(f"{what}: expected one of {there}, got {wrong!r}")
    students, ground = own.learners, own.ground()
    parts = ground.parts
    for method, student, budget, seed, told in own.grid():
        if (methods and told["method"] not in methods) or (updates and budget not in updates):
            continue
        if key(told) in _made(own.corpus):
            continue
        if method is None:
            taught, made = ground.taught(seed)
            measures = doubt(taught, ground)
        else:
            study = ground.with_budget(own.budget(budget))
            made = study.run(method, student, seed)
            measures = agreement(made, study, seed) if method.needs else {}
        gold = [s.spans for s in parts.test]
        counts = records.per_sentence(gold, made.predicted, parts.types)
        history = [
            {k: round(v, 4) for k, v in row.items() if k != "seconds"} for row in made.history
        ]
        about = list(parts.types), list(parts.documents), made.parameters, measures, history
        before = [r for r in records.read(own.corpus) if key(r.declared) == key(told)]
        record = before[0] if before else Record(told, counts, *about)
        if not before:  # of a teacher only its doubt may be missing
            records.add(own.corpus, record)
        if method is None:
            emissions = targets.emissions(taught, parts.test)
            words = np.array([len(e) for e in emissions])
            records.add_doubt(own.corpus, record, entropies(taught, emissions) / words)
            if not np.array_equal(record.counts, counts):  # another processor's, say
                was = float(scores.f1(record.counts.sum(1)))
                print(
                    f"{name}: the recorded teacher of seed {seed} has {was:.2f}, and its own doubt"
                )
        f1 = float(scores.f1(counts.sum(1)))
        who = made.method if len(students) == 1 or not student else f"{made.method}, {student}"
        print(f"{name}: {budget:6} {who:20} seed {seed}: {f1:5.2f}", flush=True)


def agreement(made: Run, study: Study, seed: int) -> dict[str, float]:
    """A student's test entities with its teacher's taken as gold, in percent: F1 of entities
    (agreement), recall of entities' words and accuracy of all words, which are GLiNER -> LSTM's."""
    taught = study.taught(seed)[1].predicted
    words = scores.word_scores(taught, made.predicted, [len(s.tokens) for s in study.parts.test])
    found = {"agreement": scores.agreement(made.predicted, taught)}
    found |= {f"word_{name}": words[name] for name in ("recall", "accuracy")}
    return {name: round(value, 3) for name, value in found.items()}


@torch.no_grad()
def doubt(teacher: Taught | Told, study: Study) -> dict[str, float]:
    """How unsure a teacher is of the text it labels, or where there is none of what it learnt from:
    entropy of a word's label in nats, and the share of probability that its best sequence holds;
    means over words and over sentences."""
    text = targets.emissions(teacher, study.parts.text)
    text = text[len(study.parts.labelled) :] or text
    best = []
    for e in text:
        e, whole = e[None], torch.ones(1, len(e), dtype=torch.bool)
        path = teacher.crf.viterbi(e, whole)
        best.append(float(teacher.crf.log_prob(e, path, whole).exp()))
    words = sum(map(len, text))
    entropy = float(entropies(teacher, text).sum())
    return {"entropy": round(entropy / words, 5), "best": round(sum(best) / len(best), 5)}


@torch.no_grad()
def entropies(teacher: Taught | Told, emissions: Iterable[Tensor]) -> np.ndarray:
    """Of each sentence [n, K] the entropy of its words' labels, in nats, summed over its words."""
    found = []
    for e in emissions:
        q, _ = teacher.crf.marginals(e[None], torch.ones(1, len(e), dtype=torch.bool))
        found.append(float(torch.special.entr(q).sum()))
    return np.array(found)
