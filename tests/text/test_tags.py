import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdlib.crf import legal_iob2
from kdlib.text.tags import Span, iob2_labels, split_tag, to_iob2, to_spans, word_runs

GOLD = (Span(0, 2, "PER"), Span(2, 3, "PER"), Span(4, 5, "LOC"), Span(5, 7, "ORG"))
SCHEMES = {
    "IOB1": ["I-PER", "I-PER", "B-PER", "O", "I-LOC", "I-ORG", "I-ORG"],
    "IOB2": ["B-PER", "I-PER", "B-PER", "O", "B-LOC", "B-ORG", "I-ORG"],
    "IOBES": ["B-PER", "E-PER", "S-PER", "O", "S-LOC", "B-ORG", "E-ORG"],
    "BMES": ["B-PER", "E-PER", "S-PER", "O", "S-LOC", "B-ORG", "M-ORG", "E-ORG"],
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_gives_the_same_spans(scheme):
    expected = (*GOLD[:3], Span(5, 8, "ORG")) if scheme == "BMES" else GOLD
    assert to_spans(SCHEMES[scheme]) == expected


def test_an_inside_that_continues_nothing_starts_an_entity():
    assert to_spans(["O", "I-LOC", "I-PER"]) == (Span(1, 2, "LOC"), Span(2, 3, "PER"))


@st.composite
def sentences(draw):
    tags = []
    for _ in range(draw(st.integers(0, 6))):
        kind, size = draw(st.sampled_from(["", "X", "Y-Z"])), draw(st.integers(1, 3))
        tags += ["O"] * size if not kind else [f"B-{kind}"] + [f"I-{kind}"] * (size - 1)
    return tags


@given(sentences())
def test_iob2_survives_the_round_trip(tags):
    assert to_iob2(to_spans(tags), len(tags)) == tags


def test_legal_transitions_are_those_of_valid_iob2():
    labels = iob2_labels(["LOC", "PER"])
    assert labels == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    start, step, end = legal_iob2(labels)
    for a, b in itertools.product(range(5), repeat=2):
        tags = [labels[a], labels[b]]
        valid = to_iob2(to_spans(tags), 2) == tags
        assert valid == bool(start[a] and step[a, b] and end[b]), tags


@pytest.mark.parametrize("tag", ["", "o", "B", "B-", "-PER", "X-PER", "PER", "B_PER"])
def test_what_is_no_tag(tag):
    with pytest.raises(ValueError, match="expected a tag"):
        split_tag(tag)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(0, 3, "X")], "within the 2 words"),
        ([(0, 2, "X"), (1, 2, "Y")], "overlap"),
        ([(1, 1, "X")], "within"),
    ],
)
def test_spans_that_have_no_tags(spans, message):
    with pytest.raises(ValueError, match=message):
        to_iob2([Span(*s) for s in spans], 2)


def test_word_runs_are_entities_but_for_touching_ones():
    assert word_runs([0, 1, 1, 2, 0, 2]) == [(1, 3, 1), (3, 4, 2), (5, 6, 2)]
    assert word_runs([]) == [] == word_runs([0, 0])
    assert word_runs([3, 3]) == [(0, 2, 3)]
