"""Your teacher, your text: a small tagger that says what the teacher says, and what that costs."""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import AutoConfig

from kdlib.lab import cache, scores, targets, timing, train
from kdlib.lab.study import Budget, Fitted, Study
from kdlib.methods import METHODS, Method
from kdlib.models import Tagger
from kdlib.ship import cards, runtime
from kdlib.ship.export import export
from kdlib.students import Lstm, Student, Thin, Twin
from kdlib.teachers import gliner
from kdlib.teachers.gliner import Told
from kdlib.teachers.tagger import from_hugging_face
from kdlib.text import calls
from kdlib.text.corpora import CLOSED, Parts
from kdlib.text.readers import DataError, read
from kdlib.text.tags import Sentence, Span, split_tag
from kdlib.twin_tower import TwinTower

LONGEST = 80  # words of a piece of text that is learnt from
HELD_OUT = 0.15  # of the text: half to choose thresholds on, half to be tested on
FEWEST = 200  # pieces of text
PASSES = 40  # over the text, at most
GRID = np.arange(0, 1, 0.05)  # thresholds tried


@dataclass(frozen=True)
class Gate:
    """What a student must reach on held-out text against its teacher, in percent: F1 of agreement,
    and recall of each type that the teacher finds often enough to tell."""

    agreement: float = 90.0
    recall: float = 80.0
    often: int = 20


@dataclass(frozen=True)
class Kept(Lstm):
    """A BiLSTM whose weights a study keeps."""

    keeps = True


Reads = Callable[[str | Path], list[Sentence]]
KINDS: dict[str, Student] = {"bilstm": Kept(), "thin": Thin(), "twin": Twin()}


class Teacher(NamedTuple):
    """types: what it can find. of: what a Study of some parts takes. speaks: its entities of one
    text, for its speed; None for labels alone. labelled: what it has said already."""

    types: list[str]
    of: Callable[[Parts], Told | Fitted | str]
    speaks: Callable[[str], list[dict[str, Any]]] | None
    labelled: list[Sentence]


def distil(
    teacher: str,
    out: str | Path,
    text: str | Path | None = None,
    labels: Sequence[str] = (),
    gold: str | Path | None = None,
    student: str = "bilstm",
    minutes: float = 10.0,
    columns: Sequence[str] = (),
    skip_bad: bool = False,
    gate: Gate = Gate(),
    encoder: str = "minilm",
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train a small tagger on what the teacher says of your text, write it to `out`, and return
    its card; one that fails the gate goes to `out`.rejected instead, "passed" False.

    teacher: a GLiNER, a Hugging Face token classifier or a kdlib tagger, by folder or hub name; or
    a spaCy pipeline's folder, or a file of sentences that anything has labelled: these have no
    probabilities, so their labels are learnt as they are. text: a file of lines, a folder of .txt
    files, or what `readers.read` knows. labels: what to ask a GLiNER for. gold: labelled sentences,
    two thirds to learn from, a third to be tested on. student: 'bilstm'; 'thin', a Transformer of
    three narrow layers; or 'twin', a twin tower, which can be asked for other labels too. minutes:
    of training, on this machine; reading by the teacher comes before. columns: of CoNLL files,
    "word" and "tag" among them, if not the first and the last. skip_bad: leave out and count what
    cannot be read, instead of stopping.

    Started again after a stop it goes on where it was. ValueError, before anything is trained, for
    too little text, labels that the teacher lacks, gold of other types.
    """
    if student not in KINDS:
        raise ValueError(f"student: expected one of {list(KINDS)}, got {student!r}")
    if not 0 < minutes <= 24 * 60:
        raise ValueError(f"minutes: expected more than 0 and at most a day, got {minutes}")
    out = Path(out).expanduser()
    rejected = out.with_name(f"{out.name}.rejected")
    for folder in (out, rejected):  # before an hour's work, not after it
        if folder.exists() and not (folder / runtime.CONFIG).is_file() and not _is_empty(folder):
            raise FileExistsError(
                f"{folder}: expected a new folder or an earlier student, got other files"
            )
    left_out: list[DataError] = []
    reads = partial(read, columns=columns, skip=left_out.append if skip_bad else None)
    read_of = pieces_of(text, reads) if text else []
    own = teacher_of(teacher, labels, read_of, reads)
    learnt, tested = _gold(gold, own.types, reads)
    told = {s.tokens for s in tested}
    pieces = [s for s in own.labelled or read_of if s.tokens not in told]
    if len(pieces) < FEWEST:
        raise ValueError(f"text: expected at least {FEWEST} different pieces, got {len(pieces)}")
    for error in left_out:
        say(f"left out: {error}")
    cut = len(pieces) - int(HELD_OUT * len(pieces))
    middle = (cut + len(pieces)) // 2
    dev, test = pieces[cut:middle], pieces[middle:]
    if own.labelled:
        parts = Parts(own.types, learnt + pieces[:cut], [], dev, test)
        method, how = METHODS["student alone"], "its labels as they are (pseudo-labels)"
    else:
        parts = Parts(own.types, learnt, pieces[:cut], dev, test + tested)
        best = METHODS["soft targets" if student == "twin" else "structural"]
        method = best.tuned(alpha=0.5 if learnt else 0.0)
        how = f"{method.name} distillation"
    say(f"{teacher}: {len(own.types)} types, {', '.join(own.types[:8])}; {how}")
    say(f"{cut:,} pieces of text to learn from, {len(pieces) - cut:,} held out")
    say(f"{len(learnt):,} gold sentences to learn from, {len(tested):,} to be tested on")
    study = Study(parts, own.of(parts), Budget(), encoder, students=KINDS)
    of_gold = None
    if not own.labelled:  # of held-out text, what the teacher says is the reference
        said = iter(targets.entities(study.taught(0)[0], [*dev, *test, *tested]))
        dev, test = ([Sentence(s.tokens, next(said)) for s in part] for part in (dev, test))
        of_gold = list(said)
        study = replace(study, parts=replace(parts, dev=dev, test=test))
    study = study.with_budget(_budget(study, method, student, minutes, teacher))
    say(f"{study.budget.updates:,} updates of {study.budget.batch}, about {minutes:g} minutes")
    tagger, _ = study.trained(method, student, 0)
    with tempfile.TemporaryDirectory() as scratch:
        thresholds = choose_thresholds(tagger, own.types, dev, Path(scratch) / "student")
        export(tagger, Path(scratch) / "chosen", thresholds, labels=own.types)
        card = measure(Path(scratch) / "chosen", tagger, own, test)
        if tested:
            card |= on_gold(runtime.load(Path(scratch) / "chosen"), tested, of_gold)
    card |= {"student": student, "open": isinstance(tagger, TwinTower)}
    card |= {"teacher": teacher, "method": how, "updates": study.budget.updates}
    card |= {"pieces of text": cut, "gold sentences": len(learnt), "thresholds": thresholds}
    card["failed"] = failures(card, gate)
    target = rejected if card["failed"] else out
    export(tagger, target, thresholds, cards.markdown(card), own.types)
    say(cards.markdown(card))
    for text in card["disagreements"]:
        say(f"they disagree most on: {text}")
    say(f"written to {target}")
    return card | {"passed": not card["failed"]}


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


# ---- what comes in ----


def pieces_of(source: str | Path, reads: Reads = read) -> list[Sentence]:
    """Text without labels, each piece at most LONGEST words, none twice. ValueError for a file that
    is no text."""
    source = Path(source).expanduser()
    if not source.exists():
        raise FileNotFoundError(f"text: expected a file or a folder, got nothing at {source}")
    inside = sorted(f for f in source.rglob("*") if f.is_file() and f.suffix.lower() == ".txt")
    files = inside if source.is_dir() else [source]
    if not files:
        raise ValueError(f"{source}: expected .txt files in the folder, got none")
    found: dict[tuple[str, ...], None] = {}
    for file in files:
        for line in _lines(file, reads):
            for words in calls.windows(line, LONGEST):
                found[tuple(line[a:b] for a, b in words)] = None
    return [Sentence(tokens) for tokens in found]


def _lines(file: Path, reads: Reads) -> list[str]:
    if file.suffix.lower() not in ("", ".txt", ".md"):
        return [" ".join(s.tokens) for s in reads(file)]
    try:
        text = file.read_text(encoding="utf8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected text in UTF-8, got {error.reason}") from None
    if "\0" in text:
        raise ValueError(f"{file}: expected text, got a file with NUL bytes")
    return text.split("\n")


def in_words(sentence: Sentence) -> Sentence:
    """A labelled sentence in the words that the student will read: `calls.windows` of its tokens
    with spaces between them, entities over the same characters."""
    tokens = [token.strip() for token in sentence.tokens]
    text, places = " ".join(tokens), token_places(tokens)
    words = next(calls.windows(text, len(text) + 1), [])
    found = [
        {"start": places[s.start][0], "end": places[s.end - 1][1], "label": s.type}
        for s in sentence.spans or ()
    ]
    return Sentence(tuple(text[a:b] for a, b in words), over_words(words, found))


def over_words(
    words: Sequence[tuple[int, int]], entities: Iterable[dict[str, Any]]
) -> tuple[Span, ...]:
    """Entities in characters as spans over every word that they touch; of two on one word the
    longer one."""
    spans = []
    for e in entities:
        touched = [i for i, (a, b) in enumerate(words) if a < e["end"] and e["start"] < b]
        if touched:
            spans.append(Span(touched[0], touched[-1] + 1, e["label"]))
    taken: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.start - s.end, s)):
        if all(span.end <= t.start or t.end <= span.start for t in taken):
            taken.append(span)
    return tuple(sorted(taken))


def token_places(tokens: Sequence[str]) -> list[tuple[int, int]]:
    """Where each token begins and ends in the tokens with spaces between them."""
    ends = accumulate(len(token) + 1 for token in tokens)
    return [(end - 1 - len(token), end - 1) for token, end in zip(tokens, ends, strict=True)]


def _gold(
    file: str | Path | None, types: Sequence[str], reads: Reads
) -> tuple[list[Sentence], list[Sentence]]:
    if file is None:
        return [], []
    found = reads(file)
    if any(s.spans is None for s in found):
        raise ValueError(f"{file}: expected labels in every sentence, got text alone")
    strange = sorted({x.type for s in found for x in s.spans} - set(types))
    if strange:
        raise ValueError(f"{file}: expected the teacher's types {list(types)}, got {strange} too")
    once = {s.tokens: s for s in map(in_words, found) if s.tokens}
    kept = list(once.values())
    return [s for i, s in enumerate(kept) if i % 3], kept[::3]


def teacher_of(
    name: str, labels: Sequence[str] = (), text: Sequence[Sentence] = (), reads: Reads = read
) -> Teacher:
    """Any teacher by file, folder or hub name; a spaCy pipeline reads the text at once. ValueError
    for labels where a teacher has its own, or none, or too many, where it must be asked."""
    folder = Path(name).expanduser()
    name = str(folder) if name.startswith("~") else name
    if folder.is_file():
        if labels:
            raise ValueError(f"labels: expected none, as {folder} has its own, got {list(labels)}")
        known = [in_words(s) for s in reads(folder) if s.spans is not None]
        labelled = list({s.tokens: s for s in known if s.tokens}.values())  # none twice
        types = sorted({x.type for s in labelled for x in s.spans})
        if not types:
            raise ValueError(f"{folder}: expected sentences with entities, got none")
        return Teacher(types, lambda parts: Fitted(), None, labelled)
    if (folder / "meta.json").is_file() and (folder / "config.cfg").is_file():
        return _spacy(folder, text)
    hub_gliner = not folder.is_dir() and "gliner" in name.lower()
    if (folder / "gliner_config.json").is_file() or hub_gliner:
        asked = sorted(calls.labels_of(list(labels)))
        if not 0 < len(asked) <= CLOSED:
            raise ValueError(f"labels: expected 1 to {CLOSED} for a GLiNER, got {len(asked)}")
        model = gliner.load(str(name))
        return Teacher(
            asked,
            lambda parts: targets.told(model, parts),
            lambda text: model.predict_entities(text, asked),
            [],
        )
    if (folder / "tagger.json").is_file():
        tagger = Tagger.from_pretrained(folder)
    else:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        own = sorted({split_tag(label)[1] for label in config.id2label.values()} - {""})
        tagger = from_hugging_face(str(name), own)
    types = sorted({split_tag(label)[1] for label in tagger.labels} - {""})
    if labels and set(labels) != set(types):
        raise ValueError(f"labels: expected none, or the teacher's own {types}, got {list(labels)}")

    def speaks(text: str) -> list[dict[str, Any]]:
        words = [word for part in calls.windows(text, LONGEST) for word in part]
        (found,) = tagger.predict([Sentence(tuple(text[a:b] for a, b in words))])
        ends = [(words[s.start][0], words[s.end - 1][1], s.type) for s in found]
        return [{"start": a, "end": b, "label": kind} for a, b, kind in ends]

    return Teacher(types, lambda parts: str(name), speaks, [])


def _spacy(folder: Path, text: Sequence[Sentence]) -> Teacher:
    """A spaCy pipeline, which tells entities and no probabilities."""
    import spacy

    nlp = spacy.load(folder)

    def speaks(text: str) -> list[dict[str, Any]]:
        ends = [(e.start_char, e.end_char, e.label_) for e in nlp(text).ents]
        return [{"start": a, "end": b, "label": kind} for a, b, kind in ends]

    labelled = [
        Sentence(s.tokens, over_words(token_places(s.tokens), speaks(" ".join(s.tokens))))
        for s in text
    ]
    types = sorted({x.type for s in labelled for x in s.spans})
    if not types:
        raise ValueError(
            f"{folder}: expected a pipeline that finds entities in this text, got none"
        )
    return Teacher(types, lambda parts: Fitted(), speaks, labelled)


# ---- training ----


def _budget(study: Study, method: Method, student: str, minutes: float, teacher: str) -> Budget:
    """As many updates as fit, measured on a few; remembered, so that a run that was stopped goes on
    with the same number."""
    parts = study.parts
    key = cache.digest(
        "plan",
        [s.tokens for s in parts.text],
        method.content(),
        student,
        minutes,
        teacher,
        study.encoder,
    )

    def make() -> dict[str, int]:
        own, few = study.lessons(method, student, 0), 20
        settings = replace(own.settings, steps=few, evaluations=1)
        seconds = train.fit(own.model, own.rows, own.loss, settings)[-1]["seconds"] / few
        most = PASSES * len(own.rows.lengths) // settings.batch_size
        return {"updates": max(50, min(int(60 * minutes / seconds), most) // 10 * 10)}

    return Budget(cache.record("plans", key, make)["updates"])


def choose_thresholds(
    tagger: Tagger | TwinTower, types: Sequence[str], dev: Sequence[Sentence], folder: Path
) -> dict[str, float]:
    """Per type the least score at which the shipped, quantised student agrees best with `dev`; of
    equals, as for a type that dev lacks, the one nearest to what `export` gives by default."""
    export(tagger, folder, {}, labels=types)
    student = runtime.load(folder)
    default = student.thresholds
    found = {float(least): predict(student, dev, float(least)) for least in GRID}

    def agreement(kind: str, least: float) -> float:
        both = [s.spans for s in dev], found[least]
        own = ([{x for x in spans if x.type == kind} for spans in side] for side in both)
        return float(scores.f1(scores.counts(*own)))

    def best(kind: str) -> float:
        return max(found, key=lambda x: (agreement(kind, x), -abs(x - default[kind])))

    return {kind: best(kind) for kind in student.labels}


def scored(
    student: runtime.Student, sentences: Sequence[Sentence], threshold: float | None = None
) -> list[list[tuple[Span, float]]]:
    """The student's entities of sentences as spans over their words, with their scores."""
    found = student.inference([" ".join(s.tokens) for s in sentences], threshold=threshold)
    return [
        [(span, e["score"]) for e in own for span in over_words(token_places(s.tokens), [e])]
        for s, own in zip(sentences, found, strict=True)
    ]


def predict(
    student: runtime.Student, sentences: Sequence[Sentence], threshold: float | None = None
) -> list[tuple[Span, ...]]:
    """The same without scores."""
    found = scored(student, sentences, threshold)
    return [tuple(dict.fromkeys(span for span, _ in own)) for own in found]


# ---- what comes out ----


def measure(
    folder: Path, tagger: Tagger | TwinTower, teacher: Teacher, test: Sequence[Sentence]
) -> dict[str, Any]:
    """What stands on the card: agreement on held-out text, size, speed, int8's cost."""
    small, whole = (runtime.load(folder, int8=int8) for int8 in (True, False))
    said = [s.spans for s in test]
    found, in_full = predict(small, test), predict(whole, test)
    counted = scores.counts(said, found)
    card: dict[str, Any] = {"agreement": float(scores.f1(counted)), "types": teacher.types}
    card["int8 - fp32"] = scores.paired_bootstrap(counted, scores.counts(said, in_full))
    card["recall"], card["found"] = {}, {}
    for kind in teacher.types:
        there = [{s for s in spans if s.type == kind} for spans in said]
        right = sum(len(a & set(b)) for a, b in zip(there, found, strict=True))
        card["found"][kind] = sum(map(len, there))
        card["recall"][kind] = 100 * right / max(card["found"][kind], 1)
    card["disagreements"] = _disagreements(test, found)
    card["reliability"] = reliability(small, test)
    card["parameters"] = tagger.parameters_in_all
    sizes = (folder / "onnx" / "model_int8.onnx", folder / "tokenizer.json")
    card["MB"] = sum(f.stat().st_size for f in sizes) / 1e6
    texts = [" ".join(s.tokens) for s in test[:64]]
    own = {"student": lambda i: small.predict_entities(texts[i])}
    if teacher.speaks is not None:
        own["teacher"] = lambda i: teacher.speaks(texts[i])
    taken = timing.in_turns(own, len(texts), 6.0)
    words = float(np.mean([len(s.tokens) for s in test[:64]]))
    card["speed"] = {
        name: {"p50": float(np.median(ms)), "p95": float(np.quantile(ms, 0.95))}
        | {"words a second": 1000 * words / float(np.mean(ms))}
        for name, ms in taken.items()
    }
    return card


def reliability(student: runtime.Student, test: Sequence[Sentence]) -> list[dict[str, float]]:
    """By score, in tenths: how many entities have it, their mean score, the share the teacher has
    too."""
    answers = zip(test, scored(student, test), strict=True)
    found = [(score, span in s.spans) for s, own in answers for span, score in own]
    out = []
    for tenth in range(10):
        own = [x for x in found if min(int(10 * x[0]), 9) == tenth]
        if own:
            score, right = np.mean(own, 0)
            out.append({"entities": len(own), "score": float(score), "right": float(right)})
    return out


def on_gold(
    student: runtime.Student, gold: Sequence[Sentence], said: list[tuple[Span, ...]] | None
) -> dict[str, Any]:
    """F1 by type of the student, and of its teacher where it has said something of these."""
    found, there = predict(student, gold), [s.spans for s in gold]
    if said is None:
        return {"gold": {"student": scores.per_type(gold, found)}}
    both = {"student": scores.per_type(gold, found), "teacher": scores.per_type(gold, said)}
    counted = scores.counts(there, found), scores.counts(there, said)
    return {"gold": both, "student - teacher": scores.paired_bootstrap(*counted)}


def _disagreements(test: Sequence[Sentence], found: Sequence[tuple[Span, ...]]) -> list[str]:
    """The sentences they disagree on most; shown, never stored."""
    wrong = [len(set(s.spans) ^ set(f)) for s, f in zip(test, found, strict=True)]
    worst = sorted(range(len(test)), key=lambda i: -wrong[i])[:5]
    return [" ".join(test[i].tokens)[:200] for i in worst if wrong[i]]


def failures(card: dict[str, Any], gate: Gate) -> list[str]:
    """What keeps a student from passing, a line each."""
    out = []
    if card["agreement"] < gate.agreement:
        out.append(f"agreement F1 {card['agreement']:.1f}, expected {gate.agreement:g} or more")
    for kind, recall in card["recall"].items():
        if card["found"][kind] >= gate.often and recall < gate.recall:
            out.append(f"recall of {kind} {recall:.1f}, expected {gate.recall:g} or more")
    return out
