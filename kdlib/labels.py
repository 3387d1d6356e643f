"""Tags and spans: IOB1, IOB2, IOBES and BMES in, spans and IOB2 out.

A span is (start, end, type): word numbers, end exclusive. One reading serves every scheme, that of the CoNLL scorer (Tjong Kim Sang
and De Meulder 2003): an entity starts at B or S, after O, E or S, or where the type changes; so an I- without its B- starts one too.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

PREFIXES = "BIOESMLU"
_STARTS, _CLOSES = "BSU", "ESUL"


class Span(NamedTuple):
    """An entity: words start to end - 1."""

    start: int
    end: int
    type: str


def split_tag(tag: str) -> tuple[str, str]:
    """('B', 'PER') of 'B-PER', ('O', '') of 'O'; ValueError for anything that is no tag of the four schemes."""
    prefix, dash, kind = tag.partition("-")
    if tag == "O":
        return "O", ""
    if prefix in tuple(PREFIXES) and prefix != "O" and dash and kind and kind == kind.strip():
        return prefix, kind
    raise ValueError(f"expected a tag such as O, B-PER, I-PER, S-PER or E-PER, got {tag!r}")


def to_spans(tags: Sequence[str]) -> tuple[Span, ...]:
    """The entities of a tag sequence in any of the four schemes; an I- that continues nothing starts an entity."""
    spans, start, last, kind = [], 0, "O", ""
    for i, tag in enumerate((*tags, "O")):
        prefix, new = split_tag(tag)
        begins = prefix != "O" and (prefix in _STARTS or last == "O" or last in _CLOSES or new != kind)
        if last != "O" and (begins or prefix == "O"):
            spans.append(Span(start, i, kind))
        if begins:
            start = i
        last, kind = prefix, new
    return tuple(spans)


def to_iob2(spans: Iterable[Span], length: int) -> list[str]:
    """IOB2 tags of non-overlapping spans; ValueError for an overlap or a span outside the sentence."""
    tags = ["O"] * length
    for start, end, kind in spans:
        if not 0 <= start < end <= length:
            raise ValueError(f"expected a span within the {length} words, got [{start}, {end})")
        if any(tag != "O" for tag in tags[start:end]):
            raise ValueError(f"expected spans that do not overlap, got a second one over words [{start}, {end})")
        tags[start:end] = [f"B-{kind}"] + [f"I-{kind}"] * (end - start - 1)
    return tags


def spoil(
    spans: Iterable[Span], others: Mapping[str, Sequence[str]], wrong_type: float, missed: float, rng: random.Random
) -> tuple[Span, ...]:
    """The spans as a careless annotator sets them: a share with one of the `others` of their type, a share missed (if no other, both)."""
    kept = []
    for span in spans:
        chance = rng.random()
        if chance < wrong_type and others[span.type]:
            kept.append(span._replace(type=rng.choice(others[span.type])))
        elif chance >= wrong_type + missed:
            kept.append(span)
    return tuple(kept)


def detect_scheme(sequences: Iterable[Sequence[str]]) -> str:
    """'IOB1', 'IOB2', 'IOBES' or 'BMES': the scheme that explains the tags of a whole file.

    IOB1 writes B- only between touching entities of one type, so most entities there start with I-. A few I- without B- in an
    IOB2 file are annotation slips, not IOB1.
    """
    prefixes, by_b, by_i = set(), 0, 0
    for tags in sequences:
        previous = ("O", "")
        for tag in tags:
            prefix, kind = split_tag(tag)
            prefixes.add(prefix)
            if previous[0] == "O" or previous[1] != kind:
                by_b += prefix == "B"
                by_i += prefix == "I"
            previous = (prefix, kind)
    if "M" in prefixes:
        return "BMES"
    if prefixes & set("ESLU"):
        return "IOBES"
    return "IOB1" if by_i > by_b else "IOB2"


def iob2_labels(types: Iterable[str]) -> list[str]:
    """O, then B- and I- of each type in alphabetical order: what label number k means, everywhere."""
    return ["O"] + [f"{prefix}-{kind}" for kind in sorted(set(types)) for prefix in "BI"]


def legal_iob2(labels: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """(start [K], transitions [K, K], end [K]) as booleans: I-X comes only after B-X or I-X; a sentence may end anywhere."""
    parts = [split_tag(label) for label in labels]
    if any(prefix not in ("O", "B", "I") for prefix, _ in parts):
        raise ValueError(f"expected IOB2 labels, got {list(labels)}")
    start = torch.tensor([prefix != "I" for prefix, _ in parts])
    steps = [
        [prefix != "I" or (before != "O" and kind == kind_before) for prefix, kind in parts] for before, kind_before in parts
    ]
    return start, torch.tensor(steps), torch.ones(len(parts), dtype=torch.bool)


def word_runs(numbers: Sequence[int]) -> list[tuple[int, int, int]]:
    """Runs of equal numbers other than 0 as (start, end, number): what words labelled one by one say about entities.

    Two entities of one type that touch become one: a label per word has no way to say where the second begins.
    """
    bounds = [i for i in range(len(numbers) + 1) if i in (0, len(numbers)) or numbers[i] != numbers[i - 1]]
    return [(a, b, numbers[a]) for a, b in pairwise(bounds) if numbers[a]]
