"""Files into sentences.

Four formats, told apart by the name's ending:

    .jsonl           one {"tokens": [...], "ner_tags": ["O", "B-PER", ...]} a line; without
                     ner_tags: text without labels
    .json            a list of {"tokenized_text": [...], "ner": [[first, last, type], ...]} (GLiNER;
                     last word inclusive) or of {"text": "...", "entities": [[start, end, type],
                     ...]} (characters, end exclusive)
    anything else    CoNLL columns, spaces or tabs: word first, tag last, a blank line after each
                     sentence

A bad file raises one DataError that says where, what was expected and what was there; nothing is
half-read.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from kdlib.text.files import write_text
from kdlib.text.tags import WORD, Sentence, Span, Unfit, split_tag, to_iob2, to_spans

LABEL_KEYS = ("ner_tags", "ner", "entities", "tags", "labels", "spans")


class DataError(ValueError):
    """A file that is not what it should be: where, expected, got."""

    def __init__(self, path: Path, at: int | str | None, expected: str, got: object) -> None:
        where = f"{path}:{at}" if isinstance(at, int) else f"{path}, {at}" if at else str(path)
        super().__init__(f"{where}: expected {expected}, got {str(got)[:120]!r}")


def read(
    path: str | Path,
    types: Sequence[str] | None = None,
    clean: Callable[[str], str] = str,
    columns: Sequence[str] = (),
    skip: Callable[[DataError], None] | None = None,
) -> list[Sentence]:
    """The sentences of a file, its format told by its name; with `types`, any other entity type is
    an error.

    `clean` is applied to each word of a CoNLL file (some sets number or prefix their words).
    columns: of a CoNLL file, "word" and "tag" among them; by default the first and the last. skip:
    what to do with each error of a sentence, which is then left out; by default it is raised.
    DataError for a bad file.
    """
    path, bad = Path(path).expanduser(), skip or _raise
    if path.suffix == ".jsonl":
        found = _read_json_lines(path, types, bad)
    elif path.suffix == ".json":
        found = _read_json(path, types, bad)
    else:
        found = _read_conll(path, types, clean, _places(columns), bad)
    sentences = list(found)
    if not sentences:
        raise DataError(path, None, "at least one sentence", "none")
    return sentences


def _raise(error: DataError) -> None:
    raise error


def _places(columns: Sequence[str]) -> tuple[int, int, int]:
    """Where word and tag stand, and how many columns there are; 0: as many as the first line."""
    if not columns:
        return 0, -1, 0
    if sorted(c for c in columns if c in ("word", "tag")) != ["tag", "word"]:
        raise ValueError(f"columns: expected one word and one tag among them, got {list(columns)}")
    return columns.index("word"), columns.index("tag"), len(columns)


def _check_type(path: Path, at: int | str, kind: str, types: Sequence[str] | None) -> None:
    if types is not None and kind not in tuple(types):
        raise DataError(path, at, f"an entity type among {sorted(types)}", kind)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines. Only newlines end a line: words may hold any other white space Unicode
    knows."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(path, None, "a readable file", error.strerror) from error
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            yield number, raw.decode("utf8").rstrip("\r")
        except UnicodeDecodeError as error:
            raise DataError(path, number, "UTF-8", raw[error.start : error.start + 8]) from None


def _read_conll(
    path: Path,
    types: Sequence[str] | None,
    clean: Callable[[str], str],
    places: tuple[int, int, int],
    bad: Callable[[DataError], None],
) -> Iterator[Sentence]:
    word, tag, columns = places
    words, tags, wrong = [], [], False
    for number, line in (*_lines(path), (0, "")):
        fields = [
            field.strip(" ") for field in re.split("\t" if "\t" in line else " +", line.strip(" "))
        ]
        if not any(fields) or fields[0] == "-DOCSTART-":
            if words and not wrong:
                yield Sentence(tuple(words), to_spans(tags))
            words, tags, wrong = [], [], False
            continue
        columns = columns or len(fields)
        try:
            _check_fields(path, number, line, fields, columns)
            words.append(fields[word] and clean(fields[word]))
            tags.append(fields[tag])
            _check_word(path, number, line, words[-1], tags[-1], types)
        except DataError as error:  # its whole sentence is left out
            bad(error)
            wrong = True


def _check_fields(path: Path, at: int, line: str, fields: list[str], columns: int) -> None:
    if "\r" in line:
        raise DataError(path, at, "lines that end in a newline", line)
    if len(fields) != columns or columns < 2:
        raise DataError(path, at, f"{max(columns, 2)} columns, word first and tag last", line)


def _check_word(
    path: Path, at: int, line: str, word: str, tag: str, types: Sequence[str] | None
) -> None:
    if not word.strip("\x1c\x1d\x1e\x1f"):  # separators; wide blanks are words of some corpora
        raise DataError(path, at, "a word in its column", line)
    try:
        _, kind = split_tag(tag)
    except ValueError:
        expected = "a tag such as O, B-PER, I-PER, S-PER or E-PER"
        raise DataError(path, at, expected, tag) from None
    if kind:
        _check_type(path, at, kind, types)


def documents_of(path: Path) -> list[int]:
    """How many sentences each document of a CoNLL file has; [] where no -DOCSTART- marks any."""
    sizes: list[int] = []
    for block in re.split(r"\n[ \t]*\n", path.read_text(encoding="utf8")):
        lines = [line for line in block.split("\n") if line.strip()]
        if lines and lines[0].startswith("-DOCSTART-"):
            sizes.append(0)
            lines = lines[1:]
        if lines and sizes:
            sizes[-1] += 1
    return [size for size in sizes if size]


def _read_json_lines(
    path: Path, types: Sequence[str] | None, bad: Callable[[DataError], None]
) -> Iterator[Sentence]:
    for number, line in _lines(path):
        if line.strip():
            try:
                sentence = _sentence(path, number, _parse(path, number, line), types)
            except DataError as error:
                bad(error)
            else:
                yield sentence


def _read_json(
    path: Path, types: Sequence[str] | None, bad: Callable[[DataError], None]
) -> Iterator[Sentence]:
    text = "\n".join(line for _, line in _lines(path))
    records = _parse(path, None, text) if text.strip() else []
    if not isinstance(records, list):
        raise DataError(path, None, "a JSON list of sentences", type(records).__name__)
    for position, item in enumerate(records, 1):
        try:
            sentence = _sentence(path, f"sentence {position}", item, types)
        except DataError as error:
            bad(error)
        else:
            yield sentence


def _parse(path: Path, line: int | None, text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            path, line or error.lineno, f"JSON ({error.msg})", text[error.pos : error.pos + 40]
        ) from None
    except (RecursionError, ValueError) as error:  # nested too deep, a number too long
        raise DataError(path, line, f"JSON of a sentence ({error})", text[:40]) from None


def _sentence(path: Path, at: int | str, item: object, types: Sequence[str] | None) -> Sentence:
    """One sentence of a JSON file: the key of its words says which of the three shapes it has."""
    shapes = {
        "tokens": (_from_tags, "ner_tags"),
        "tokenized_text": (_from_word_spans, "ner"),
        "text": (_from_character_spans, "entities"),
    }
    present = [key for key in shapes if isinstance(item, dict) and key in item]
    if len(present) != 1:
        raise DataError(
            path, at, "an object with one of tokens, tokenized_text and text", json.dumps(item)
        )
    make, labels = shapes[present[0]]
    stray = [key for key in LABEL_KEYS if key in item and key != labels]
    if stray:  # read as text without labels, they would be lost
        raise DataError(path, at, f"the labels of {present[0]} under {labels!r}", stray[0])
    try:
        sentence = make(item)
        " ".join([*sentence.tokens, *(span.type for span in sentence.spans or ())]).encode("utf8")
    except UnicodeEncodeError:
        raise DataError(
            path, at, "words of whole Unicode characters", ascii(sentence.tokens)
        ) from None
    except Unfit as error:
        raise DataError(path, at, error.expected, error.got) from None
    except RecursionError:
        raise DataError(path, at, "JSON of a sentence", "something nested very deep") from None
    for span in sentence.spans or ():
        _check_type(path, at, span.type, types)
    return sentence


def _words(tokens: object) -> tuple[str, ...]:
    if (
        not isinstance(tokens, list)
        or not tokens
        or not all(isinstance(t, str) and t.strip() for t in tokens)
    ):
        raise Unfit("a list of words that are not empty", json.dumps(tokens))
    return tuple(tokens)


def _triples(spans: object) -> list[tuple[int, int, str]]:
    def fits(s: object) -> bool:
        return (
            isinstance(s, list)
            and len(s) == 3
            and type(s[0]) is type(s[1]) is int
            and isinstance(s[2], str)
            and s[2] == s[2].strip() != ""
        )

    if not isinstance(spans, list) or not all(map(fits, spans)):
        raise Unfit("entities as [number, number, type]", json.dumps(spans))
    return [tuple(s) for s in spans]


def _from_tags(item: dict) -> Sentence:
    tokens, tags = _words(item["tokens"]), item.get("ner_tags")
    if tags is None:
        return Sentence(tokens)
    if not isinstance(tags, list) or not all(isinstance(t, str) for t in tags):
        raise Unfit("ner_tags as a list of tags in letters", json.dumps(tags))
    if len(tags) != len(tokens):
        raise Unfit(f"{len(tokens)} ner_tags, one a word", len(tags))
    return Sentence(tokens, to_spans(tags))


def _from_word_spans(item: dict) -> Sentence:
    tokens = _words(item["tokenized_text"])
    if item.get("ner") is None:
        return Sentence(tokens)
    found = sorted(set(_triples(item["ner"])))  # the same one twice counts once
    spans = tuple(Span(first, last + 1, kind) for first, last, kind in found)
    for span in spans:
        to_iob2(
            [span], len(tokens)
        )  # within the sentence; spans may overlap here, and then have no tags
    return Sentence(tokens, spans)


def _from_character_spans(item: dict) -> Sentence:
    text = item["text"]
    if not isinstance(text, str) or not text.strip():
        raise Unfit("a text that is not empty", json.dumps(text))
    found = list(WORD.finditer(text))
    tokens = tuple(m.group() for m in found)
    if item.get("entities") is None:
        return Sentence(tokens)
    begins, ends = (
        {m.start(): i for i, m in enumerate(found)},
        {m.end(): i + 1 for i, m in enumerate(found)},
    )
    spans = []
    for start, end, kind in sorted(set(_triples(item["entities"]))):
        if not 0 <= start < end <= len(text):
            raise Unfit(f"a span within the {len(text)} characters", f"[{start}, {end})")
        if start not in begins or end not in ends:
            raise Unfit(
                "a span that starts and ends with a word",
                f"{text[start:end]!r} at [{start}, {end})",
            )
        spans.append(Span(begins[start], ends[end], kind))
    return Sentence(tokens, tuple(spans))


def tidy_passages(passages: Sequence[Sentence], longest: int) -> list[Sentence]:
    """Passages labelled by a machine, made fit to learn from: no passage twice, its beginning
    alone, no two entities on one word.

    A passage is cut after the last full stop within its first `longest` words. Of entities that
    overlap the longest is kept; of several types for the same words the one more common in the
    corpus.
    """
    common = Counter(span.type for p in passages for span in set(p.spans or ()))
    out: dict[tuple[str, ...], Sentence] = {}
    for passage in passages:
        stops = [
            i + 1 for i, word in enumerate(passage.tokens[:longest]) if word in (".", "?", "!")
        ]
        end = len(passage.tokens) if len(passage.tokens) <= longest else (stops or [longest])[-1]
        taken: list[Span] = []
        for span in sorted(
            set(passage.spans or ()), key=lambda s: (s.start - s.end, -common[s.type], s)
        ):
            if span.end <= end and all(span.end <= t.start or t.end <= span.start for t in taken):
                taken.append(span)
        kept = None if passage.spans is None else tuple(sorted(taken))
        out.setdefault(passage.tokens[:end], Sentence(passage.tokens[:end], kept))
    return list(out.values())


def write_json_lines(path: Path, sentences: Iterable[Sentence]) -> None:
    """Sentences as JSON lines, one a line, labels as IOB2, read back by `read`; ValueError for
    words that it would refuse."""

    def line(s: Sentence) -> str:
        item = {"tokens": list(_words(list(s.tokens)))} | (
            {} if s.spans is None else {"ner_tags": s.tags}
        )
        return json.dumps(item, ensure_ascii=False)

    write_text(Path(path), "".join(line(s) + "\n" for s in sentences))
