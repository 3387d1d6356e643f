"""Methods x seeds -> runs, each trained once and remembered; `reports` makes tables of them.

The protocol that every notebook shares: a few sentences with labels, many more as plain text for transfer, a teacher, one student,
one budget of updates, and methods that differ in nothing but their loss.
"""

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import pandas as pd
import torch
from torch import Tensor

from kdlib import backbones, cache, labels, losses, metrics, reports, teachers, train
from kdlib.batches import Batch, Encoded
from kdlib.crf import LinearChainCRF
from kdlib.data import Dataset, Parts, Sentence
from kdlib.labels import Span
from kdlib.meta import Feedback, Meta
from kdlib.models import Tagger
from kdlib.reports import Run
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
AT_REST = "msd, teacher at rest"  # msd's control: posterior distillation without the quiz's sentences
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
    'msd' knows no temperature but 1.
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


def with_noise(parts: Parts, share: float, clean: int = 0) -> Parts:
    """The parts with so large a share of their training entities mislabelled, half of these missed; the last `clean` labelled sentences
    are spared. ValueError for a share that is none."""
    if not 0 <= share <= 1:
        raise ValueError(f"noise: expected a share from 0 to 1, got {share}")
    rng = random.Random(0)
    others = {kind: [t for t in parts.types if t != kind] for kind in parts.types}

    def careless(s: Sentence) -> Sentence:
        return s if s.spans is None else replace(s, spans=labels.spoil(s.spans, others, share / 2, share / 2, rng))

    cut = len(parts.labelled) - clean
    spoilt = [careless(s) for s in parts.labelled[:cut]] + parts.labelled[cut:]
    return replace(parts, labelled=spoilt, transfer_gold=[careless(s) for s in parts.transfer_gold])


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
    known = ("teacher", "student alone", "msd", AT_REST, *KNOBS)
    if method not in known:
        raise ValueError(f"method: expected one of {known}, got {method!r}")
    if method == "teacher":
        return trained_teacher(protocol, parts, seed)[1]
    if method == AT_REST:
        return replace(run("msd", seed, replace(protocol, meta=replace(protocol.meta, rate=0.0)), parts), method=method)
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
    """ValueError unless there is a quiz for the method 'msd', and something left to learn from."""
    if not 0 < protocol.quiz < len(parts.labelled):
        raise ValueError(f"quiz: expected some, not all, of {len(parts.labelled)} labelled sentences, got {protocol.quiz}")


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
    if {"msd", AT_REST} & set(methods):
        _check_quiz(protocol, parts)  # now, not after hours
    for seed in seeds:
        for method in methods:
            if method == "teacher" and protocol.one_teacher and seed != 0:
                continue  # there is but one: a second row would be the same run again
            done.append(run(method, seed, protocol, parts))
            if show:
                print(reports.line(done[-1], parts), flush=True)
    return done


def sweep(
    name: str, values: Sequence, methods: Iterable[str], seeds: Iterable[int], protocol: Protocol, parts: Parts
) -> pd.DataFrame:
    """`reports.table` of the methods for each value of one field of the protocol, which becomes a column."""
    tables = []
    for value in values:
        found = runs(methods, seeds, replace(protocol, **{name: value}), parts, show=False)
        tables.append(reports.table(found, parts).assign(**{name: value}))
    return pd.concat(tables, ignore_index=True)


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
