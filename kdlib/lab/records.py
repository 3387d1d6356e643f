"""What is left of a run in the repository: what was declared, and what it got right, as numbers.

A corpus has one file of JSON lines, data/runs/<corpus>.jsonl. Tables, intervals and figures are
made from it in seconds on any machine, without the corpus. A line is one of two:

    a test set   {"test": digest, "types", "documents", "gold"}
    a run        {"declared": {...}, "test": digest, "parameters", "measures", "history", "wrong"}

"gold" and "wrong" are arrays of whole numbers, deflated and in base64: the gold entities of each
test sentence and type [n, types], and how many of them a run missed and how many it invented
[n, types, 2]. No word of a corpus is among them, and no second either: times belong to the bench.
"""

import base64
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
    def units(self) -> np.ndarray:
        """Counts [n, 3] of what a bootstrap draws: documents where they are known, or sentences."""
        counted = self.counts.sum(1)
        if not self.documents:
            return counted
        starts = np.cumsum([0, *self.documents[:-1]])
        return np.add.reduceat(counted, starts, axis=0)


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
    """All records of a corpus; [] where there are none yet. ValueError, with file and line, for a
    line that is no record."""
    file, tests, found = file_of(corpus), {}, []
    if not file.exists():
        return found
    for number, line in enumerate(file.read_text(encoding="utf8").splitlines(), 1):
        try:
            row = json.loads(line)
            if "gold" in row:
                shape = row["sentences"], len(row["types"])
                tests[row["test"]] = row, _unpacked(row["gold"], shape)
                continue
            test, gold = tests[row["test"]]
            missed, invented = np.moveaxis(_unpacked(row["wrong"], (*gold.shape, 2)), -1, 0)
            right = gold - missed
            counts = np.stack([right, right + invented, gold], -1)
            about = test["types"], test["documents"], row["parameters"]
            found.append(Record(row["declared"], counts, *about, row["measures"], row["history"]))
        except (KeyError, ValueError, TypeError, AttributeError, zlib.error) as error:
            raise ValueError(f"{file}:{number}: expected a record, got {error!r}") from None
    return found


def add(corpus: str, record: Record) -> None:
    """Append a run, and its test set before it where that is new. What is there stays as it is,
    byte by byte, and so does the file where the same run is there already."""
    right, guessed, gold = np.moveaxis(record.counts, -1, 0)
    content = json.dumps([gold.tolist(), record.types, record.documents])
    test = hashlib.sha256(content.encode()).hexdigest()[:16]
    head = {"test": test, "types": record.types, "documents": record.documents}
    head |= {"sentences": len(gold), "gold": _packed(gold)}
    wrong = _packed(np.stack([gold - right, guessed - right], -1))
    row = {"declared": record.declared, "test": test, "parameters": record.parameters}
    row |= {"measures": record.measures, "history": record.history, "wrong": wrong}
    file = file_of(corpus)
    with cache.locked(file):
        read(corpus)  # nothing is added to a damaged file
        lines = file.read_text(encoding="utf8").splitlines() if file.exists() else []
        rows = [json.loads(line) for line in lines]
        if json.loads(json.dumps(record.declared)) in [old.get("declared") for old in rows]:
            return
        if all(old.get("gold") is None or old["test"] != test for old in rows):
            lines.append(json.dumps(head))
        write_text(file, "\n".join([*lines, json.dumps(row)]) + "\n")


def _packed(numbers: np.ndarray) -> str:
    if numbers.min(initial=0) < 0 or numbers.max(initial=0) > 255:
        raise ValueError(f"expected numbers from 0 to 255, got {numbers.min()} to {numbers.max()}")
    deflated = zlib.compress(numbers.astype(np.uint8).tobytes(), 9)
    return base64.b64encode(deflated).decode("ascii")


def _unpacked(text: str, shape: Sequence[int]) -> np.ndarray:
    inflated = zlib.decompress(base64.b64decode(text))
    return np.frombuffer(inflated, np.uint8).reshape(shape).astype(np.int64)
