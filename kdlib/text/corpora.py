"""Data sets by name, found in a folder or on the hub, and how a study divides one."""

import os
import random
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import huggingface_hub
import numpy as np

from kdlib.text import demo
from kdlib.text.demo import SPLITS
from kdlib.text.readers import DataError, documents_of, read, tidy_passages
from kdlib.text.tags import Sentence, Unfit, spoil, to_iob2, to_spans

IN_WORDS = {
    "PER": "person",
    "LOC": "location",
    "ORG": "organization",
    "MISC": "miscellaneous",
    "ANI": "animal",
    "PLT": "plant",
}
CLOSED = 40  # up to so many types, a sentence is asked for all of them


@dataclass(frozen=True)
class Dataset:
    """A named data set: train, dev and test sentences, and the entity types they use.

    documents: how many sentences each document of test has, where its file marks documents.
    repeated: how many training sentences were left out, as they stand in dev or test too.
    """

    name: str
    train: list[Sentence]
    dev: list[Sentence]
    test: list[Sentence]
    documents: tuple[int, ...] = ()
    repeated: int = 0

    @property
    def types(self) -> list[str]:
        """Entity types in alphabetical order."""
        return sorted(
            {
                span.type
                for part in (self.train, self.dev, self.test)
                for s in part
                for span in s.spans or ()
            }
        )


@dataclass(frozen=True)
class Parts:
    """A data set as a study divides it.

    `transfer_gold` has labels that nobody sees but a teacher that sees all and the ceiling 'gold on
    transfer'; `teaching` are labelled sentences that a teacher trained here reads, and no student.
    `mentions`: the type of every labelled entity, from which further types to ask for are drawn.
    `documents`: how many sentences each document of test has; empty where none are marked.
    """

    types: list[str]
    labelled: list[Sentence]
    transfer_gold: list[Sentence]
    dev: list[Sentence]
    test: list[Sentence]
    teaching: list[Sentence] = field(default_factory=list)
    mentions: list[str] = field(default_factory=list)
    documents: tuple[int, ...] = ()

    @property
    def transfer(self) -> list[Sentence]:
        """The text for transfer, labels taken off."""
        return [s.without_labels() for s in self.transfer_gold]

    @property
    def text(self) -> list[Sentence]:
        """What a distilled student reads: the labelled sentences, then those for transfer."""
        return self.labelled + self.transfer

    def first(self, size: int) -> "Parts":
        """The same with only the first `size` sentences of `text`; ValueError where there are
        fewer."""
        known, most = len(self.labelled), len(self.labelled) + len(self.transfer_gold)
        if not 0 < size <= most:
            raise ValueError(f"size: expected 1 to {most} sentences, got {size}")
        cut = self.transfer_gold[: max(0, size - known)]
        return replace(self, labelled=self.labelled[:size], transfer_gold=cut)

    def asked(self, sentence: Sentence) -> tuple[str, ...]:
        """The types a sentence is asked for: all where there are few.

        Where there are many: its own and as many others, at least 4, drawn from the mentions, for
        sentences whose gold labels may be known; 8 drawn ones for text, so that its gold labels do
        not show in the question.
        """
        if len(self.types) <= CLOSED:
            return tuple(self.types)
        own = set() if sentence.spans is None else {s.type for s in sentence.spans}
        rng = random.Random(zlib.crc32(" ".join(sentence.tokens).encode("utf8", "surrogatepass")))
        others = 8 if sentence.spans is None else max(4, len(own))
        wanted = min(len(own) + others, len(own | set(self.mentions)))
        chosen = sorted(own)
        while len(chosen) < wanted:
            other = rng.choice(self.mentions)
            if other not in chosen:
                chosen.append(other)
        rng.shuffle(chosen)
        return tuple(chosen)


def shuffled(
    dataset: Dataset, labelled: int = 0, transfer: int = 0, dev: int = 0, test: int = 0
) -> Parts:
    """The first `labelled` sentences of a fixed shuffle of train, the next `transfer` ones, and the
    first of dev and test; 0 takes all there are. ValueError where there are too few."""
    sizes = {"labelled": labelled, "transfer": transfer, "dev": dev, "test": test}
    for name, value in sizes.items():
        if type(value) is not int or value < 0:
            raise ValueError(f"{name}: expected a whole number, 0 or more, got {value!r}")
    with_gold = [s for s in dataset.train if s.spans is not None]
    text = [s for s in dataset.train if s.spans is None]
    mixed = [with_gold[i] for i in _permutation(len(with_gold))]
    cut = labelled or len(mixed)
    rest = mixed[cut:] + text
    if cut > len(mixed) or transfer > len(rest):
        raise ValueError(
            f"{dataset.name}: expected at most {len(mixed)} labelled and {len(rest)} further "
            f"sentences, got labelled={labelled}, transfer={transfer}"
        )
    ends = dataset.dev[: dev or None], dataset.test[: test or None]
    for name, end in zip(("dev", "test"), ends, strict=True):
        if any(s.spans is None for s in end):
            raise ValueError(f"{dataset.name}: expected labels in all of {name}, got text alone")
    whole = dataset.documents if test in (0, len(dataset.test)) else ()
    return Parts(dataset.types, mixed[:cut], rest[: transfer or None], *ends, documents=whole)


def _permutation(n: int) -> list[int]:
    """`torch.randperm` with the seed 0, without torch: Fisher and Yates by the Mersenne twister."""
    order = list(range(n))
    drawn = np.random.RandomState(0).randint(0, 2**32, max(n - 1, 0), np.uint32).tolist()
    for i, number in enumerate(drawn):
        j = i + number % (n - i)
        order[i], order[j] = order[j], order[i]
    return order


def in_file_order(
    dataset: Dataset,
    labelled: int,
    teaching: int = 0,
    transfer: int = 0,
    dev: int = 0,
    test: int = 0,
) -> Parts:
    """The first `labelled` training sentences, then those for teaching, then transfer (0: the
    rest); the first of dev, the last of test (0: all). Types become words. ValueError for too few.
    """
    parts = {
        name: [in_words(s) for s in getattr(dataset, name) if s.spans is not None]
        for name in SPLITS
    }
    types = sorted({span.type for part in parts.values() for s in part for span in s.spans})
    if not (types and parts["dev"] and parts["test"]) or min(dev, test, transfer) < 0:
        raise ValueError(
            f"{dataset.name}: expected entities, dev and test sentences, and sizes of 0 or more, "
            f"got {len(types)} types, {len(parts['dev'])} and {len(parts['test'])} sentences, "
            f"transfer={transfer}, dev={dev}, test={test}"
        )
    train, seen = parts["train"], labelled + teaching
    end = seen + transfer if transfer else len(train)
    if not (labelled > 0 and teaching >= 0 and seen <= end <= len(train)):
        raise ValueError(
            f"{dataset.name}: expected labelled, teaching and transfer sentences out of "
            f"{len(train)}, got labelled={labelled}, teaching={teaching}, transfer={transfer}"
        )
    return Parts(
        types,
        train[:labelled],
        train[seen:end],
        parts["dev"][: dev or None],
        parts["test"][-test:],
        train[labelled:seen],
        [span.type for s in train[:labelled] for span in s.spans],
    )


def in_words(sentence: Sentence) -> Sentence:
    """The sentence with its types as words one can ask for: 'person' for 'PER'."""
    spans = (s._replace(type=IN_WORDS.get(s.type, s.type.lower())) for s in sentence.spans)
    return replace(sentence, spans=tuple(spans))


def with_noise(parts: Parts, share: float, clean: int = 0) -> Parts:
    """The parts with so large a share of their training entities mislabelled, half of these missed;
    the last `clean` labelled sentences are spared. ValueError for a share that is none."""
    if not 0 <= share <= 1:
        raise ValueError(f"noise: expected a share from 0 to 1, got {share}")
    rng = random.Random(0)
    others = {kind: [t for t in parts.types if t != kind] for kind in parts.types}

    def careless(s: Sentence) -> Sentence:
        if s.spans is None:
            return s
        return replace(s, spans=spoil(s.spans, others, share / 2, share / 2, rng))

    cut = len(parts.labelled) - clean
    spoilt = [careless(s) for s in parts.labelled[:cut]] + parts.labelled[cut:]
    return replace(parts, labelled=spoilt, transfer_gold=[careless(s) for s in parts.transfer_gold])


@dataclass(frozen=True)
class _Source:
    """Where a named data set lies: files under $KDLIB_DATA/<name>, or (repository, configuration)
    on the hub."""

    files: tuple[str | None, str | None, str | None]
    hub: tuple[str, str | None]
    clean: Callable[[str], str] = str


SOURCES = {
    "conll2003": _Source(("train.txt", "valid.txt", "test.txt"), ("lhoestq/conll2003", None)),
    "conll2000": _Source(("train.txt", None, "test.txt"), ("eriktks/conll2000", None)),
    "wikiann_en": _Source(
        ("train", "dev", "test"), ("unimelb-nlp/wikiann", "en"), lambda w: w.removeprefix("en:")
    ),
    "wnut17": _Source(
        ("wnut17train.conll", "emerging.dev.conll", "emerging.test.annotated"),
        ("leondz/wnut_17", None),
    ),
    "ncbi_disease": _Source(("train.tsv", "devel.tsv", "test.tsv"), ("ncbi/ncbi_disease", None)),
    "weibo": _Source(
        ("weiboNER_2nd_conll.train", "weiboNER_2nd_conll.dev", "weiboNER_2nd_conll.test"),
        ("hltcoe/weibo_ner", None),
        lambda w: re.sub(
            r"(?<=.)\d+$", "", w
        ),  # each character carries its position in its word, 0 to 10 and more
    ),
}

OPEN = {
    "gliner": ("gliner/medical", None),
    "pile-mistral": ("pile-mistral", "urchade/pile-mistral-v0.1"),
}  # folder, hub name
DEMOS = ("demo", "demo-fine", "demo-large")  # coarse, fine, coarse with demo.FURTHER more
NAMES = (*DEMOS, *SOURCES, *OPEN)
LONGEST = 80  # words kept of a passage with open types


def printable(name: str, words: Sequence[str]) -> list[str]:
    """The words, or their places alone if they are a named corpus's: its terms let none of its text
    into a figure."""
    return [str(i) for i in range(1, len(words) + 1)] if name in (*SOURCES, *OPEN) else list(words)


def load(name: str) -> Dataset:
    """A data set by name (one of DEMOS, SOURCES or OPEN), or a folder of the user's own with train,
    dev and test files.

    Named sets are looked for under `$KDLIB_DATA/<name>/`, then on the hub if `datasets` is
    installed. A set without a dev part gives every tenth training sentence to dev. Training
    sentences of a named set that stand in its dev or test part too are left out.
    FileNotFoundError names what would have worked.
    """
    if name in DEMOS:
        if name == "demo-large":  # written by the same hand as the files, and never stored
            parts = list(demo.generate(further=demo.FURTHER).values())
        else:
            parts = [read(file) for file in locate(name)]
        fine = name == "demo-fine"
        return Dataset(name, *(p if fine else [demo.coarse(s) for s in p] for p in parts))
    if name in OPEN:
        return _open_corpus(name)
    files = locate(name)
    clean = SOURCES[name].clean if name in SOURCES else str
    train, dev, test = (
        [file and read(file, clean=clean) for file in files] if files else _from_hub(name)
    )
    if dev is None:
        dev, train = train[::10], [s for i, s in enumerate(train) if i % 10]
        if not train:
            raise ValueError(
                f"{name}: expected more training sentences to take dev from, got {len(dev)}"
            )
    if name not in SOURCES:
        for file, part in zip(files, (train, dev, test), strict=True):
            _check_tags(file, part)
        return Dataset(Path(name).name, train, dev, test)
    told = {s.tokens for s in (*dev, *test)}
    kept = [s for s in train if s.tokens not in told]
    documents = tuple(documents_of(files[2]) if files else ())
    return Dataset(name, kept, dev, test, documents, len(train) - len(kept))


def _check_tags(file: Path | None, sentences: Sequence[Sentence]) -> None:
    """DataError, with file and sentence, for entities that overlap: no tags can say them."""
    for number, sentence in enumerate(sentences, 1):
        try:
            to_iob2(sentence.spans or (), len(sentence.tokens))
        except Unfit as error:
            raise DataError(file, f"sentence {number}", error.expected, error.got) from None


def locate(name: str) -> list[Path | None]:
    """The train, dev (None: it has none) and test files of a data set on this machine; [] for a
    named set that only the hub has."""
    if name in DEMOS:
        if not demo.FOLDER.is_dir():
            raise FileNotFoundError(
                f"{demo.FOLDER}: the demo corpus and the notebooks come with a checkout, not with "
                "an installed package: clone the repository, then `pip install -e .` in it"
            )
        return [demo.FOLDER / f"{split}.jsonl" for split in SPLITS]
    if name in OPEN:
        return _open_files(name)
    if name in SOURCES:
        folder = Path(os.environ.get("KDLIB_DATA", "")).expanduser() / name
        if "KDLIB_DATA" not in os.environ or not folder.is_dir():
            return []
        return [file and folder / file for file in SOURCES[name].files]
    if not Path(name).expanduser().is_dir():
        raise FileNotFoundError(
            f"no data set {name!r}: expected one of {sorted(NAMES)}, or a folder"
        )
    return [
        _only_file(Path(name).expanduser(), stems)
        for stems in (("train",), ("dev", "devel", "valid", "validation"), ("test",))
    ]


def _open_files(name: str) -> list[Path]:
    """The JSON files of a corpus with open types; [] where only the hub has it."""
    folder = Path(os.environ.get("KDLIB_DATA", "")).expanduser() / OPEN[name][0]
    return sorted(folder.glob("*.json")) if "KDLIB_DATA" in os.environ else []


def _open_corpus(name: str) -> Dataset:
    """A corpus in GLiNER's JSON: the last 400 passages for test, the 200 before them for dev,
    cleaned by `readers.tidy_passages`."""
    files = _open_files(name)
    if not files:
        files = _open_from_hub(name)
    passages = tidy_passages([s for file in files for s in read(file)], LONGEST)
    if len(passages) < 1000:
        raise ValueError(f"{name}: expected at least 1000 passages, got {len(passages)}")
    return Dataset(name, passages[:-600], passages[-600:-400], passages[-400:])


def _open_from_hub(name: str) -> list[Path]:
    hint = f"put its JSON files under $KDLIB_DATA/{OPEN[name][0]} (see data/README.md)"
    if OPEN[name][1] is None:
        raise FileNotFoundError(f"{name} is not on this machine: {hint}")
    try:
        folder = huggingface_hub.snapshot_download(
            OPEN[name][1], repo_type="dataset", allow_patterns="*.json"
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise FileNotFoundError(
            f"{name}: the hub gave no {OPEN[name][1]} ({error}); {hint}"
        ) from error
    return sorted(Path(folder).rglob("*.json"))


def _only_file(folder: Path, stems: tuple[str, ...]) -> Path | None:
    """The one file of a folder with one of these names before its ending; None if dev is not there,
    an error otherwise."""
    found = sorted(f for f in folder.iterdir() if f.is_file() and f.name.split(".")[0] in stems)
    if len(found) > 1 or (not found and "dev" not in stems):
        raise FileNotFoundError(
            f"{folder}: expected one file named {' or '.join(stems)}, got "
            f"{[f.name for f in found] or 'none'}"
        )
    return found[0] if found else None


def _from_hub(name: str) -> list[list[Sentence] | None]:
    repository, configuration = SOURCES[name].hub
    hint = f"put its files under $KDLIB_DATA/{name} (see data/README.md)"
    try:
        import datasets
    except ImportError as error:
        raise FileNotFoundError(
            f"{name} is not on this machine: {hint}, or `pip install datasets`"
        ) from error
    revision = (
        None if configuration or "lhoestq" in repository else "refs/convert/parquet"
    )  # script data sets no longer load
    try:
        parts = datasets.load_dataset(repository, configuration, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        raise FileNotFoundError(
            f"{name}: the hub gave no {repository} ({error}); {hint}"
        ) from error
    wanted = ("train", "validation", "test")
    return [_from_features(parts[split]) if split in parts else None for split in wanted]


def _from_features(part: "datasets.Dataset") -> list[Sentence]:  # noqa: F821
    column = next(c for c in ("ner_tags", "chunk_tags") if c in part.features)
    names = part.features[column].feature.names
    return [
        Sentence(tuple(r["tokens"]), to_spans([names[t] for t in r[column]]))
        for r in part
        if r["tokens"]
    ]
