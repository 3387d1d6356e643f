"""GLiNER -> LSTM: the paper's protocol and a sound one, every run trained once and remembered.

One data set, one teacher; two students that differ in nothing but what they learn from: the data's labels (`hard student`), or the
teacher's soft labels mixed with them (`distilled student`). Both are scored against both references, gold and teacher.
"""

import random
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from kdlib import backbones, cache, gliner_teacher, losses, metrics, train, twin_tower
from kdlib.data import Dataset, Sentence
from kdlib.experiments import NUMBERS
from kdlib.gliner_teacher import Answer, Recipe
from kdlib.labels import Span
from kdlib.reports import differences
from kdlib.train import Settings
from kdlib.twin_tower import OpenBatch, TwinTower

IN_WORDS = {
    "PER": "person", "LOC": "location", "ORG": "organization", "MISC": "miscellaneous", "ANI": "animal", "PLT": "plant",
}  # fmt: skip
CLOSED = 40  # up to so many types, a sentence is asked for all of them
PAPER_TEST = 100  # sentences the paper tests on, the last ones


@dataclass(frozen=True)
class OpenProtocol:
    """What a run depends on besides its method and seed. Sizes are sentences, in the order of the files; 0 takes all there are.

    teacher: 'train', or a GLiNER's folder or hub name. labelled: sentences whose gold labels the students may see, the first ones;
    teaching: the next ones, with whose labels a teacher is trained here, read by no student; transfer: the ones after these, whose gold
    labels nobody sees. reading: how scores become soft labels, 'spans' or 'tokens'.
    """

    teacher: str = "train"
    encoder: str = "minilm"
    labelled: int = 1000
    teaching: int = 0
    transfer: int = 0
    dev: int = 0
    test: int = 0
    recipe: Recipe = field(default_factory=Recipe)
    reading: str = "spans"
    student_steps: int = 300
    epochs: int = 10  # how often training is looked at: the points of the curves
    batch_size: int = 64
    rate: float = 1e-2
    alpha: float = 0.2
    temperature: float = 0.5

    def __post_init__(self) -> None:
        if self.reading not in gliner_teacher.READINGS:
            raise ValueError(f"reading: expected one of {gliner_teacher.READINGS}, got {self.reading!r}")


@dataclass(frozen=True)
class OpenParts:
    """A data set as a protocol divides it; types are words. `transfer` has gold labels that nobody sees."""

    labelled: list[Sentence]
    teaching: list[Sentence]
    transfer: list[Sentence]
    dev: list[Sentence]
    test: list[Sentence]
    types: list[str]
    mentions: list[str]  # the type of every entity of the labelled part: what further labels to ask for are drawn from

    @property
    def seen_types(self) -> set[str]:
        """The types a teacher trained here has met."""
        return {span.type for s in self.teaching for span in s.spans}

    def asked(self, sentence: Sentence) -> tuple[str, ...]:
        """The labels a sentence is asked for: all types where there are few.

        Where there are many: its own types and as many others, at least 4, drawn from the mentions, for sentences whose gold labels may
        be known; 8 drawn ones for the transfer part, so that its gold labels do not show in the question.
        """
        if len(self.types) <= CLOSED:
            return tuple(self.types)
        own = set() if sentence.spans is None else {s.type for s in sentence.spans}
        rng = random.Random(zlib.crc32(" ".join(sentence.tokens).encode("utf8", "surrogatepass")))
        wanted = min(len(own) + max(4, len(own)) if sentence.spans is not None else 8, len(own | set(self.mentions)))
        chosen = sorted(own)
        while len(chosen) < wanted:
            other = rng.choice(self.mentions)
            chosen += [] if other in chosen else [other]
        rng.shuffle(chosen)
        return tuple(chosen)


def divide(dataset: Dataset, protocol: OpenProtocol) -> OpenParts:
    """The first `labelled` training sentences, then those for teaching, then transfer; the first of dev, the last of test.

    ValueError where there are too few.
    """
    parts = {name: [in_words(s) for s in getattr(dataset, name) if s.spans is not None] for name in ("train", "dev", "test")}
    types = sorted({span.type for part in parts.values() for s in part for span in s.spans})
    if not (types and parts["dev"] and parts["test"]) or min(protocol.dev, protocol.test, protocol.transfer) < 0:
        raise ValueError(
            f"{dataset.name}: expected entities, dev and test sentences, and sizes of 0 or more, got {len(types)} types, "
            f"{len(parts['dev'])} and {len(parts['test'])} sentences, "
            f"transfer={protocol.transfer}, dev={protocol.dev}, test={protocol.test}"
        )
    train, seen = parts["train"], protocol.labelled + protocol.teaching
    end = seen + protocol.transfer if protocol.transfer else len(train)
    if not (protocol.labelled > 0 and protocol.teaching >= 0 and seen <= end <= len(train)):
        raise ValueError(
            f"{dataset.name}: expected labelled, teaching and transfer sentences out of {len(train)}, "
            f"got labelled={protocol.labelled}, teaching={protocol.teaching}, transfer={protocol.transfer}"
        )
    labelled = train[: protocol.labelled]
    return OpenParts(
        labelled,
        train[protocol.labelled : seen],
        train[seen:end],
        parts["dev"][: protocol.dev or None],
        parts["test"][-protocol.test :],
        types,
        [span.type for s in labelled for span in s.spans],
    )


def in_words(sentence: Sentence) -> Sentence:
    """The sentence with its types as words one can ask for: 'person' for 'PER'."""
    return replace(sentence, spans=tuple(s._replace(type=IN_WORDS.get(s.type, s.type.lower())) for s in sentence.spans))


def teacher_of(protocol: OpenProtocol, parts: OpenParts) -> gliner_teacher.GLiNER:
    """The protocol's teacher: loaded by name, or trained on the teaching part's labels."""
    if protocol.teacher != "train":
        return gliner_teacher.load(protocol.teacher)
    return gliner_teacher.trained(parts.teaching, [parts.asked(s) for s in parts.teaching], protocol.recipe, protocol.encoder)


@dataclass
class Answers:
    """What one teacher says of every sentence of the parts, by the sentence's words, and what each was asked for."""

    of: dict[tuple[str, ...], Answer]

    def asked(self, sentences: Iterable[Sentence]) -> list[tuple[str, ...]]:
        """The labels each was asked for; a student is asked for the same."""
        return [self.of[s.tokens].asked for s in sentences]

    def entities(self, sentences: Iterable[Sentence]) -> list[tuple[Span, ...]]:
        """The teacher's own output: the paper's reference."""
        return [self.of[s.tokens].entities for s in sentences]

    def soft_labels(self, sentences: Iterable[Sentence], reading: str) -> list[Tensor]:
        """Distributions [L, 1 + labels]; ValueError for the reading 'tokens' of a teacher that scores spans alone."""
        found = [self.of[s.tokens] for s in sentences]
        if reading == "tokens" and any(a.inside is None for a in found):
            raise ValueError("reading: expected 'spans' for a teacher that scores no words, got 'tokens'")
        return [gliner_teacher.soft_labels(a.covering if reading == "spans" else a.inside) for a in found]


def ask(teacher: gliner_teacher.GLiNER, parts: OpenParts) -> Answers:
    """The teacher's answers about what students read and are tested on, transfer as plain text; no sentence is asked twice."""
    text = [s.without_labels() for s in parts.transfer]
    once: dict[tuple[str, ...], Sentence] = {}
    for sentence in (*parts.labelled, *text, *parts.dev, *parts.test):
        once.setdefault(sentence.tokens, sentence)
    sentences = list(once.values())
    found = gliner_teacher.answers(teacher, sentences, [parts.asked(s) for s in sentences])
    return Answers({s.tokens: a for s, a in zip(sentences, found, strict=True)})


@dataclass
class OpenRun:
    """One trained student: entities on test as it was best on dev; history, a row an epoch, on the paper's measures."""

    model: str
    seed: int
    predicted: list[tuple[Span, ...]]
    history: list[dict]
    parameters: int


def new_student(protocol: OpenProtocol, seed: int) -> TwinTower:
    """An untrained twin tower whose word pieces begin as the encoder's, reduced."""
    backbone = backbones.load(protocol.encoder)
    torch.manual_seed(seed)
    student = TwinTower(backbone.tokenizer, embedding=min(128, backbone.encoder.width))
    student.start_from(backbone.encoder)
    return student


def objective(distilled: bool, protocol: OpenProtocol) -> train.Loss:
    """Hard labels alone, or the mix of both; gold labels count for the labelled sentences of the batch alone."""

    def loss(_: TwinTower, scores: Tensor, batch: OpenBatch, progress: float) -> Tensor:
        known = batch.mask & batch.labelled[:, None]
        share = known.sum() / batch.mask.sum()
        hard = losses.hard_labels(scores, batch.tags, known) * share if known.any() else scores.new_zeros(())
        if not distilled:
            return hard
        return losses.mix(hard, losses.soft_targets(scores, batch.teacher, batch.mask, protocol.temperature), protocol.alpha)

    return loss


def run(
    model: str, seed: int, protocol: OpenProtocol, parts: OpenParts, answers: Answers, size: int
) -> tuple[OpenRun, TwinTower]:
    """A student of the first `size` sentences: labelled ones, then for a distilled student those of the transfer part as plain text.

    It comes back as it was best on dev. What the same code made of the same data and settings before is read back.
    """
    most = {"hard student": len(parts.labelled), "distilled student": len(parts.labelled) + len(parts.transfer)}
    if model not in most or not 0 < size <= most[model]:
        raise ValueError(f"expected a model and at most so many sentences, of {most}, got {model!r} and {size}")
    distilled, known = model == "distilled student", min(size, len(parts.labelled))
    student = new_student(protocol, seed)
    seen = [*parts.labelled, *parts.transfer][:size]
    soft = answers.soft_labels(seen, protocol.reading) if distilled else None
    data = student.encode([*seen[:known], *(s.without_labels() for s in seen[known:])], answers.asked(seen), soft)
    settings = Settings(
        protocol.student_steps, protocol.batch_size, protocol.rate, evaluations=protocol.epochs, seed=seed, weight_decay=0.01
    )
    watched = _Watched(student, parts, answers)
    key = cache.digest(
        NUMBERS, "twin tower", asdict(settings), student, student.config, data.content(), watched.content(),
        [protocol.alpha, protocol.temperature] if distilled else None,
    )  # fmt: skip

    def fitted() -> dict:
        history = train.fit(student, data, objective(distilled, protocol), watched.scores, settings)
        cache.tensors("weights", key, lambda: {k: v.cpu() for k, v in student.state_dict().items()})
        return {"predicted": [[list(s) for s in spans] for spans in watched.entities("test")], "history": history}

    if not cache.path("weights", f"{key}.pt").exists():
        cache.path("runs", f"{key}.json").unlink(missing_ok=True)  # half an entry is none
    record = cache.record("runs", key, fitted)
    student.load_state_dict(cache.tensors("weights", key, dict))
    predicted = [tuple(Span(*s) for s in spans) for spans in record["predicted"]]
    return OpenRun(model, seed, predicted, record["history"], student.parameters_in_all), student.eval()


def runs(
    models: Iterable[str], seeds: int, protocol: OpenProtocol, parts: OpenParts, answers: Answers, size: int
) -> list[OpenRun]:
    """Each model with each of so many seeds; seeds outermost, so that what is stopped has whole rows."""
    return [run(model, seed, protocol, parts, answers, size)[0] for seed in range(seeds) for model in models]


class _Watched:
    """A student in training as the paper's figures show it: recall on train, all measures on the last test sentences."""

    def __init__(self, student: TwinTower, parts: OpenParts, answers: Answers) -> None:
        self.student, self.answers = student, answers
        self.parts = {"train": parts.labelled[:200], "dev": parts.dev, "last": parts.test[-PAPER_TEST:], "test": parts.test}
        self.rows = {name: student.encode(part, answers.asked(part)) for name, part in self.parts.items()}

    def content(self) -> list:
        """What a digest needs to know of it."""
        return [[rows.content() for rows in self.rows.values()], *(self._references(n) for n in ("train", "dev", "last"))]

    def entities(self, part: str) -> list[tuple[Span, ...]]:
        """What the student finds there now."""
        rows = self.rows[part]
        found = self.student.word_labels(rows)
        return [twin_tower.spans(own, asked) for own, asked in zip(found, rows.asked, strict=True)]

    def _references(self, part: str) -> dict[str, list[tuple[Span, ...]]]:
        return references(self.parts[part], self.answers)

    def scores(self) -> dict[str, float]:
        """dev_f1 over entities, and for gold and teacher: recall on train; accuracy, precision, recall, F1 on the last test sentences."""
        out = {"dev_f1": float(metrics.f1(metrics.counts([s.spans for s in self.parts["dev"]], self.entities("dev"))))}
        for part in ("train", "last"):
            found = self.entities(part)
            for name, reference in self._references(part).items():
                scored = all_scores(self.parts[part], reference, found)
                out |= {f"{part}_{name}_{measure}": value for measure, value in scored.items()}
        return out


def references(sentences: Sequence[Sentence], answers: Answers) -> dict[str, list[tuple[Span, ...]]]:
    """What a student can be scored against: the data's entities, and the teacher's own as in the paper."""
    return {"gold": [s.spans for s in sentences], "teacher": answers.entities(sentences)}


def all_scores(sentences: Sequence[Sentence], reference: metrics.Entities, predicted: metrics.Entities) -> dict[str, float]:
    """`metrics.word_scores`, and precision, recall and F1 over whole entities as span_precision, span_recall, span_f1."""
    right, guessed, there = metrics.counts(reference, predicted).sum(0)
    return metrics.word_scores(reference, predicted, [len(s.tokens) for s in sentences]) | {
        "span_precision": 100 * float(right / max(guessed, 1)),
        "span_recall": 100 * float(right / max(there, 1)),
        "span_f1": 200 * float(right / max(guessed + there, 1)),
    }


def table(results: Iterable[OpenRun], parts: OpenParts, answers: Answers, teacher_parameters: int) -> pd.DataFrame:
    """The paper's table 1 by the sound protocol: every model, seed and reference, on all of test, each student as it was best on dev.

    accuracy, precision, recall and f1 are over words, span_* over whole entities; all in percent.
    """
    found = [("teacher", 0, answers.entities(parts.test), teacher_parameters)]
    found += [(r.model, r.seed, r.predicted, r.parameters) for r in results]
    rows = [
        {"model": model, "seed": seed, "reference": name}
        | _rounded(all_scores(parts.test, reference, predicted))
        | {"parameters": size}
        for model, seed, predicted, size in found
        for name, reference in references(parts.test, answers).items()
    ]
    return pd.DataFrame(rows)


def paper_table(results: Iterable[OpenRun], parts: OpenParts, answers: Answers, teacher_parameters: int) -> pd.DataFrame:
    """The same columns by the paper's protocol: the last test sentences, each student after its last epoch."""
    last = parts.test[-PAPER_TEST:]
    rows = [
        {"model": "teacher", "seed": 0, "reference": name}
        | _rounded(all_scores(last, reference, answers.entities(last)))
        | {"parameters": teacher_parameters}
        for name, reference in references(last, answers).items()
    ]
    for r in results:
        for name in ("gold", "teacher"):
            prefix = f"last_{name}_"
            scored = {k.removeprefix(prefix): v for k, v in r.history[-1].items() if k.startswith(prefix)}
            rows.append({"model": r.model, "seed": r.seed, "reference": name} | _rounded(scored) | {"parameters": r.parameters})
    return pd.DataFrame(rows)


def _rounded(scored: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in scored.items()}


def compare(results: Iterable[OpenRun], parts: OpenParts, answers: Answers, baseline: str = "hard student") -> pd.DataFrame:
    """Entity F1 of each model minus the baseline's on all of test, against gold and against the teacher (`reports.differences`)."""
    results, found = list(results), []
    for name, reference in references(parts.test, answers).items():
        counted: dict[str, dict[int, np.ndarray]] = {}
        for r in results:
            counted.setdefault(r.model, {})[r.seed] = metrics.counts(reference, r.predicted)
        found.append(differences(counted, baseline).assign(reference=name))
    return pd.concat(found, ignore_index=True)


def entity_f1(run: OpenRun, parts: OpenParts, answers: Answers, reference: str) -> float:
    """F1 over whole entities on all of test, in percent, against 'gold' or 'teacher'."""
    return float(metrics.f1(metrics.counts(references(parts.test, answers)[reference], run.predicted)))


def histories(results: Iterable[OpenRun]) -> pd.DataFrame:
    """Every epoch of every run as one table: what the paper's figures 3 to 6 show."""
    return pd.DataFrame([{"method": r.model, "seed": r.seed} | row for r in results for row in r.history])


def quality(teacher: gliner_teacher.GLiNER, parts: OpenParts, answers: Answers, unseen: Dataset | None) -> pd.DataFrame:
    """The teacher's own entity scores: on test, and zero-shot on the types of another data set that are none of the parts'."""
    rows = [{"asked for": f"the {len(parts.types)} types of the data"} | metrics.scores(parts.test, answers.entities(parts.test))]
    if unseen is not None:
        sentences, types = unseen_types(unseen, parts.seen_types)
        asking = replace(parts, types=types, mentions=[span.type for s in sentences for span in s.spans])
        found = gliner_teacher.answers(teacher, sentences, [asking.asked(s) for s in sentences])
        zero_shot = metrics.scores(sentences, [a.entities for a in found])
        rows.append({"asked for": f"{len(types)} types of {unseen.name} it was not trained on"} | zero_shot)
    return pd.DataFrame(rows).round(2)


def unseen_types(dataset: Dataset, known: Iterable[str], sentences: int = 300) -> tuple[list[Sentence], list[str]]:
    """Test sentences of another data set that hold entities of types outside `known`, and these types: for zero-shot scores."""
    test = [in_words(s) for s in dataset.test if s.spans is not None]
    types = sorted({span.type for s in test for span in s.spans} - set(known))
    kept = [replace(s, spans=tuple(span for span in s.spans if span.type in types)) for s in test]
    return [s for s in kept if s.spans][:sentences], types
