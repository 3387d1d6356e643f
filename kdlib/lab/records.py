"""What is left of a run in the repository: what was declared, and what it got right, as numbers.

A corpus has one file of JSON lines, data/runs/<corpus>.jsonl. Tables, intervals and figures are
made from it in seconds on any machine, without the corpus. A line is one of three:

    a test set   {"test": digest, "types", "documents", "gold"}
    a run        {"declared": {...}, "test": digest, "parameters", "measures", "history", "wrong"}
    a doubt      {"of": a teacher as declared, "test": digest, "doubt"}

"gold", "wrong" and "doubt" are arrays of whole numbers, deflated and in base64: the gold entities
of each test sentence and type [n, types]; how many of them a run missed and how many it invented
[n, types, 2]; the teacher's mean entropy over each sentence's words [n], in 1e-4 nats. No word of a
corpus is among them, and no second either: times belong to the bench.
"""

import base64
import functools
import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdlib.lab import cache
from kdlib.lab.scores import Entities
from kdlib.text.files import ROOT, write_text

FOLDER = ROOT / "data" / "runs"


@dataclass(frozen=True)
class Record:
    """One run. declared: all that made it, in words and numbers. counts: right, predicted and gold
    entities a test sentence and type [n, types, 3]. documents: how many sentences each has."""

    declared: dict[str, Any]
    counts: np.ndarray
    types: list[str]
    documents: list[int]
    parameters: int
    measures: dict[str, float]
    history: list[dict]

    @property
    def test(self) -> str:
        """A digest of its test set."""
        content = json.dumps([self.counts[..., 2].tolist(), self.types, self.documents])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def units(self) -> np.ndarray:
        """Counts [n, 3] of what a bootstrap draws: documents where they are known, or sentences."""
        counted = self.counts.sum(1)
        if not self.documents:
            return counted
        starts = np.cumsum([0, *self.documents[:-1]])
        return np.add.reduceat(counted, starts, axis=0)


@dataclass(frozen=True)
class Doubt:
    """Of a teacher, as declared: the mean entropy of its words' labels by test sentence [n], in
    nats. test: the digest of the test set."""

    of: dict[str, Any]
    test: str
    entropy: np.ndarray


def per_sentence(reference: Entities, predicted: Entities, types: Sequence[str]) -> np.ndarray:
    """Right, predicted and gold entities of each sentence and type [n, types, 3]."""
    place = {kind: i for i, kind in enumerate(types)}
    out = np.zeros((len(reference), len(types), 3), dtype=np.int64)
    for i, (there, found) in enumerate(zip(reference, predicted, strict=True)):
        there, found = set(there), set(found)
        for column, spans in enumerate((there & found, found, there)):
            for span in spans:
                out[i, place[span.type], column] += 1
    return out


def file_of(corpus: str) -> Path:
    """Where a corpus's records lie."""
    return FOLDER / f"{corpus}.jsonl"


def read(corpus: str) -> list[Record]:
    """All runs of a corpus; [] where there are none yet. ValueError, with file and line, for a line
    that is no record."""
    return [own for own in _read(corpus) if isinstance(own, Record)]


def doubts(corpus: str) -> list[Doubt]:
    """How unsure its teachers are of test sentences, as far as that was noted."""
    return [own for own in _read(corpus) if isinstance(own, Doubt)]


def _read(corpus: str) -> list[Record | Doubt]:
    file = file_of(corpus)
    if not file.exists():
        return []
    now = file.stat()
    return _parsed(file, (now.st_ino, now.st_mtime_ns, now.st_size))


@functools.lru_cache(maxsize=4)
def _parsed(file: Path, stamp: tuple[int, ...]) -> list[Record | Doubt]:
    """What a file holds, parsed once for as long as its stamp stays: a grid of jobs asks often."""
    tests, found = {}, []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
            if "gold" in row:
                shape = row["sentences"], len(row["types"])
                tests[row["test"]] = row, _unpacked(row["gold"], shape)
                continue
            if "doubt" in row:
                doubts = _unpacked(row["doubt"], (tests[row["test"]][0]["sentences"],), "<u2") / 1e4
                doubts.setflags(write=False)
                found.append(Doubt(row["of"], row["test"], doubts))
                continue
            test, gold = tests[row["test"]]
            missed, invented = np.moveaxis(_unpacked(row["wrong"], (*gold.shape, 2)), -1, 0)
            right = gold - missed
            counts = np.stack([right, right + invented, gold], -1)
            counts.setflags(write=False)  # whoever asks shares it
            about = test["types"], test["documents"], row["parameters"]
            found.append(Record(row["declared"], counts, *about, row["measures"], row["history"]))
        except (KeyError, ValueError, TypeError, AttributeError, zlib.error) as error:
            raise ValueError(f"{file}:{number}: expected a record, got {error!r}") from None
    return found


def add(corpus: str, record: Record) -> None:
    """Append a run, and its test set before it where that is new. What is there stays as it is,
    byte by byte, and so does the file where the same run is there already."""
    right, guessed, gold = np.moveaxis(record.counts, -1, 0)
    test = record.test
    head = {"test": test, "types": record.types, "documents": record.documents}
    head |= {"sentences": len(gold), "gold": _packed(gold)}
    wrong = _packed(np.stack([gold - right, guessed - right], -1))
    row = {"declared": record.declared, "test": test, "parameters": record.parameters}
    row |= {"measures": record.measures, "history": record.history, "wrong": wrong}
    _append(corpus, "declared", row, head)


def add_doubt(corpus: str, record: Record, entropy: np.ndarray) -> None:
    """Append how unsure a teacher is of each test sentence, in nats, after its own record."""
    if entropy.shape != (len(record.counts),) or not np.isfinite(entropy).all():
        raise ValueError(
            f"entropy: expected {len(record.counts)} numbers, got {entropy.shape}: {entropy}"
        )
    told = _packed(np.minimum(np.round(1e4 * entropy), 65535), "<u2")
    _append(corpus, "of", {"of": record.declared, "test": record.test, "doubt": told})


def _append(corpus: str, name: str, row: dict, head: dict | None = None) -> None:
    """A line, unless one with the same `name` and test set is there; `head` before it where that is
    new."""
    file = file_of(corpus)
    with cache.locked(file):
        _read(corpus)  # nothing is added to a damaged file
        lines = file.read_text(encoding="utf8").splitlines() if file.exists() else []
        rows = [json.loads(line) for line in lines]
        same = json.loads(json.dumps([row[name], row["test"]]))
        if same in [[old.get(name), old["test"]] for old in rows]:
            return
        if row["test"] not in {old["test"] for old in rows if "gold" in old}:
            if head is None:
                raise ValueError(f"{file}: expected a record on this test set first, got a doubt")
            lines.append(json.dumps(head))
        write_text(file, "\n".join([*lines, json.dumps(row)]) + "\n")


def _packed(numbers: np.ndarray, kind: str = "u1") -> str:
    most = np.iinfo(kind).max
    if numbers.min(initial=0) < 0 or numbers.max(initial=0) > most:
        got = f"{numbers.min()} to {numbers.max()}"
        raise ValueError(f"expected numbers from 0 to {most}, got {got}")
    deflated = zlib.compress(numbers.astype(kind).tobytes(), 9)
    return base64.b64encode(deflated).decode("ascii")


def _unpacked(text: str, shape: Sequence[int], kind: str = "u1") -> np.ndarray:
    inflated = zlib.decompress(base64.b64decode(text))
    return np.frombuffer(inflated, kind).reshape(shape).astype(np.int64)
