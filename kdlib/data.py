"""Data sets by name, found in a folder or on the hub; the files themselves are read by `readers`."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub

from kdlib.labels import to_spans
from kdlib.readers import DataError, Sentence, read, tidy_passages, write_json_lines

__all__ = ["DataError", "Dataset", "Sentence", "load", "locate", "read", "write_json_lines"]
SPLITS = ("train", "dev", "test")
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Dataset:
    """A named data set: train, dev and test sentences, and the entity types they use."""

    name: str
    train: list[Sentence]
    dev: list[Sentence]
    test: list[Sentence]

    @property
    def types(self) -> list[str]:
        """Entity types in alphabetical order."""
        return sorted({span.type for part in (self.train, self.dev, self.test) for s in part for span in s.spans or ()})


@dataclass(frozen=True)
class Parts:
    """A data set as a study divides it; `transfer_gold` is seen by no one but a teacher that sees all."""

    types: list[str]
    labelled: list[Sentence]
    transfer_gold: list[Sentence]
    dev: list[Sentence]
    test: list[Sentence]

    @property
    def transfer(self) -> list[Sentence]:
        """The text for transfer, labels taken off."""
        return [s.without_labels() for s in self.transfer_gold]


@dataclass(frozen=True)
class _Source:
    """Where a named data set lies: files under $KDLIB_DATA/<name>, or (repository, configuration) on the hub."""

    files: tuple[str | None, str | None, str | None]
    hub: tuple[str, str | None]
    clean: Callable[[str], str] = str


SOURCES = {
    "conll2003": _Source(("train.txt", "valid.txt", "test.txt"), ("lhoestq/conll2003", None)),
    "conll2000": _Source(("train.txt", None, "test.txt"), ("eriktks/conll2000", None)),
    "wikiann_en": _Source(("train", "dev", "test"), ("unimelb-nlp/wikiann", "en"), lambda w: w.removeprefix("en:")),
    "wnut17": _Source(("wnut17train.conll", "emerging.dev.conll", "emerging.test.annotated"), ("leondz/wnut_17", None)),
    "ncbi_disease": _Source(("train.tsv", "devel.tsv", "test.tsv"), ("ncbi/ncbi_disease", None)),
    "weibo": _Source(
        ("weiboNER_2nd_conll.train", "weiboNER_2nd_conll.dev", "weiboNER_2nd_conll.test"),
        ("hltcoe/weibo_ner", None),
        lambda w: re.sub(r"(?<=.)\d+$", "", w),  # each character carries its position in its word, 0 to 10 and more
    ),
}

OPEN = {"gliner": ("gliner/medical", None), "pile-mistral": ("pile-mistral", "urchade/pile-mistral-v0.1")}  # folder, hub name
NAMES = ("demo", "demo-fine", *SOURCES, *OPEN)
LONGEST = 80  # words kept of a passage with open types


def printable(name: str, words: Sequence[str]) -> list[str]:
    """The words, or their places alone if they are a named corpus's: its terms let none of its text into a figure."""
    return [str(i) for i in range(1, len(words) + 1)] if name in (*SOURCES, *OPEN) else list(words)


def load(name: str) -> Dataset:
    """A data set by name (`demo`, `demo-fine`, one of SOURCES or OPEN), or a folder of the user's own with train, dev and test files.

    Named sets are looked for under `$KDLIB_DATA/<name>/`, then on the hub if `datasets` is installed. A set without a dev part gives
    every tenth training sentence to dev. FileNotFoundError names what would have worked.
    """
    if name in ("demo", "demo-fine"):
        from kdlib import demo

        return demo.load("fine" if name == "demo-fine" else "coarse")
    if name in OPEN:
        return _open_corpus(name)
    files = locate(name)
    clean = SOURCES[name].clean if name in SOURCES else str
    train, dev, test = [file and read(file, clean=clean) for file in files] if files else _from_hub(name)
    if dev is None:
        dev, train = train[::10], [s for i, s in enumerate(train) if i % 10]
        if not train:
            raise ValueError(f"{name}: expected more training sentences to take dev from, got {len(dev)}")
    return Dataset(Path(name).name, train, dev, test)


def locate(name: str) -> list[Path | None]:
    """The train, dev (None: it has none) and test files of a data set on this machine; [] for a named set that only the hub has."""
    if name in ("demo", "demo-fine"):
        return [ROOT / "data" / "demo" / f"{split}.jsonl" for split in SPLITS]
    if name in OPEN:
        return _open_files(name)
    if name in SOURCES:
        folder = Path(os.environ.get("KDLIB_DATA", "")) / name
        if "KDLIB_DATA" not in os.environ or not folder.is_dir():
            return []
        return [file and folder / file for file in SOURCES[name].files]
    if not Path(name).is_dir():
        raise FileNotFoundError(f"no data set {name!r}: expected one of {sorted(NAMES)}, or a folder")
    return [_only_file(Path(name), stems) for stems in (("train",), ("dev", "devel", "valid", "validation"), ("test",))]


def _open_files(name: str) -> list[Path]:
    """The JSON files of a corpus with open types; [] where only the hub has it."""
    folder = Path(os.environ.get("KDLIB_DATA", "")) / OPEN[name][0]
    return sorted(folder.glob("*.json")) if "KDLIB_DATA" in os.environ else []


def _open_corpus(name: str) -> Dataset:
    """A corpus in GLiNER's JSON: the last 400 passages for test, the 200 before them for dev, cleaned by `readers.tidy_passages`."""
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
        folder = huggingface_hub.snapshot_download(OPEN[name][1], repo_type="dataset", allow_patterns="*.json")
    except (OSError, ValueError, RuntimeError) as error:
        raise FileNotFoundError(f"{name}: the hub gave no {OPEN[name][1]} ({error}); {hint}") from error
    return sorted(Path(folder).rglob("*.json"))


def _only_file(folder: Path, stems: tuple[str, ...]) -> Path | None:
    """The one file of a folder with one of these names before its ending; None if dev is not there, an error otherwise."""
    found = sorted(f for f in folder.iterdir() if f.is_file() and f.name.split(".")[0] in stems)
    if len(found) > 1 or (not found and "dev" not in stems):
        raise FileNotFoundError(
            f"{folder}: expected one file named {' or '.join(stems)}, got {[f.name for f in found] or 'none'}"
        )
    return found[0] if found else None


def _from_hub(name: str) -> list[list[Sentence] | None]:
    repository, configuration = SOURCES[name].hub
    hint = f"put its files under $KDLIB_DATA/{name} (see data/README.md)"
    try:
        import datasets
    except ImportError as error:
        raise FileNotFoundError(f"{name} is not on this machine: {hint}, or `pip install datasets`") from error
    revision = None if configuration or "lhoestq" in repository else "refs/convert/parquet"  # script data sets no longer load
    try:
        parts = datasets.load_dataset(repository, configuration, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        raise FileNotFoundError(f"{name}: the hub gave no {repository} ({error}); {hint}") from error
    wanted = ("train", "validation", "test")
    return [_from_features(parts[split]) if split in parts else None for split in wanted]


def _from_features(part: "datasets.Dataset") -> list[Sentence]:  # noqa: F821
    column = next(c for c in ("ner_tags", "chunk_tags") if c in part.features)
    names = part.features[column].feature.names
    return [Sentence(tuple(r["tokens"]), to_spans([names[t] for t in r[column]])) for r in part if r["tokens"]]
