"""GLiNER's calls without a model: what they take, in which batches, and the form of an answer."""

from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any

from kdlib.text.tags import WORD, Sentence, word_runs

MOST_WORDS = 16_000  # of a batch, padding included


def batches(
    rows: Sequence[int], lengths: Sequence[int], size: int, most: int = MOST_WORDS
) -> Iterator[list[int]]:
    """Rows, shortest first, at most `size` at once and fewer where a long text would make much
    padding of the others: `most` words of a batch, padding included."""
    part: list[int] = []
    for row in rows:
        if part and (len(part) == size or (len(part) + 1) * lengths[row] > most):
            yield part
            part = []
        part.append(row)
    yield part


def windows(text: str, most: int) -> Iterator[list[tuple[int, int]]]:
    """The words of a text, where each begins and ends, at most so many at once: cut after the last
    sentence end in the second half of a window, or where it is full. No word is left out."""
    words, at = [m.span() for m in WORD.finditer(text)], 0
    while len(words) - at > most:
        places = range(at + most, at + most // 2, -1)
        cut = next((i for i in places if ends(text, words, i)), at + most)
        yield words[at:cut]
        at = cut
    if words[at:]:
        yield words[at:]


def ends(text: str, words: Sequence[tuple[int, int]], at: int) -> bool:
    """Whether a sentence ends before word `at`: with a stop that follows no initial."""
    stop = text[words[at - 1][0]]
    return stop in "!?" or (stop == "." and words[at - 2][1] - words[at - 2][0] > 2)


def entities(
    text: str,
    words: Sequence[tuple[int, int]],
    likely: Sequence[float],
    best: Sequence[int],
    labels: Sequence[str],
) -> list[dict[str, Any]]:
    """Runs of words with one best label, in characters; `likely` is averaged into a score."""
    out = []
    for first, end, number in word_runs(best[: len(words)]):
        start, stop = words[first][0], words[end - 1][1]
        score = sum(likely[first:end]) / (end - first)
        found = {"start": start, "end": stop, "text": text[start:stop]}
        out.append(found | {"label": labels[number - 1], "score": score})
    return out


def check_sentences(sentences: Sequence[Sentence]) -> None:
    """TypeError for what are no sentences; ValueError for a word that is no text."""
    if isinstance(sentences, (str, Sentence)):
        raise TypeError(f"sentences: expected a list of them, got one {type(sentences).__name__}")
    wrong = [type(s).__name__ for s in sentences if not isinstance(s, Sentence)]
    if wrong:
        raise TypeError(f"sentences: expected Sentence(words), got {wrong[0]}")
    check_characters([" ".join(s.tokens) for s in sentences], "sentences")


def check_characters(texts: Sequence[str], what: str) -> None:
    """ValueError for a text with half a character in it, a lone surrogate."""
    for text in texts:
        try:
            text.encode("utf8")
        except UnicodeEncodeError as error:
            near = ascii(text[max(0, error.start - 20) : error.end + 20])
            raise ValueError(f"{what}: expected whole characters, got {near}") from None


def labels_of(labels: Sequence[str]) -> list[str]:
    """The labels asked for, each once; TypeError or ValueError for what are no labels."""
    listed = isinstance(labels, Sequence) and not isinstance(labels, str)
    if not listed or not all(isinstance(x, str) for x in labels):
        raise TypeError(f"labels: expected a list of strings, got {labels!r:.80}")
    empty = [x for x in labels if not x.strip()]
    if empty:
        raise ValueError(f"labels: expected words, got {empty[0]!r}")
    return list(dict.fromkeys(labels))


def check(
    texts: Sequence[str], threshold: float, flat_ner: bool, multi_label: bool, batch_size: int
) -> None:
    """TypeError or ValueError for arguments that cannot be answered."""
    wrong = [type(t).__name__ for t in texts if not isinstance(t, str)]
    if wrong:
        raise TypeError(f"texts: expected strings, got {wrong[0]}")
    if isinstance(threshold, bool) or not isinstance(threshold, Real) or not 0 <= threshold <= 1:
        raise ValueError(f"threshold: expected a probability from 0 to 1, got {threshold!r}")
    if flat_ner is not True or multi_label is not False:
        raise ValueError(
            "a student gives each word one label: expected flat_ner=True and multi_label=False, "
            f"got flat_ner={flat_ner}, multi_label={multi_label}"
        )
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: expected a whole number from 1, got {batch_size!r}")
