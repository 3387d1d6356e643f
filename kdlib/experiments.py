"""Methods x seeds -> the rows of a table, each trained once and remembered.

The protocol that every notebook shares: a few sentences with labels, many more as plain text for transfer, a teacher, one student,
one budget of updates, and methods that differ in nothing but their loss.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from kdlib import backbones, cache, labels, losses, metrics, teachers, train
from kdlib.batches import Batch, Encoded
from kdlib.crf import LinearChainCRF
from kdlib.data import Dataset, Sentence
from kdlib.labels import Span
from kdlib.meta import Feedback, Meta
from kdlib.models import Tagger
from kdlib.train import Settings

GRAINS = {  # weights of the sequence, label and token grain; sequence alone is weighted top-k, token alone posterior
    "multi-grained": (0.6, 0.1, 0.3),  # chosen on dev sentences of the demo corpus: the label grain's share had to be small
    "equal grains": (1 / 3, 1 / 3, 1 / 3),
    "sequence": (1.0, 0.0, 0.0),
    "label": (0.0, 1.0, 0.0),
    "token": (0.0, 0.0, 1.0),
    "sequence + label": (0.5, 0.5, 0.0),
    "sequence + token": (0.5, 0.0, 0.5),
    "label + token": (0.0, 0.5, 0.5),
}
DIRECT = {  # what compares student and teacher without surrogate labels
    "posterior": losses.posterior,
    "structural": losses.structural,
    "path set": losses.path_set,
    "decoupled k-best": losses.decoupled,
}
KNOBS = {  # method -> the fields of Protocol that its loss reads beside alpha
    "top-k": ("k",),
    "weighted top-k": ("k",),
    "posterior": ("temperature",),
    "structural": ("temperature",),
    "path set": ("k",),
    "decoupled k-best": ("k",),
    "sequence": ("k", "weight_temperature"),
    "label": ("k",),
    "token": ("temperature",),
    "sequence + label": ("k", "weight_temperature"),
    "label + token": ("k", "temperature"),
} | {name: ("k", "weight_temperature", "temperature") for name in ("multi-grained", "equal grains", "sequence + token")}
METHODS = ("teacher", "student alone", "top-k", "posterior", "structural", "msd")  # the rows of the MSD paper's tables
RATES = {"transformer": 3e-4, "bilstm": 3e-3, "narrow bilstm": 3e-3, "deep bilstm": 5e-3}  # of the student's encoder
RATES |= {f"transformer, {layers}": 3e-4 for layers in (4, 2, 1)}
NUMBERS = 1  # raise it when a change to kdlib changes a trained model: results made before it are then trained again
# (what a teacher said before it is still read: if that changes, empty the cache)


def check_numbers(protocol: object, whole: Mapping[str, int], above_zero: Iterable[str]) -> None:
    """ValueError unless the fields of `whole` hold whole numbers of at least so much, and those of `above_zero` numbers above 0."""
    for name, least in whole.items():
        value = getattr(protocol, name)
        if type(value) is not int or value < least:
            raise ValueError(f"{name}: expected a whole number, {least} or more, got {value!r}")
    for name in above_zero:
        if not 0 < getattr(protocol, name) < math.inf:
            raise ValueError(f"{name}: expected a number above 0, got {getattr(protocol, name)}")


@dataclass(frozen=True)
class Protocol:
    """What a run depends on besides its method and seed. Sizes are sentences; 0 takes all there are.

    teacher_sees: 'labelled', the same gold labels as the student; or 'all', those of the transfer sentences too.
    one_teacher: every seed learns from the teacher of seed 0, as in the papers; otherwise each from its own, so that the intervals
    hold the teacher's luck too.
    student: 'transformer' keeps every second layer of the encoder, 'transformer, 4', 2 or 1 so many, evenly spread with the last among
    them; 'bilstm' reads with the encoder's embeddings, reduced by PCA, and 'narrow bilstm' is half as wide; 'deep bilstm' has two
    layers and sees the case of letters, which an uncased encoder drops.
    batch_size: sentences an update, the teacher's and the student's; student_batch, if not 0, is the student's own.
    quiz: the last so many labelled sentences examine the method 'msd', whose student does not train on them; meta: how its teacher learns.
    """

    dataset: str = "demo"
    encoder: str = "minilm"
    labelled: int = 0
    transfer: int = 0
    dev: int = 0
    test: int = 0
    teacher_sees: str = "labelled"
    one_teacher: bool = False
    student: str = "transformer"
    teacher_steps: int = 300
    student_steps: int = 600
    batch_size: int = 16
    teacher_rate: float = 1e-4
    alpha: float = 0.5
    temperature: float = 1.0
    k: int = 3
    weight_temperature: float = 1.0
    student_batch: int = 0
    quiz: int = 0
    meta: Meta = field(default_factory=Meta)

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("teacher_sees", self.teacher_sees, ("labelled", "all")),
            ("student", self.student, tuple(RATES)),
        ):
            if value not in choices:
                raise ValueError(f"{name}: expected one of {choices}, got {value!r}")
        whole = dict.fromkeys(("labelled", "transfer", "dev", "test", "student_batch", "quiz"), 0)
        whole |= dict.fromkeys(("k", "batch_size", "teacher_steps", "student_steps"), 1)
        check_numbers(self, whole, ("temperature", "weight_temperature", "teacher_rate"))
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: expected a weight from 0 to 1, got {self.alpha}")
        if not isinstance(self.meta, Meta):
            raise ValueError(f"meta: expected a Meta, got {self.meta!r}")
        if self.encoder == "characters" and self.student != "bilstm":
            raise ValueError(f"student: expected 'bilstm' over characters, whose encoder is one itself, got {self.student!r}")


@dataclass(frozen=True)
class Parts:
    """A data set as a protocol divides it; `transfer_gold` is seen by no one but a teacher that sees all."""

    types: list[str]
    labelled: list[Sentence]
    transfer_gold: list[Sentence]
    dev: list[Sentence]
    test: list[Sentence]

    @property
    def transfer(self) -> list[Sentence]:
        """The text for transfer, labels taken off."""
        return [s.without_labels() for s in self.transfer_gold]


def divide(dataset: Dataset, protocol: Protocol) -> Parts:
    """The first `labelled` sentences of a fixed shuffle of train, the next `transfer` ones, and the first of dev and test."""
    with_gold = [s for s in dataset.train if s.spans is not None]
    text = [s for s in dataset.train if s.spans is None]
    shuffled = [with_gold[i] for i in torch.randperm(len(with_gold), generator=torch.Generator().manual_seed(0)).tolist()]
    cut = protocol.labelled or len(shuffled)
    transfer = (shuffled[cut:] + text)[: protocol.transfer or None]
    if cut > len(shuffled) or protocol.transfer > len(transfer):
        raise ValueError(
            f"{dataset.name}: expected at most {len(shuffled)} labelled and {len(shuffled[cut:] + text)} further sentences, "
            f"got labelled={protocol.labelled}, transfer={protocol.transfer}"
        )
    dev, test = dataset.dev[: protocol.dev or None], dataset.test[: protocol.test or None]
    return Parts(dataset.types, shuffled[:cut], transfer, dev, test)


@dataclass
class Run:
    """One trained model's results."""

    method: str
    seed: int
    predicted: list[list[Span]]  # on test
    history: list[dict]
    parameters: int
    train_seconds: float

    def counts(self, parts: Parts) -> np.ndarray:
        """Right, predicted and gold entities per test sentence [n, 3]."""
        return metrics.counts([s.spans for s in parts.test], self.predicted)


def surrogate_temperature(method: str, protocol: Protocol) -> float | None:
    """The weight temperature of the surrogate labels a method learns from; None for a method that learns from none."""
    if method in GRAINS and "k" in KNOBS[method]:
        return protocol.weight_temperature if "weight_temperature" in KNOBS[method] else 1.0  # the label grain reads no weights
    return {"top-k": math.inf, "weighted top-k": 1.0}.get(method)


def distilled(method: str, model: Tagger, emissions: Tensor, teacher: LinearChainCRF, batch: Batch, protocol: Protocol) -> Tensor:
    """What a method makes of its teacher: the second term of eq. 6."""
    both = model.crf, emissions, teacher, batch.teacher
    if method in DIRECT:
        return DIRECT[method](*both, batch.mask, **{name: getattr(protocol, name) for name in KNOBS[method]})
    if method in GRAINS:
        return losses.multi_grained(*both, batch.surrogates, batch.mask, GRAINS[method], protocol.temperature)
    return losses.crf_cross_entropy(model.crf, emissions, batch.surrogates, batch.mask)


def objective(method: str, teacher: Tagger | None, protocol: Protocol) -> train.Loss:
    """The loss of a method: CRF NLL alone, or eq. 6, with the gold term over the labelled sentences of the batch."""
    if teacher is None:
        return lambda model, emissions, batch, _: losses.crf_nll(model.crf, emissions, batch.tags, batch.mask)

    def loss(model: Tagger, emissions: Tensor, batch: Batch, _: float) -> Tensor:
        taught = distilled(method, model, emissions, teacher.crf.to(emissions.device), batch, protocol)
        gold = losses.labelled_nll(model.crf, emissions, batch.tags, batch.mask, batch.labelled)
        return losses.mix(gold, taught, protocol.alpha)

    return loss


def untrained(protocol: Protocol, parts: Parts, seed: int) -> backbones.Backbone:
    """The encoder a teacher starts from: pretrained, or with random weights over the characters of the training text."""
    if protocol.encoder != "characters":
        return backbones.load(protocol.encoder)
    torch.manual_seed(seed)
    return backbones.characters([s.tokens for s in parts.labelled + parts.transfer])


def new_student(protocol: Protocol, parts: Parts, seed: int) -> Tagger:
    """An untrained student; it starts from the pretrained encoder, never from the fine-tuned teacher, for every method alike."""
    backbone = untrained(protocol, parts, seed)
    torch.manual_seed(seed)
    return Tagger(_student_encoder(protocol, backbone.encoder), backbone.tokenizer, labels.iob2_labels(parts.types))


def _student_encoder(protocol: Protocol, encoder: torch.nn.Module) -> torch.nn.Module:
    if protocol.student == "transformer":
        return backbones.take_layers(encoder)
    if protocol.student.startswith("transformer"):
        kept, total = int(protocol.student.split()[1]), len(backbones.stack(encoder.model))
        return backbones.take_layers(encoder, [(m + 1) * total // kept - 1 for m in range(kept)])
    if isinstance(encoder, backbones.BiLstm):
        return backbones.narrow(encoder)
    if protocol.student == "narrow bilstm":
        return backbones.lstm(encoder, embedding=64, hidden=100)
    return backbones.lstm(encoder, layers=2, shapes=True) if protocol.student == "deep bilstm" else backbones.lstm(encoder)


def new_teacher(protocol: Protocol, parts: Parts, seed: int) -> Tagger:
    """An untrained teacher: the encoder whole."""
    backbone = untrained(protocol, parts, seed)
    torch.manual_seed(seed)
    return Tagger(backbone.encoder, backbone.tokenizer, labels.iob2_labels(parts.types))


def trained_teacher(protocol: Protocol, parts: Parts, seed: int) -> tuple[Tagger, Run]:
    """The teacher of a protocol and seed, trained or read back."""
    seed = 0 if protocol.one_teacher else seed
    teacher = new_teacher(protocol, parts, seed)
    more = [s for s in parts.transfer_gold if s.spans is not None] if protocol.teacher_sees == "all" else []
    settings = Settings(protocol.teacher_steps, protocol.batch_size, protocol.teacher_rate, seed=seed)
    run, weights = trained(
        teacher,
        "teacher",
        teacher.encode(parts.labelled + more),
        objective("teacher", None, protocol),
        parts,
        settings,
        keep=True,
    )
    teacher.load_state_dict(weights)
    return teacher.eval().requires_grad_(False), run


def run(method: str, seed: int, protocol: Protocol, parts: Parts) -> Run:
    """Train the method with one seed, or read back what the same code made of the same data and settings before."""
    known = ("teacher", "student alone", "msd", *KNOBS)
    if method not in known:
        raise ValueError(f"method: expected one of {known}, got {method!r}")
    if method == "teacher":
        return trained_teacher(protocol, parts, seed)[1]
    student = new_student(protocol, parts, seed)
    batch_size = protocol.student_batch or protocol.batch_size
    settings = Settings(protocol.student_steps, batch_size, RATES[protocol.student], seed=seed)
    if method == "msd":
        return _run_msd(student, protocol, parts, settings)
    if method == "student alone":
        loss, seen, more = objective(method, None, protocol), student.encode(parts.labelled), None
    else:
        teacher, _ = trained_teacher(protocol, parts, seed)
        loss = objective(method, teacher, protocol)
        text = parts.labelled + parts.transfer
        seen = teachers.with_teacher(student.encode(text), text, teacher)
        weight_temperature = surrogate_temperature(method, protocol)
        if weight_temperature is not None:
            seen = teachers.with_surrogates(seen, teacher, protocol.k, weight_temperature)
        knobs = {name: getattr(protocol, name) for name in ("alpha", *KNOBS[method])}
        more = [teacher.crf, knobs | ({"grains": GRAINS[method]} if method in GRAINS else {})]
    return trained(student, method, seen, loss, parts, settings, more)[0]


def _check_quiz(protocol: Protocol, parts: Parts) -> None:
    """ValueError unless the method 'msd' can be trained."""
    if not 0 < protocol.quiz < len(parts.labelled):
        raise ValueError(f"quiz: expected some, not all, of {len(parts.labelled)} labelled sentences, got {protocol.quiz}")
    if protocol.temperature != 1:
        raise ValueError(f"temperature: expected 1 for msd, as in the paper, got {protocol.temperature}")


def _run_msd(student: Tagger, protocol: Protocol, parts: Parts, settings: Settings) -> Run:
    """Meta-structured distillation: as other methods, but for the quiz, which the student (not the teacher) does without in training."""
    _check_quiz(protocol, parts)
    teacher, _ = trained_teacher(protocol, parts, settings.seed)
    text = parts.labelled[: -protocol.quiz] + parts.transfer
    seen, quiz = teachers.with_teacher(student.encode(text), text, teacher), student.encode(parts.labelled[-protocol.quiz :])
    loss = Feedback(teacher, student, quiz, protocol.alpha, protocol.meta, settings.seed)
    dev, gold = teacher.encode(parts.dev), [s.spans for s in parts.dev]

    def drift() -> dict[str, float]:
        return {"teacher_dev_f1": float(metrics.f1(metrics.counts(gold, loss.teacher.predict(dev))))}

    more = [teacher, quiz.content(), protocol.alpha, protocol.meta]
    return trained(student, "msd", seen, loss, parts, settings, more, watch=drift)[0]


def trained(
    model: Tagger,
    method: str,
    seen: Encoded,
    loss: train.Loss,
    parts: Parts,
    settings: Settings,
    more=None,
    keep: bool = False,
    watch: Callable[[], dict[str, float]] = dict,
) -> tuple[Run, dict[str, Tensor] | None]:
    """Fit and predict once per content of everything that matters; a killed run goes on where it was. `watch`: more to note of dev."""
    dev, test = model.encode(parts.dev), model.encode(parts.test)
    key = cache.digest(
        NUMBERS, method, asdict(settings), model, seen.content(), seen.teacher, dev.content(), test.content(), more
    )
    checkpoint = cache.path("checkpoints", f"{key}.pt")
    if keep and not cache.path("weights", f"{key}.pt").exists():
        cache.path("runs", f"{key}.json").unlink(missing_ok=True)  # half an entry is none

    dev_gold = [s.spans for s in parts.dev]

    def evaluate() -> dict[str, float]:
        return {"dev_f1": float(metrics.f1(metrics.counts(dev_gold, model.predict(dev))))} | watch()

    def fitted() -> dict:
        history = train.fit(model, seen, loss, evaluate, settings, checkpoint)
        made = {
            "predicted": [[list(span) for span in spans] for spans in model.predict(test)],
            "history": history,
            "parameters": model.parameters_in_all,
            "train_seconds": history[-1]["seconds"],
        }
        if keep:
            cache.tensors("weights", key, lambda: {k: v.cpu() for k, v in model.state_dict().items()})
        return made

    record = cache.record("runs", key, fitted)
    checkpoint.unlink(missing_ok=True)
    record["predicted"] = [[Span(*span) for span in spans] for spans in record["predicted"]]
    found = Run(method, settings.seed, **record)
    return found, cache.tensors("weights", key, dict) if keep else None


def runs(methods: Iterable[str], seeds: Iterable[int], protocol: Protocol, parts: Parts, show: bool = True) -> list[Run]:
    """Every method with every seed, one line printed for each; seeds outermost, so that a stopped study has whole rows."""
    done = []
    methods = list(methods)
    if "msd" in methods:
        _check_quiz(protocol, parts)  # now, not after hours
    for seed in seeds:
        for method in methods:
            if method == "teacher" and protocol.one_teacher and seed != 0:
                continue  # there is but one: a second row would be the same run again
            done.append(run(method, seed, protocol, parts))
            if show:
                print(line(done[-1], parts), flush=True)
    return done


def sweep(
    name: str, values: Sequence, methods: Iterable[str], seeds: Iterable[int], protocol: Protocol, parts: Parts
) -> pd.DataFrame:
    """`table` of the methods for each value of one field of the protocol, which becomes a column."""
    tables = []
    for value in values:
        found = runs(methods, seeds, replace(protocol, **{name: value}), parts, show=False)
        tables.append(table(found, parts).assign(**{name: value}))
    return pd.concat(tables, ignore_index=True)


def line(run: Run, parts: Parts) -> str:
    """What to print of a run that has ended."""
    scored = metrics.scores(parts.test, run.predicted)
    return f"{run.method:14} seed {run.seed}: test F1 {scored['f1']:5.2f}  ({run.train_seconds:.0f} s)"


def table(results: Iterable[Run], parts: Parts) -> pd.DataFrame:
    """One row a run: method, seed, precision, recall, f1, parameters, train_seconds; scores in percent."""
    rows = []
    for r in results:
        scored = metrics.scores(parts.test, r.predicted)
        rows.append(
            {"method": r.method, "seed": r.seed}
            | {name: round(scored[name], 3) for name in ("precision", "recall", "f1")}
            | {"parameters": r.parameters, "train_seconds": round(r.train_seconds, 1)}
        )
    return pd.DataFrame(rows)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Per method the mean over seeds, and the half-width of its 95 % interval, of f1; means of the other columns."""
    out = []
    for method, own in rows.groupby("method", sort=False):
        mean, half = metrics.interval(own["f1"])
        means = own[["precision", "recall", "parameters", "train_seconds"]].mean()
        out.append({"method": method, "seeds": len(own), "f1": mean, "f1_half": half} | means.to_dict())
    return pd.DataFrame(out).set_index("method")


def closer_look(results: Iterable[Run], parts: Parts) -> pd.DataFrame:
    """Means over seeds, in percent: F1 as seqeval counts by default and strictly, agreement with the teacher, F1 of each type.

    Agreement takes the entities of the run's own teacher as gold; NaN where that teacher is not among the results.
    """
    results = list(results)
    teachers_of = {r.seed: r.predicted for r in results if r.method == "teacher"}
    rows = []
    for r in results:
        teacher = teachers_of.get(r.seed, next(iter(teachers_of.values())) if len(teachers_of) == 1 else None)
        kinds = metrics.per_type(parts.test, r.predicted)
        rows.append(
            {"method": r.method, "f1": kinds.pop("all")["f1"], "strict f1": metrics.scores(parts.test, r.predicted, True)["f1"]}
            | {"agreement with teacher": float("nan") if teacher is None else metrics.agreement(r.predicted, teacher)}
            | {kind: kinds[kind]["f1"] for kind in sorted(kinds)}
        )
    return pd.DataFrame(rows).groupby("method", sort=False).mean().reset_index()


def compare(results: Sequence[Run], parts: Parts, baseline: str = "student alone") -> pd.DataFrame:
    """F1 of each method minus the baseline's: `differences` of the runs' counts against gold."""
    counted: dict[str, dict[int, np.ndarray]] = {}
    for r in results:
        counted.setdefault(r.method, {})[r.seed] = r.counts(parts)
    return differences(counted, baseline)


def differences(counted: Mapping[str, Mapping[int, np.ndarray]], baseline: str) -> pd.DataFrame:
    """F1 of each method minus the baseline's, seed by seed, from counts [n, 3] by method and seed: how sure is it?

    difference, low, high, p: paired bootstrap over test sentences, averaged over seeds. seeds_low, seeds_high: Student's t interval
    of the differences per seed. The first asks whether other sentences would agree, the second whether other seeds would.
    """
    rows = []
    for method, own in counted.items():
        seeds = [seed for seed in own if seed in counted[baseline]]
        if method == baseline or not seeds:
            continue
        ours, theirs = (np.stack([c[seed] for seed in seeds]) for c in (own, counted[baseline]))
        mean, half = metrics.interval(metrics.f1(ours) - metrics.f1(theirs))
        tested = metrics.paired_bootstrap(ours, theirs)
        rows.append({"method": method, "against": baseline} | tested | {"seeds_low": mean - half, "seeds_high": mean + half})
    return pd.DataFrame(rows)


@torch.no_grad()
def mass_of_k_best(teacher: Tagger, sentences: Sequence[Sentence], sizes: Sequence[int]) -> pd.DataFrame:
    """Probability that the teacher's k best sequences hold together: quantiles over sentences, one row a k of `sizes`."""
    held = []
    for emissions in teacher.emissions(teacher.encode(sentences)):
        emissions = emissions.to(teacher.crf.start.device)
        whole = torch.ones(1, len(emissions), dtype=torch.bool, device=emissions.device)
        log_p = teacher.crf.k_best(emissions[None], whole, max(sizes))[1] - teacher.crf.log_partition(emissions[None], whole)
        held.append([log_p[0, :k].exp().sum().item() for k in sizes])
    table = pd.DataFrame(held, columns=list(sizes)).quantile([0.1, 0.25, 0.5, 0.75, 0.9]).T
    return table.rename(columns=str).rename_axis("k").reset_index()
