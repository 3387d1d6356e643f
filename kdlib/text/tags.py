"""Sentences, spans and tags: IOB1, IOB2, IOBES and BMES in, spans and IOB2 out.

A span is (start, end, type): word numbers, end exclusive. One reading serves every scheme, that of
the CoNLL scorer (Tjong Kim Sang and De Meulder 2003): an entity starts at B or S, after O, E or S,
or where the type changes; so an I- without its B- starts one too.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import regex

PREFIXES = "BIOESMLU"
_STARTS, _CLOSES = "BSU", "ESUL"
WORD = regex.compile(
    r"\w+(?:[-_]\w+)*|(?![\s\x1c-\x1f])\X"
)  # GLiNER's words; an emoji stays whole, a letter keeps its marks


class Unfit(ValueError):
    """What a label or a sentence should have been, and what it is: `expected`, `got`."""

    def __init__(self, expected: str, got: object) -> None:
        super().__init__(f"expected {expected}, got {got}")
        self.expected, self.got = expected, got


class Span(NamedTuple):
    """An entity: words start to end - 1."""

    start: int
    end: int
    type: str


@dataclass(frozen=True)
class Sentence:
    """Words and the entities among them; `spans` is None where nobody has labelled the sentence."""

    tokens: tuple[str, ...]
    spans: tuple[Span, ...] | None = None

    @property
    def tags(self) -> list[str]:
        """IOB2 tags; ValueError without labels."""
        if self.spans is None:
            begins = " ".join(self.tokens)[:60]
            raise ValueError(f"expected a labelled sentence, got one without labels: {begins!r}")
        return to_iob2(self.spans, len(self.tokens))

    def without_labels(self) -> "Sentence":
        """The same words as text for transfer."""
        return Sentence(self.tokens)


def split_tag(tag: str) -> tuple[str, str]:
    """('B', 'PER') of 'B-PER', ('O', '') of 'O'; ValueError for anything that is no tag of the four
    schemes."""
    prefix, dash, kind = tag.partition("-")
    if tag == "O":
        return "O", ""
    if prefix in tuple(PREFIXES) and prefix != "O" and dash and kind and kind == kind.strip():
        return prefix, kind
    raise Unfit("a tag such as O, B-PER, I-PER, S-PER or E-PER", f"{tag!r}")


def to_spans(tags: Sequence[str]) -> tuple[Span, ...]:
    """The entities of a tag sequence in any of the four schemes; an I- that continues nothing
    starts an entity."""
    spans, start, last, kind = [], 0, "O", ""
    for i, tag in enumerate((*tags, "O")):
        prefix, new = split_tag(tag)
        begins = prefix != "O" and (
            prefix in _STARTS or last == "O" or last in _CLOSES or new != kind
        )
        if last != "O" and (begins or prefix == "O"):
            spans.append(Span(start, i, kind))
        if begins:
            start = i
        last, kind = prefix, new
    return tuple(spans)


def to_iob2(spans: Iterable[Span], length: int) -> list[str]:
    """IOB2 tags of non-overlapping spans; ValueError for an overlap or a span outside the
    sentence."""
    tags = ["O"] * length
    for start, end, kind in spans:
        if not 0 <= start < end <= length:
            raise Unfit(f"a span within the {length} words", f"[{start}, {end})")
        if any(tag != "O" for tag in tags[start:end]):
            raise Unfit("spans that do not overlap", f"a second one over words [{start}, {end})")
        tags[start:end] = [f"B-{kind}"] + [f"I-{kind}"] * (end - start - 1)
    return tags


def spoil(
    spans: Iterable[Span],
    others: Mapping[str, Sequence[str]],
    wrong_type: float,
    missed: float,
    rng: random.Random,
) -> tuple[Span, ...]:
    """The spans as a careless annotator sets them: a share `wrong_type`, one of the `others` of
    their type, and a share `missed`; a type without others is missed in both cases."""
    kept = []
    for span in spans:
        chance = rng.random()
        if chance < wrong_type and others[span.type]:
            kept.append(span._replace(type=rng.choice(others[span.type])))
        elif chance >= wrong_type + missed:
            kept.append(span)
    return tuple(kept)


def iob2_labels(types: Iterable[str]) -> list[str]:
    """O, then B- and I- of each type in alphabetical order: what label number k means,
    everywhere."""
    return ["O"] + [f"{prefix}-{kind}" for kind in sorted(set(types)) for prefix in "BI"]


def word_runs(numbers: Sequence[int]) -> list[tuple[int, int, int]]:
    """Runs of equal numbers other than 0 as (start, end, number): what words labelled one by one
    say about entities.

    Two entities of one type that touch become one: a label per word has no way to say where the
    second begins.
    """
    bounds = [
        i for i in range(len(numbers) + 1) if i in (0, len(numbers)) or numbers[i] != numbers[i - 1]
    ]
    return [(a, b, numbers[a]) for a, b in pairwise(bounds) if numbers[a]]
