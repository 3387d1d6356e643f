"""A distilled tagger without torch: numpy, onnxruntime, tokenizers, regex, and nothing else.

`Tagger`: the network gives each word piece the scores of its IOB2 labels; the CRF over them is
numpy. `TwinTower`: words and any labels meet in a dot product. Texts may be of any length: they are
read in windows of whole words, cut after a sentence where one ends; where none does, windows
overlap, so that an entity is whole in one of them.
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
from kdlib.text.pieces import Pieces, in_windows
from kdlib.text.tags import split_tag, to_spans, word_runs

CONFIG = "config.json"
FORMAT, TWIN = "kdlib tagger 1", "kdlib-twin-tower"
SCORES = ("start", "transitions", "end")
MOST_WORDS = 256  # of a window
WORDS_AT_ONCE = 4_000  # of a batch, padding included: memory stays flat
RESCALED = 4  # words: scores of one may differ by 170, or a probability is lost among the least


class Crf:
    """A linear chain over padded batches: scores `start` [K], `transitions` [K, K] from -> to,
    `end` [K]; what is illegal is -inf."""

    def __init__(self, start: np.ndarray, transitions: np.ndarray, end: np.ndarray) -> None:
        self.start, self.end, self._arrive = start, end, np.ascontiguousarray(transitions.T)
        step = np.exp(transitions - transitions.max())
        self._steps = np.stack([step, step.T])  # of the two directions
        self._ends = np.stack([np.exp(start - start.max()), np.exp(end - end.max())])

    def viterbi(self, emissions: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
        """The best label sequence of each row of emissions [B, L, K]."""
        best, steps = np.array(emissions.swapaxes(0, 1), order="C"), []
        best[0] += self.start
        for i in range(1, len(best)):
            arriving = best[i - 1][:, None] + self._arrive  # [B, to, from]
            steps.append(arriving.argmax(2))
            best[i] += np.maximum.reduce(arriving, 2)
        last = (best[lengths - 1, np.arange(len(lengths))] + self.end).argmax(1)
        back, paths = np.array(steps).tolist(), []
        for row, (at, length) in enumerate(zip(last.tolist(), lengths.tolist(), strict=True)):
            path = [at]
            for step in reversed(back[: length - 1]):
                path.append(step[row][path[-1]])
            paths.append(path[::-1])
        return paths

    def marginals(self, emissions: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """p(y_i = v | x) [B, L, K], what lies beyond a row's length means nothing.

        Forward and backward at once, the second over each row turned round, in probabilities that
        are rescaled every few words: `came`, all before it; `here`, with the word itself.
        """
        local = np.exp(emissions - emissions.max(2, keepdims=True))
        rows, at = np.arange(len(local))[:, None], np.arange(local.shape[1])
        turned = np.where(at < lengths[:, None], lengths[:, None] - 1 - at, at)
        both = np.stack([local, local[rows, turned]]).transpose(2, 0, 1, 3)  # [L, 2, B, K]
        came, here = np.empty_like(both, order="C"), np.empty_like(both, order="C")
        came[0] = self._ends[:, None]
        for i in range(len(both)):
            if i:
                np.matmul(here[i - 1], self._steps, out=came[i])
            np.multiply(came[i], both[i], out=here[i])
            if i % RESCALED == 0:
                here[i] /= np.add.reduce(here[i], 2, keepdims=True)
        found = came[:, 0].swapaxes(0, 1) * here[:, 1].swapaxes(0, 1)[rows, turned]
        return found / found.sum(2, keepdims=True)


Bag = Sequence[int]  # the word pieces of a word or label


class Window(NamedTuple):
    """Some words of a text: which text, where each word begins and ends in it, and from which word
    on to which an entity may begin that this window answers for; the others are read around it."""

    text: int
    words: list[tuple[int, int]]
    first: int
    last: int


def windows(number: int, text: str, most: int) -> Iterator[Window]:
    """A text of at most `most` words whole; of a longer one `calls.windows`, each with `most` / 16
    words more on a side where no sentence ends, and at most `most` in all."""
    more, at = most // 16, 0
    parts = list(calls.windows(text, most))
    if len(parts) > 1:
        parts = list(calls.windows(text, most - 2 * more))
    words = [word for part in parts for word in part]
    for part in parts:
        end = at + len(part)
        before = more if at and not calls.ends(text, words, at) else 0
        after = more if end < len(words) and not calls.ends(text, words, end) else 0
        yield Window(number, words[at - before : end + after], before, before + len(part))
        at = end


class Student:
    """What is read from a folder: `predict_entities` and `inference` as GLiNER's, `pipeline` as
    Hugging Face's. `labels` are what it was taught, `thresholds` their least scores."""

    def __init__(self, folder: Path, config: Mapping[str, Any], int8: bool, threads: int) -> None:
        self.labels = sorted(config["labels"])
        self.thresholds = {label: float(config["thresholds"][label]) for label in self.labels}
        if not all(0 <= least <= 1 for least in self.thresholds.values()):
            raise ValueError(f"thresholds: expected numbers from 0 to 1, got {self.thresholds}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # idle threads would take the cores of whoever waits for the answer
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        name = "model_int8.onnx" if int8 else "model.onnx"
        self._session = onnxruntime.InferenceSession(str(folder / "onnx" / name), options)

    # ---- GLiNER's calls ----

    def predict_entities(
        self,
        text: str,
        labels: Sequence[str] | None = None,
        threshold: float | None = None,
        flat_ner: bool = True,
        multi_label: bool = False,
    ) -> list[dict[str, Any]]:
        """The entities of one text, as `inference` finds them."""
        if not isinstance(text, str):
            raise TypeError(f"text: expected one string, got {type(text).__name__}")
        return self.inference([text], labels, threshold, flat_ner, multi_label)[0]

    def inference(
        self,
        texts: str | Sequence[str],
        labels: Sequence[str] | None = None,
        threshold: float | None = None,
        flat_ner: bool = True,
        multi_label: bool = False,
        batch_size: int = 32,
    ) -> list[list[dict[str, Any]]]:
        """Per text its entities: {"start", "end", "text", "label", "score"}, characters, end
        exclusive, in order, never overlapping: `flat_ner=False` and `multi_label=True` are errors.
        In int8 a score moves a little with the other texts of its batch, whose largest number sets
        the scale.

        labels: those wanted, all that it was taught by default; ValueError for one that this
        student cannot give. threshold: least score, by default each label's own, chosen on held-out
        text.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        wanted = self.labels if labels is None else calls.labels_of(labels)
        least = 0.5 if threshold is None else threshold
        calls.check(texts, least, flat_ner, multi_label, batch_size)
        calls.check_characters(texts, "texts")
        self._check(wanted)
        own = self.thresholds if threshold is None else {}
        bounds = {label: own.get(label, least) for label in wanted}
        found: list[list[dict[str, Any]]] = [[] for _ in texts]
        if not wanted:
            return found
        most = min(self._most, MOST_WORDS)
        cut = [window for i, text in enumerate(texts) for window in windows(i, text, most)]
        lengths = [len(w.words) for w in cut]
        rows = sorted(range(len(cut)), key=lengths.__getitem__)
        parts = calls.batches(rows, lengths, batch_size, WORDS_AT_ONCE) if cut else ()
        for part in parts:
            some = [cut[row] for row in part]
            words = [[texts[w.text][a:b] for a, b in w.words] for w in some]
            for window, entities in zip(some, self._entities(words, bounds), strict=True):
                text = texts[window.text]
                for start, end, label, score in entities:
                    if not window.first <= start < window.last:
                        continue
                    a, b = window.words[start][0], window.words[end - 1][1]
                    entity = {"start": a, "end": b, "text": text[a:b]}
                    found[window.text].append(entity | {"label": label, "score": score})
        return [list(_in_order(own)) for own in found]

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

    # ---- how, by the kind of student ----

    _most = MOST_WORDS  # words of a window

    def _check(self, labels: Sequence[str]) -> None:
        """ValueError for labels that it cannot give."""

    def _entities(
        self, words: Sequence[Sequence[str]], least: Mapping[str, float]
    ) -> Iterator[list[tuple[int, int, str, float]]]:
        """Of each window's words the entities, from word, to word, label, score: of the labels of
        `least` those that reach it."""
        raise NotImplementedError


class Tagger(Student):
    """IOB2 labels and a CRF: `labels` are all it can find. The score of an entity is the mean
    marginal probability of its words' labels."""

    def __init__(self, folder: Path, config: Mapping[str, Any], int8: bool, threads: int) -> None:
        super().__init__(folder, config, int8, threads)
        self._tags: list[str] = config["tags"]
        types = {kind for _, kind in map(split_tag, self._tags)} - {""}
        if types != set(self.labels):
            raise ValueError(f"labels: expected those of its tags, {sorted(types)}")
        self.crf = Crf(*(_scores(config["crf"][name]) for name in SCORES))
        self._around, self._unknown = config["special_pieces"], int(config["unknown_piece"])
        self._most = int(config["most_pieces"]) - sum(map(len, self._around))
        if self._most < 1:
            raise ValueError(f"most_pieces: expected room for a word, got {config['most_pieces']}")
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        emissions, lengths = self.emissions([["a", "b"]])
        numbers = emissions.shape[2], len(self._tags), len(self.crf.start)
        if len(set(numbers)) > 1:
            raise ValueError(f"expected as many tags as scores, got {numbers}")
        if not np.isfinite(self.crf.marginals(emissions, lengths)).all():
            raise ValueError("crf: expected scores that allow some label sequence, got none")

    def _check(self, labels: Sequence[str]) -> None:
        strange = sorted(set(labels) - set(self.labels))
        if strange:
            raise ValueError(f"labels: expected some of {self.labels}, got {strange}")

    def emissions(self, words: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
        """Scores [B, L, K] of some texts' words, padded with 0, and their lengths [B]."""
        how = {"is_pretokenized": True, "add_special_tokens": False}
        if len(words) == 1:  # without a pool of threads
            encoded = [self._tokenizer.encode(words[0], **how)]
        else:
            encoded = self._tokenizer.encode_batch(words, **how)
        before, after = self._around
        rows: list[list[int]] = []
        firsts: list[list[tuple[int, int]]] = []  # per word: row and place of its first piece
        for text, pieces in zip(words, encoded, strict=True):
            of: list[list[int]] = [[] for _ in text]
            for piece, word in zip(pieces.ids, pieces.word_ids, strict=True):
                of[word].append(piece)
            windows, first = in_windows([own or [self._unknown] for own in of], self._most)
            firsts.append([(len(rows) + row, len(before) + place) for row, place in first])
            rows += [[*before, *window, *after] for window in windows]
        lengths = np.array([len(row) for row in rows], dtype=np.int32)
        padded = np.zeros((len(rows), lengths.max()), dtype=np.int64)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = row
        (scores,) = self._session.run(None, {"pieces": padded, "lengths": lengths})
        counts = np.array([len(first) for first in firsts])
        out = np.zeros((len(firsts), counts.max(), scores.shape[2]))
        flat = [row * padded.shape[1] + place for first in firsts for row, place in first]
        out[np.arange(out.shape[1]) < counts[:, None]] = scores.reshape(-1, out.shape[2])[flat]
        return out, counts

    def _entities(
        self, words: Sequence[Sequence[str]], least: Mapping[str, float]
    ) -> Iterator[list[tuple[int, int, str, float]]]:
        emissions, lengths = self.emissions(words)
        paths = self.crf.viterbi(emissions, lengths)
        spans = [to_spans([self._tags[k] for k in path]) for path in paths]
        some = [i for i, own in enumerate(spans) if own]
        if some:
            marginals = self.crf.marginals(emissions[some], lengths[some])
        place = {i: at for at, i in enumerate(some)}
        for i, own in enumerate(spans):
            sure = marginals[place[i], range(len(paths[i])), paths[i]].tolist() if own else []
            scored = [(s, e, kind, sum(sure[s:e]) / (e - s)) for s, e, kind in own]
            yield [x for x in scored if x[2] in least and x[3] >= least[x[2]]]


class TwinTower(Student):
    """Any labels: those it was taught, or others. An entity is a run of words with one best label,
    each likelier than the label's threshold to be in any entity at all; its score is the mean of
    that probability. Unlike in torch, a run that leaves its window by `most` / 16 words is cut."""

    def __init__(self, folder: Path, config: Mapping[str, Any], int8: bool, threads: int) -> None:
        super().__init__(folder, config, int8, threads)
        tokenizer = (folder / "tokenizer.json").read_text(encoding="utf8")
        buckets, unknown = config["buckets"], config["unknown_piece"]
        if not isinstance(buckets, int) or not isinstance(unknown or 0, int) or buckets < 1:
            got = f"{buckets!r}, {unknown!r}"
            raise ValueError(f"buckets, unknown_piece: expected numbers, got {got}")
        self._pieces = Pieces(tokenizer, unknown, buckets)
        last = self._pieces.size + buckets - 1
        self._run([[(last,)]], [(0,)])  # an error where the table is shorter

    def probabilities(
        self, words: Sequence[Sequence[str]], labels: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of some texts' words "none" and each label, [B, L, 1 + U], and lengths [B]."""
        own = [list(map(self._pieces, text)) for text in words]
        scores = self._run(own, [self._pieces(label) for label in labels])
        likely = np.exp(scores - scores.max(2, keepdims=True))
        return likely / likely.sum(2, keepdims=True), np.array([len(text) for text in words])

    def _run(self, texts: Sequence[Sequence[Bag]], labels: Sequence[Bag]) -> np.ndarray:
        """Scores [B, L, 1 + U] of each text's words, given as their pieces."""
        lengths = np.array([len(words) for words in texts], dtype=np.int32)
        sizes = np.ones((len(texts), lengths.max()), dtype=np.float32)
        of: list[int] = []
        for i, words in enumerate(texts):
            many = [len(pieces) for pieces in words]
            sizes[i, : len(words)] = many
            at = i * sizes.shape[1]
            of += np.repeat(np.arange(at, at + len(words)), many).tolist()
        named = [len(pieces) for pieces in labels]
        given = {"lengths": lengths, "sizes": sizes, "of": np.array(of)}
        given["pieces"] = np.array([p for words in texts for pieces in words for p in pieces])
        given["label_pieces"] = np.array([p for pieces in labels for p in pieces])
        given["label_of"] = np.repeat(np.arange(len(labels)), named)
        given["label_sizes"] = np.array(named, dtype=np.float32)
        return self._session.run(None, given)[0]

    def _entities(
        self, words: Sequence[Sequence[str]], least: Mapping[str, float]
    ) -> Iterator[list[tuple[int, int, str, float]]]:
        labels, bounds = list(least), np.array(list(least.values()))
        found, lengths = self.probabilities(words, labels)
        for own, length in zip(found, lengths.tolist(), strict=True):
            likely, best = 1 - own[:length, 0], own[:length, 1:].argmax(1)
            kept = np.where(likely > bounds[best], best + 1, 0).tolist()
            yield [(s, e, labels[n - 1], float(likely[s:e].mean())) for s, e, n in word_runs(kept)]


def _in_order(entities: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Entities from left to right; where two windows overlap and disagree, the earlier one."""
    reached = 0
    for entity in sorted(entities, key=lambda e: e["start"]):
        if entity["start"] >= reached:
            reached = entity["end"]
            yield entity


def load(folder: str | Path, int8: bool = True, threads: int = 1) -> Student:
    """The student of a folder that `export` wrote; FileNotFoundError where it is none, ValueError
    where its files are damaged or do not fit together."""
    folder = Path(folder).expanduser()
    config = _config(folder)
    try:
        kind = TwinTower if config["model_type"] == TWIN else Tagger
        return kind(folder, config, int8, threads)
    except Exception as error:  # the libraries' own errors share no kind
        reason = (str(error).splitlines() or [""])[0][:200]
        raise ValueError(
            f"{folder}: expected the files of a whole student, got {type(error).__name__}: {reason}"
        ) from error


def _config(folder: Path) -> Mapping[str, Any]:
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder}: expected a folder with a {CONFIG}, written by kdlib")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{folder / CONFIG}: expected JSON, got {error}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        got = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{folder / CONFIG}: expected the format {FORMAT!r}, got {got!r}")
    return config


def _scores(values: list) -> np.ndarray:
    """JSON has no -inf: null stands for it."""
    told = np.array(values, dtype=object)
    return np.where(np.equal(told, None), -np.inf, told).astype(np.float64)
