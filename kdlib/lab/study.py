"""One ground for every method: the same sentences, teacher, encoder and budget; what differs
between two runs is the method, the student or the seed. Each run is trained once and remembered.
"""

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from kdlib import methods
from kdlib.batches import Batch, Rows, in_turn
from kdlib.crf import Chain
from kdlib.lab import cache, scores, tables, targets, train
from kdlib.lab.tables import Run
from kdlib.lab.train import Settings
from kdlib.methods import LAYERS, LIVE, METHODS, PATHS, WIDE, Lacks, Lesson, Method
from kdlib.models import Tagger, Transformer
from kdlib.students import STUDENTS, Cut, Student, Thin, Twin, pretrained, projection
from kdlib.students.layers import Pupil
from kdlib.students.pretrained import Backbone
from kdlib.teachers.gliner import Told
from kdlib.teachers.msd import Feedback
from kdlib.teachers.tagger import Taught, from_hugging_face, tells
from kdlib.text.corpora import Parts
from kdlib.text.tags import Sentence, Span, iob2_labels
from kdlib.twin_tower import TwinTower

LAST = 100  # test sentences that the GLiNER -> LSTM paper tests on, the last ones
TEXT_OF_START = 600  # sentences that a projected start is fitted on


@dataclass(frozen=True)
class Fitted:
    """A teacher trained here: the pretrained encoder whole, fine-tuned on gold labels.

    softmax: a softmax per word in place of a CRF. sees: 'labelled', the same gold labels as the
    student, or 'all', those of the transfer sentences too. unseen: it does without the last so many
    labelled sentences, such as those of MSD's quiz. one: every seed learns from the teacher
    of seed 0, as in the papers; otherwise each from its own, so that the intervals hold the
    teacher's luck too. cased: it sees the letter case of words, which an uncased encoder drops.
    """

    updates: int = 300
    batch: int = 16
    rate: float = 1e-4
    softmax: bool = False
    sees: str = "labelled"
    unseen: int = 0
    one: bool = False
    cased: bool = False

    def __post_init__(self) -> None:
        _positive(self, whole=("updates", "batch"), above=("rate",))
        if self.sees not in ("labelled", "all"):
            raise ValueError(f"sees: expected 'labelled' or 'all', got {self.sees!r}")


@dataclass(frozen=True)
class Budget:
    """How long a student learns. general: updates of the general stage before, for methods that
    have one. evaluations: how often it is looked at; it ends as it was best on dev."""

    updates: int = 600
    batch: int = 16
    general: int = 0
    evaluations: int = 5

    def __post_init__(self) -> None:
        _positive(self, whole=("updates", "batch", "evaluations"))
        if type(self.general) is not int or self.general < 0:
            raise ValueError(f"general: expected a whole number, 0 or more, got {self.general!r}")


def _positive(of: object, whole: Iterable[str], above: Iterable[str] = ()) -> None:
    for name in (*whole, *above):
        value = getattr(of, name)
        right = type(value) is int if name in whole else isinstance(value, (int, float))
        if not right or not 0 < value < float("inf"):
            kind = "a whole number" if name in whole else "a number"
            raise ValueError(f"{name}: expected {kind} above 0, got {value!r}")


@dataclass
class Lessons:
    """A student before its first update, and all that it will learn from.

    model: what is fitted, the student or a `Pupil` around it. made_of: what else a run depends on,
    for its key. notes: what more to note at an evaluation.
    """

    model: nn.Module
    student: Tagger | TwinTower
    rows: Rows
    loss: train.Loss
    settings: Settings
    made_of: list
    notes: Callable[[], dict[str, float]] = dict


@dataclass(frozen=True)
class Study:
    """teacher: `Fitted`, trained here; what a GLiNER `Told`; the folder or hub name of a Hugging
    Face token classifier; or the folder of a saved Tagger. encoder: what it and the students start
    from, 'minilm', a folder, a hub name; 'characters', a BiLSTM with random weights over whole
    tokens, or 'character transformer'. quiz: the last so many labelled sentences examine MSD.
    follow: note at every evaluation the scores on labelled and on the last test sentences, against
    gold and against the teacher (the figures of the GLiNER -> LSTM paper). calibration: note how
    far a tagger's probabilities of test words are from its accuracy.
    """

    parts: Parts
    teacher: Fitted | Told | str = Fitted()
    budget: Budget = Budget()
    encoder: str = "minilm"
    quiz: int = 0
    students: Mapping[str, Student] = field(default_factory=lambda: STUDENTS)
    follow: bool = False
    calibration: bool = False
    _kept: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def with_budget(self, budget: Budget) -> "Study":
        """The same ground, and the same teachers, for students that learn for longer or shorter."""
        other = replace(self, budget=budget)
        other._kept.update(self._kept)
        return other

    # ---- what can be combined ----

    def check(self, method: Method, student: str) -> None:
        """`Lacks` where the method needs what this student does not serve or the teacher does not
        tell; ValueError for an unknown student, or a quiz that leaves nothing to learn from."""
        if student not in self.students:
            raise ValueError(f"student: expected one of {list(self.students)}, got {student!r}")
        own = self.students[student]
        if isinstance(own, (Cut, Thin)) and self.encoder == "characters":
            raise Lacks(
                f"the student {student!r} needs a Transformer, got the encoder 'characters'"
            )
        for who, has in ((f"the student {student!r}", own.serves), ("its teacher", self._tells())):
            missing = sorted(method.needs - has)
            if missing:
                raise Lacks(f"the method {method.name!r} needs {missing}, which {who} lacks")
        if LAYERS in method.needs and isinstance(self.teacher, str):
            own, other = shape(self._backbone(0).encoder), self._shape_of_teacher()
            if own[: 1 + (WIDE in method.needs)] != other[: 1 + (WIDE in method.needs)]:
                raise Lacks(
                    f"the method {method.name!r} needs layers of as many heads (and for some "
                    f"methods as wide), got {own} in {self.encoder!r} and {other} in its teacher "
                    f"{self.teacher!r}: let the students start from the teacher's own encoder"
                )
        if method.quiz and not 0 < self.quiz < len(self.parts.labelled):
            raise ValueError(
                f"quiz: expected some, not all, of {len(self.parts.labelled)} labelled sentences, "
                f"got {self.quiz}"
            )
        if method.reads == "gold" and any(s.spans is None for s in self.parts.transfer_gold):
            raise Lacks(f"the method {method.name!r} needs gold labels that the text lacks")

    def _tells(self) -> frozenset[str]:
        """What the teacher tells, known before it is trained."""
        if isinstance(self.teacher, Fitted):
            if self.teacher.cased and self.encoder == "characters":
                raise Lacks("a teacher that sees letter case needs a Transformer, got 'characters'")
            return tells(self.encoder != "characters", self.teacher.cased) | {WIDE}
        return self.taught(0)[0].tells | {WIDE}

    def _shape_of_teacher(self) -> tuple[int, int]:
        """Heads and width of its layers."""
        fitted = isinstance(self.teacher, Fitted)
        return shape((self._backbone(0) if fitted else self.taught(0)[0].tagger).encoder)

    # ---- runs ----

    def runs(
        self,
        wanted: Iterable[str | Method],
        students: Sequence[str],
        seeds: Iterable[int],
        show: bool = True,
    ) -> list[Run]:
        """Every method with every student and seed, a line printed for each; seeds outermost, so
        that a stopped study has whole rows. 'teacher' stands for the teacher itself.

        `Lacks`, before anything trains, for what cannot be combined.
        """
        wanted = [m if isinstance(m, Method) or m == "teacher" else named(m) for m in wanted]
        for method in wanted:
            for student in students if method != "teacher" else ():
                self.check(method, student)
        seeds, done = list(seeds), []
        if not seeds:
            raise ValueError("seeds: expected at least one, got none")
        for seed in seeds:
            for method in wanted:
                if method != "teacher":
                    found = [self.run(method, student, seed) for student in students]
                else:  # where there is but one, the first seed has it
                    found = [] if done and self.one else [self.taught(seed)[1]]
                done += found
                for run in found if show else ():
                    print(tables.line(run, self.parts), flush=True)
        return done

    @property
    def one(self) -> bool:
        """Whether all seeds share a teacher."""
        return not isinstance(self.teacher, Fitted) or self.teacher.one

    def run(self, method: str | Method, student: str, seed: int) -> Run:
        """Train the student with one seed, or read back what was made of the same before."""
        return self._taught_by(method, student, seed)[1]

    def trained(
        self, method: str | Method, student: str, seed: int
    ) -> tuple[Tagger | TwinTower, Run]:
        """The student itself too; ValueError for a large one, whose weights are not kept."""
        small = [name for name, s in self.students.items() if s.keeps]
        if student not in small:
            raise ValueError(
                f"student: expected one whose weights are kept, {small}, got {student!r}"
            )
        lessons, run, key = self._taught_by(method, student, seed)
        lessons.model.load_state_dict(cache.load("weights", key))
        return lessons.student.eval(), run

    def _taught_by(self, method: str | Method, student: str, seed: int) -> tuple[Lessons, Run, str]:
        method = named(method)
        self.check(method, student)
        lessons = self.lessons(method, student, seed)
        keep = self.students[student].keeps
        followed = self._followed(lessons.student)
        key, record = self._fitted(lessons, keep, followed)
        return lessons, Run(method.name, seed, student=student, **record), key

    def _fitted(self, own: Lessons, keep: bool, followed: Sequence[tuple] = ()) -> tuple[str, dict]:
        """Fit and predict once per content of everything that matters; a killed run goes on where
        it was. `keep`: its weights too, under the same key."""
        dev, test = (self._read(own.student, part) for part in (self.parts.dev, self.parts.test))
        gold = [s.spans for s in self.parts.dev]
        key = cache.digest(
            asdict(own.settings),
            own.model,
            [rows.content() for rows in (own.rows, dev, test)],
            own.made_of,
            [(rows.content(), references) for _, _, rows, references in followed],
            *(["calibration"] if self.calibration else []),
        )

        def evaluate() -> dict[str, float]:
            f1 = scores.f1(scores.counts(gold, own.student.predict(dev)))
            out = {"dev_f1": float(f1)} | own.notes()
            for name, sentences, rows, references in followed:
                found = own.student.predict(rows)
                for reference, there in references.items():
                    scored = scores.all_scores(sentences, there, found)
                    out |= {f"{name}_{reference}_{k}": value for k, value in scored.items()}
            return out

        def make() -> dict:
            checkpoint, start = cache.path("checkpoints", f"{key}.pt"), time.perf_counter()
            history = train.fit(
                own.model, own.rows, own.loss, own.settings, evaluate, "dev_f1", checkpoint
            )
            predicted = own.student.predict(test)
            if self.calibration:
                place = {label: k for k, label in enumerate(self.labels)}
                tags = [[place[tag] for tag in s.tags] for s in self.parts.test]
                ece = scores.calibration_error(own.student.marginals(test), tags)
                history[-1]["ece"] = ece
            seconds = history[-1]["seconds"]
            who = "teachers" if own.made_of == TEACHER else "students"
            cache.spent(f"training {who}", seconds)
            cache.spent("reading dev and test", time.perf_counter() - start - seconds)
            if keep:
                weights = {k: v.cpu() for k, v in own.model.state_dict().items()}
                cache.tensors("weights", key, lambda: weights)
            checkpoint.unlink(missing_ok=True)
            return {
                "predicted": [[list(span) for span in spans] for spans in predicted],
                "history": history,
                "parameters": own.student.parameters_in_all,
                "train_seconds": history[-1]["seconds"],
            }

        if keep and cache.read(cache.path("weights", f"{key}.pt")) is None:
            cache.path("runs", f"{key}.json").unlink(missing_ok=True)  # half an entry is none
        record = cache.record("runs", key, make)
        record["predicted"] = [[Span(*span) for span in spans] for spans in record["predicted"]]
        return key, record

    def _followed(self, student: Tagger | TwinTower) -> list[tuple]:
        """Name, sentences, rows and references of the parts whose scores are noted."""
        if not self.follow:
            return []
        parts = {"train": self.parts.labelled[:200], "last": self.parts.test[-LAST:]}
        return [
            (name, part, self._read(student, part), self.references(part))
            for name, part in parts.items()
        ]

    def references(self, sentences: Sequence[Sentence]) -> dict[str, list[tuple[Span, ...]]]:
        """What a student can be scored against: the data's entities, and its one teacher's own."""
        teacher, _ = self.taught(0)
        return {
            "gold": [s.spans for s in sentences],
            "teacher": targets.entities(teacher, sentences),
        }

    # ---- what a student is taught ----

    def lessons(self, method: Method, student: str, seed: int) -> Lessons:
        """A student before its first update, with all that the method teaches it."""
        own = self.students[student]
        model = self.new_student(student, seed)
        fitted: nn.Module = model
        if LAYERS in method.needs:
            fitted = Pupil(model, self._shape_of_teacher()[1])
        if isinstance(own, Thin):
            fitted = self._started(fitted, own, method.start, seed)
        settings = Settings(
            self.budget.updates,
            self.budget.batch,
            own.rate,
            evaluations=self.budget.evaluations,
            seed=seed,
        )
        cut = len(self.parts.labelled) - (self.quiz if method.quiz else 0)
        labelled, quiz = self.parts.labelled[:cut], self.parts.labelled[cut:]
        if method.reads == "labelled":
            text = labelled
        elif method.reads == "gold":
            text = labelled + self.parts.transfer_gold
        else:
            text = labelled + self.parts.transfer
        if not method.needs:
            loss = self._loss(method, None)
            return Lessons(fitted, model, self._read(model, text), loss, settings, method.content())
        teacher, _ = self.taught(seed)
        made_of = [*method.content(), teacher.crf]
        if method.reads == "pseudo-labels":
            found = targets.entities(teacher, text)
            text = [
                s if s.spans is not None else replace(s, spans=tuple(spans))
                for s, spans in zip(text, found, strict=True)
            ]
            loss = self._loss(method, None)
            return Lessons(fitted, model, self._read(model, text), loss, settings, made_of)
        rows = self._read(model, text)
        if model.asks:
            rows = targets.with_words(rows, text, teacher)
        else:
            rows = targets.with_teacher(rows, text, teacher)
        if PATHS in method.needs:
            rows = targets.with_surrogates(rows, teacher, **method.paths)
        if LAYERS in method.needs:
            rows = targets.with_layers(rows, text, teacher.tagger)
        if LIVE not in method.needs:
            loss = self._loss(method, teacher)
            return Lessons(fitted, model, rows, loss, settings, made_of)
        asked = model.encode(quiz)
        feedback = Feedback(teacher.tagger, model, asked, seed=seed, **method.knobs)
        dev, gold = teacher.tagger.encode(self.parts.dev), [s.spans for s in self.parts.dev]

        def drift() -> dict[str, float]:
            found = feedback.teacher.predict(dev)
            return {"teacher_dev_f1": float(scores.f1(scores.counts(gold, found)))}

        made_of += [teacher.tagger, asked.content()]
        return Lessons(fitted, model, rows, feedback, settings, made_of, drift)

    @staticmethod
    def _loss(method: Method, teacher: Taught | Told | None) -> train.Loss:
        """The method's loss as `train.fit` asks for it."""

        def loss(model: nn.Module, out, batch: Batch, progress: float) -> Tensor:
            if isinstance(model, Pupil):
                emissions, inside = out
                own = model.tagger.chain(emissions)
                layers, projection = (inside, batch.layers), model.projection
            else:
                own, layers, projection = model.chain(out), None, None
            other = None
            if teacher is not None:
                crf = None if own.crf is None else teacher.crf.to(batch.mask.device)
                other = Chain(crf, batch.teacher, crf is None or teacher.softmax)
            lesson = Lesson(own, other, batch, progress, layers, projection)
            return method.loss(lesson, **method.knobs)

        return loss

    def _read(self, model: Tagger | TwinTower, sentences: Sequence[Sentence]) -> Rows:
        """Sentences as a student reads them, a twin tower asked for the types of each; read once,
        as most runs of a study read the same."""
        tokenizer = model.tokenizer
        how = () if model.asks else (model.encoder.max_pieces, model.encoder.reads_shapes)
        read = ("rows", id(tokenizer), type(model), how, tuple(sentences))
        if read not in self._kept:
            asked = [[self._asked[s.tokens] for s in sentences]] if model.asks else []
            self._kept[read] = tokenizer, model.encode(sentences, *asked)  # so that its id stays
        return self._kept[read][1]

    @property
    def _asked(self) -> dict[tuple[str, ...], tuple[str, ...]]:
        """By a sentence's words, the types it is asked for."""
        if "asked" not in self._kept:
            found = self._kept["asked"] = {}
            for s in (*self.parts.text, *self.parts.dev, *self.parts.test):
                found.setdefault(s.tokens, self.parts.asked(s))
        return self._kept["asked"]

    # ---- models ----

    def _backbone(self, seed: int) -> Backbone:
        """The encoder that teacher and students start from."""
        texts = [s.tokens for s in self.parts.labelled + self.parts.transfer_gold]
        if self.encoder == "characters":
            torch.manual_seed(seed)
            return pretrained.characters(texts)
        if "backbone" not in self._kept:
            if self.encoder == "character transformer":
                self._kept["backbone"] = pretrained.character_transformer(texts)
            else:
                self._kept["backbone"] = pretrained.load(self.encoder)
        return self._kept["backbone"]

    @property
    def labels(self) -> list[str]:
        """The IOB2 labels of the parts' types."""
        return iob2_labels(self.parts.types)

    @property
    def _softmax(self) -> bool:
        return isinstance(self.teacher, Fitted) and self.teacher.softmax

    def new_teacher(self, seed: int = 0) -> Tagger:
        """An untrained teacher: the encoder whole, under a new output layer."""
        return self._whole(seed, isinstance(self.teacher, Fitted) and self.teacher.cased)

    def _whole(self, seed: int = 0, cased: bool = False) -> Tagger:
        """The encoder whole; thin students start from it as it is, whatever their teacher sees."""
        backbone = self._backbone(seed)
        torch.manual_seed(seed)
        encoder = copy.deepcopy(backbone.encoder)
        encoder = Transformer(encoder.model, shapes=True) if cased else encoder
        return Tagger(encoder, backbone.tokenizer, self.labels, softmax=self._softmax)

    def new_student(self, student: str, seed: int) -> Tagger | TwinTower:
        """An untrained student; it starts from the pretrained encoder, never from the fine-tuned
        teacher, for every method alike."""
        own, backbone = self.students[student], self._backbone(seed)
        torch.manual_seed(seed)
        if isinstance(own, Twin):
            return own.model(backbone, self._pca)
        if isinstance(own, Thin):
            tokenizer, kept = self._pieces(own)
            encoder = own.encoder(backbone, kept)
        else:
            tokenizer, encoder = backbone.tokenizer, own.encoder(backbone, self._pca)
        return Tagger(encoder, tokenizer, self.labels, softmax=self._softmax)

    def _pca(self, table: Tensor, width: int) -> Tensor:
        """The backbone's table, reduced once a study: its digest alone reads all of it."""
        if ("pca", width) not in self._kept:
            self._kept["pca", width] = targets.pca(table, width)
        return self._kept["pca", width]

    def _pieces(self, own: Thin) -> tuple:
        return own.read(self._backbone(0), [s.tokens for s in self.parts.text])

    def _started(
        self, fitted: Tagger | Pupil, own: Thin, start: tuple[str, ...], seed: int
    ) -> Tagger | Pupil:
        """A thin student, watched or not, after what its method starts with."""
        width = self._backbone(seed).encoder.width
        pupil = fitted if isinstance(fitted, Pupil) else Pupil(fitted, width)
        if {"projected", "taught"} & set(start):
            of = self.taught(seed)[0].tagger if "taught" in start else self._whole()
            weights = self._projected(own, pupil.tagger.encoder, of.eval())
            pupil.projection.weight.data.copy_(weights.pop("basis"))
            pupil.tagger.encoder.load_state_dict(weights)
        if "general" in start and self.budget.general:
            pupil.load_state_dict(self._general(pupil, own, seed))
        return fitted

    def _projected(self, own: Thin, student: nn.Module, teacher: Tagger) -> dict[str, Tensor]:
        """The weights that `projection.project` gives a student, made once: eigenvectors differ in
        the last digit from run to run."""
        mapped, (_, kept) = own.mapped(teacher.encoder), self._pieces(own)
        seen = teacher.encode([s.without_labels() for s in self.parts.text[:TEXT_OF_START]])
        key = cache.digest(
            "projected", teacher.encoder, student.config(), seen.windows, mapped, kept
        )

        def make() -> dict[str, Tensor]:
            batches = [
                seen.collate(range(i, min(i + 50, len(seen)))) for i in range(0, len(seen), 50)
            ]
            text = [(batch.pieces, batch.piece_mask) for batch in batches]
            basis = projection.project(teacher.encoder, student, mapped, text, kept)
            return student.state_dict() | {"basis": basis}

        return cache.tensors("projected", key, make)

    def _general(self, pupil: Pupil, own: Thin, seed: int) -> dict[str, Tensor]:
        """Stage 1: the weights after it has learnt the layers of the un-fine-tuned encoder on raw
        text, no labels."""
        teacher, text = self._whole().eval(), [s.without_labels() for s in self.parts.text]
        if len(text) < 2:
            raise ValueError(
                "expected two sentences of text or more, one to learn from and one to choose by, "
                f"got {len(text)}"
            )
        cut = len(text) - max(1, len(text) // 50)  # what stays unread chooses the best weights
        seen, held_out = (
            targets.with_layers(self._read(pupil.tagger, part), part, teacher)
            for part in (text[:cut], text[cut:])
        )
        loss = self._loss(IMITATION, None)

        @torch.no_grad()
        def evaluate() -> dict[str, float]:
            pupil.eval()
            total, device = 0.0, pupil.projection.weight.device
            for rows, batch in in_turn(held_out):
                batch = batch.to(device)
                total += len(rows) * loss(pupil, pupil(batch), batch, 1.0).item()
            pupil.train()
            return {"minus_held_out_loss": -total / len(held_out)}

        settings = Settings(self.budget.general, self.budget.batch, own.rate, seed=seed)
        key = cache.digest("general", asdict(settings), pupil, seen.content(), held_out.content())

        def make() -> dict[str, Tensor]:
            checkpoint, start = cache.path("checkpoints", f"{key}.pt"), time.perf_counter()
            choose = "minus_held_out_loss"
            train.fit(pupil, seen, loss, settings, evaluate, choose, checkpoint)
            cache.spent("general stages", time.perf_counter() - start)
            checkpoint.unlink(missing_ok=True)
            return {name: w.cpu() for name, w in pupil.state_dict().items()}

        return cache.tensors("weights", key, make)

    # ---- the teacher ----

    def taught(self, seed: int) -> tuple[Taught | Told, Run]:
        """The teacher of a seed, trained or read back, and its own run."""
        seed = 0 if self.one else seed
        if ("teacher", seed) not in self._kept:
            self._kept["teacher", seed] = self._teacher(seed)
        return self._kept["teacher", seed]

    def _teacher(self, seed: int) -> tuple[Taught | Told, Run]:
        test = self.parts.test
        if isinstance(self.teacher, Told):
            found = self.teacher.entities(test)
            return self.teacher, Run("teacher", 0, found, [], self.teacher.parameters, 0.0)
        if isinstance(self.teacher, str):
            if (Path(self.teacher).expanduser() / "tagger.json").is_file():
                tagger = Tagger.from_pretrained(Path(self.teacher).expanduser())
            else:
                tagger = from_hugging_face(self.teacher, self.parts.types)
            found = tagger.predict(test)
            return Taught(tagger), Run("teacher", 0, found, [], tagger.parameters_in_all, 0.0)
        lessons = self.lessons_of_teacher(seed)
        key, record = self._fitted(lessons, keep=True)
        lessons.student.load_state_dict(cache.load("weights", key))
        return Taught(lessons.student), Run("teacher", seed, **record)

    def lessons_of_teacher(self, seed: int) -> Lessons:
        """The teacher before its first update, with the gold labels it learns from."""
        teacher, model = self.teacher, self.new_teacher(seed)
        text = self.parts.labelled[: len(self.parts.labelled) - teacher.unseen]
        if teacher.sees == "all":
            text += [s for s in self.parts.transfer_gold if s.spans is not None]
        settings = Settings(teacher.updates, teacher.batch, teacher.rate, seed=seed)
        loss = self._loss(METHODS["student alone"], None)
        return Lessons(model, model, model.encode(text), loss, settings, TEACHER)


TEACHER = ["teacher"]  # what marks a teacher's own lessons
IMITATION = Method("general stage", "adaptive, stage 1", methods.imitation)


def shape(encoder: Transformer) -> tuple[int, int]:
    """Heads and width of an encoder's layers."""
    config = encoder.model.config
    return config.num_attention_heads, config.hidden_size


def named(method: str | Method) -> Method:
    """A method by name; ValueError, naming those there are, for an unknown one."""
    return method if isinstance(method, Method) else methods.chosen([method])[0]
