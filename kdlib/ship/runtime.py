"""A distilled tagger without torch: numpy, onnxruntime, tokenizers, regex, and nothing else.

The network gives each word piece the scores of its IOB2 labels; the CRF over them is numpy. Texts
may be of any length: they are read in windows of whole words, cut after a sentence where one ends.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

from kdlib.text import calls
from kdlib.text.tags import to_spans

CONFIG = "config.json"
FORMAT = "kdlib tagger 1"
MOST_WORDS = 256  # of a window
WORDS_AT_ONCE = 4_000  # of a batch, padding included: memory stays flat


class Crf(NamedTuple):
    """Scores of a linear chain; what is illegal is -inf."""

    start: np.ndarray  # [K]
    transitions: np.ndarray  # [K, K], from -> to
    end: np.ndarray  # [K]

    def viterbi(self, emissions: np.ndarray) -> list[int]:
        """The best label sequence of emissions [L, K]."""
        best, steps = self.start + emissions[0], []
        for scores in emissions[1:]:
            arriving = best[:, None] + self.transitions
            steps.append(arriving.argmax(0))
            best = arriving.max(0) + scores
        path = [int((best + self.end).argmax())]
        for step in reversed(steps):
            path.append(int(step[path[-1]]))
        return path[::-1]

    def marginals(self, emissions: np.ndarray) -> np.ndarray:
        """p(y_i = v | x) [L, K], forward and backward in probabilities, rescaled at each word."""
        local = np.exp(emissions - emissions.max(1, keepdims=True))
        step = np.exp(self.transitions - self.transitions.max())
        forward, backward = np.empty_like(local), np.empty_like(local)
        at = np.exp(self.start - self.start.max()) * local[0]
        forward[0] = at / at.sum()
        for i in range(1, len(local)):
            at = (forward[i - 1] @ step) * local[i]
            forward[i] = at / at.sum()
        backward[-1] = np.exp(self.end - self.end.max())
        for i in range(len(local) - 2, -1, -1):
            at = step @ (local[i + 1] * backward[i + 1])
            backward[i] = at / at.sum()
        both = forward * backward
        return both / both.sum(1, keepdims=True)


class Window(NamedTuple):
    """Some words of a text: which text, and where each word begins and ends in it."""

    text: int
    words: list[tuple[int, int]]


class Student:
    """A tagger read from a folder: `predict_entities` and `inference` as GLiNER's, `pipeline` as
    Hugging Face's. `labels` are all it can find."""

    def __init__(self, folder: str | Path, int8: bool = True, threads: int = 1) -> None:
        folder = Path(folder)
        config = _config(folder)
        self.labels: list[str] = config["labels"]
        self.thresholds: dict[str, float] = config["thresholds"]
        self._tags: list[str] = config["tags"]
        crf = (config["crf"][name] for name in Crf._fields)
        self.crf = Crf(*(_scores(values) for values in crf))
        self._around, self._unknown = config["special_pieces"], config["unknown_piece"]
        self._most = config["most_pieces"] - sum(map(len, self._around))
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        name = "model_int8.onnx" if int8 else "model.onnx"
        self._session = onnxruntime.InferenceSession(str(folder / "onnx" / name), options)

    # ---- GLiNER's calls ----

    def predict_entities(
        self, text: str, labels: Sequence[str] | None = None, threshold: float | None = None
    ) -> list[dict[str, Any]]:
        """The entities of one text, as `inference` finds them."""
        if not isinstance(text, str):
            raise TypeError(f"text: expected one string, got {type(text).__name__}")
        return self.inference([text], labels, threshold)[0]

    def inference(
        self,
        texts: str | Sequence[str],
        labels: Sequence[str] | None = None,
        threshold: float | None = None,
        batch_size: int = 32,
    ) -> list[list[dict[str, Any]]]:
        """Per text its entities: {"start", "end", "text", "label", "score"}, characters, end
        exclusive, in order, never overlapping.

        labels: those wanted, all by default; ValueError for one that this student cannot give.
        threshold: least score, by default each label's own, chosen on held-out text; the score of
        an entity is the mean marginal probability of its words' labels.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        wanted = set(self.labels if labels is None else calls.labels_of(labels))
        calls.check(texts, 0.5 if threshold is None else threshold, True, False, batch_size)
        calls.check_characters(texts, "texts")
        strange = sorted(wanted - set(self.labels))
        if strange:
            raise ValueError(f"labels: expected some of {self.labels}, got {strange}")
        least = self.thresholds if threshold is None else dict.fromkeys(self.labels, threshold)
        found: list[list[dict[str, Any]]] = [[] for _ in texts]
        most = min(self._most, MOST_WORDS)
        windows = [Window(i, w) for i, text in enumerate(texts) for w in calls.windows(text, most)]
        lengths = [len(w.words) for w in windows]
        rows = sorted(range(len(windows)), key=lengths.__getitem__)
        for part in _parts(rows, lengths, batch_size) if windows else ():
            for row, emissions in zip(part, self._emissions(texts, windows, part), strict=True):
                window = windows[row]
                text = texts[window.text]
                for start, end, label, score in self._entities(emissions):
                    if label in wanted and score >= least[label]:
                        a, b = window.words[start][0], window.words[end - 1][1]
                        entity = {"start": a, "end": b, "text": text[a:b]}
                        found[window.text].append(entity | {"label": label, "score": score})
        return [sorted(own, key=lambda e: e["start"]) for own in found]

    def pipeline(self, texts: str | Sequence[str]) -> list:
        """Hugging Face's form of an answer, as a token classification pipeline gives it with
        aggregation_strategy="simple": {"entity_group", "score", "word", "start", "end"}."""
        names = {"label": "entity_group", "score": "score", "text": "word"}
        names |= {"start": "start", "end": "end"}
        found = [[{names[k]: e[k] for k in names} for e in own] for own in self.inference(texts)]
        return found[0] if isinstance(texts, str) else found

    def stream(
        self, texts: Iterable[str], threshold: float | None = None
    ) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """Each of any number of texts with its entities, in constant memory."""
        waiting = iter(texts)
        while part := list(itertools.islice(waiting, 32)):
            yield from zip(part, self.inference(part, threshold=threshold), strict=True)

    # ---- how ----

    def _emissions(
        self, texts: Sequence[str], windows: Sequence[Window], part: Sequence[int]
    ) -> list[np.ndarray]:
        """Scores [L, K] of the words of each window."""
        own = [[texts[windows[r].text][a:b] for a, b in windows[r].words] for r in part]
        encoded = self._tokenizer.encode_batch(own, is_pretokenized=True, add_special_tokens=False)
        before, after = self._around
        rows, firsts = [], []
        for words, pieces in zip(own, encoded, strict=True):
            row, first, told = list(before), [], dict.fromkeys(range(len(words)))
            for piece, word in zip(pieces.ids, pieces.word_ids, strict=True):
                told[word] = [*(told[word] or ()), piece]
            for word in range(len(words)):
                first.append(len(row))
                row += told[word] or [self._unknown]
            rows.append([*row, *after])
            firsts.append(first)
        lengths = np.array([len(row) for row in rows], dtype=np.int32)
        padded = np.zeros((len(rows), lengths.max()), dtype=np.int64)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = row
        (scores,) = self._session.run(None, {"pieces": padded, "lengths": lengths})
        return [scores[i, first].astype(np.float64) for i, first in enumerate(firsts)]

    def _entities(self, emissions: np.ndarray) -> Iterator[tuple[int, int, str, float]]:
        path = self.crf.viterbi(emissions)
        spans = to_spans([self._tags[k] for k in path])
        if not spans:
            return
        marginals = self.crf.marginals(emissions)
        sure = [marginals[i, k] for i, k in enumerate(path)]
        for start, end, kind in spans:
            yield start, end, kind, float(np.mean(sure[start:end]))


def load(folder: str | Path, int8: bool = True, threads: int = 1) -> Student:
    """The student of a folder that `export` wrote; FileNotFoundError where it is none, ValueError
    where its files are damaged."""
    return Student(folder, int8, threads)


def _parts(rows: Sequence[int], lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    part: list[int] = []
    for row in rows:
        if part and (len(part) == size or (len(part) + 1) * lengths[row] > WORDS_AT_ONCE):
            yield part
            part = []
        part.append(row)
    yield part


def _config(folder: Path) -> Mapping[str, Any]:
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder}: expected a folder with a {CONFIG}, written by kdlib")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: expected JSON, got {error}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        got = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{folder / CONFIG}: expected the format {FORMAT!r}, got {got!r}")
    return config


def _scores(values: list) -> np.ndarray:
    """JSON has no -inf: null stands for it."""
    told = np.array(values, dtype=object)
    return np.where(np.equal(told, None), -np.inf, told).astype(np.float64)
