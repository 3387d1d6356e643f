import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kdlib.lab import scores
from kdlib.text.tags import Sentence, Span, to_spans

TAGS = st.lists(st.sampled_from(["O", "B-X", "I-X", "B-Y"]), min_size=5, max_size=5)


def sentence(tags):
    return Sentence(tuple("abcde"), to_spans(tags))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TAGS, TAGS), min_size=1, max_size=6))
def test_our_counts_and_seqeval_agree_in_both_modes(pairs):
    gold = [sentence(g) for g, _ in pairs]
    predicted = [to_spans(p) for _, p in pairs]
    ours = float(scores.f1(scores.counts([s.spans for s in gold], predicted)))
    if any(s.spans for s in gold) or any(predicted):
        assert scores.scores(gold, predicted)["f1"] == pytest.approx(ours)
        assert scores.scores(gold, predicted, strict=True)["f1"] == pytest.approx(ours)


def test_scores_by_hand():
    gold = [sentence(["B-X", "I-X", "O", "B-Y", "O"]), sentence(["O", "O", "B-X", "O", "O"])]
    predicted = [[Span(0, 2, "X"), Span(3, 4, "X")], []]
    table = scores.per_type(gold, predicted)
    assert table["all"] == pytest.approx(
        {"precision": 50, "recall": 100 / 3, "f1": 40, "support": 3}
    )
    assert table["X"] == pytest.approx({"precision": 50, "recall": 50, "f1": 50, "support": 2})
    assert table["Y"]["f1"] == 0
    with pytest.raises(ValueError, match="expected as many predictions as sentences, got 1 for 2"):
        scores.scores(gold, predicted[:1])


def test_agreement_takes_the_teacher_as_gold():
    assert scores.agreement(
        [[Span(0, 1, "X")]], [[Span(0, 1, "X"), Span(1, 2, "X")]]
    ) == pytest.approx(200 / 3)
    assert scores.agreement([[]], [[]]) == 0.0


def test_intervals_are_students():
    values = [80.0, 82.0, 81.0]
    mean, half = scores.interval(values)
    low, high = stats.t.interval(0.95, 2, loc=81.0, scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert np.isnan(scores.interval([80.0])[1])


def test_the_bootstrap_covers_what_it_should():
    """Of runs that truly do not differ, about 5 % are called different."""
    rng = np.random.default_rng(0)
    called = 0
    for i in range(200):
        there = np.full((150, 1), 2)
        a, b = (np.concatenate([rng.binomial(2, 0.7, (150, 1)), there, there], 1) for _ in range(2))
        found = scores.paired_bootstrap(a, b, samples=300, seed=i)
        assert found["low"] <= found["difference"] <= found["high"]
        called += not found["low"] <= 0 <= found["high"]
    assert 2 <= called <= 20


def test_the_bootstrap_pairs_sentences_and_averages_seeds():
    rng = np.random.default_rng(0)
    base = np.stack([rng.integers(0, 3, 400), np.full(400, 3), np.full(400, 3)], 1)
    better = base + np.array([1, 0, 0]) * (rng.random(400) < 0.1)[:, None]
    paired = scores.paired_bootstrap(better, base)
    assert paired["low"] > 0 and paired["p"] < 0.01
    width = paired["high"] - paired["low"]
    shuffled = scores.paired_bootstrap(better[rng.permutation(400)], base)
    assert shuffled["high"] - shuffled["low"] > 1.5 * width
    seeds = scores.paired_bootstrap(np.stack([better, better]), np.stack([base, base]))
    assert seeds == pytest.approx(paired)
    assert scores.paired_bootstrap(base, base)["p"] == 1.0
    with pytest.raises(ValueError, match="same runs and sentences"):
        scores.paired_bootstrap(base[:10], base)


def test_word_scores_count_words_as_the_paper_does():
    gold = [[Span(0, 2, "A"), Span(3, 4, "B")], []]
    guess = [[Span(1, 3, "A"), Span(3, 4, "A")], []]
    found = scores.word_scores(gold, guess, [5, 5])  # words 0-4: A A - B - against - A A A -
    assert found == {
        "accuracy": 70.0,
        "precision": pytest.approx(100 / 3),
        "recall": pytest.approx(100 / 3),
        "f1": pytest.approx(100 / 3),
    }
    nothing = scores.word_scores(gold, [[], []], [5, 5])
    assert nothing == {"accuracy": 70.0, "precision": 0.0, "recall": 0.0, "f1": 0.0}
    assert set(scores.word_scores(gold, gold, [5, 5]).values()) == {100.0}


def runs(n, seeds, spread, rng):
    """Counts of both sides: the same entities, ours found a little more often in some seeds."""
    gold = np.full((seeds, n), 2)
    theirs = rng.binomial(2, 0.6, (seeds, n))
    chance = np.clip(0.6 + spread * rng.standard_normal((seeds, 1)), 0, 1)
    ours = rng.binomial(2, np.broadcast_to(chance, (seeds, n)))
    return [np.stack([right, np.full_like(right, 2), gold], -1) for right in (ours, theirs)]


def test_the_hierarchical_interval_holds_the_seeds_too():
    rng = np.random.default_rng(0)
    ours, theirs = runs(200, 8, 0.1, rng)
    both, sentences = (
        draw(ours, theirs, 500) for draw in (scores.hierarchical_bootstrap, scores.paired_bootstrap)
    )
    assert both["difference"] == sentences["difference"]
    assert both["high"] - both["low"] > 1.5 * (sentences["high"] - sentences["low"])
    same = scores.hierarchical_bootstrap(ours, ours, 500)
    assert (same["difference"], same["low"], same["high"], same["p"]) == (0, 0, 0, 1)
    with pytest.raises(ValueError, match="expected counts of the same runs"):
        scores.hierarchical_bootstrap(ours, theirs[:2])


def test_holm_by_hand():
    assert scores.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert scores.holm([0.9, 0.8]) == [1.0, 1.0]


def test_calibration_by_hand():
    """Two words at 0.9, one right: off by 0.4. Two at 0.6, both right: off by 0.4."""
    sure, unsure = torch.tensor([[0.9, 0.1]] * 2), torch.tensor([[0.4, 0.6]] * 2)
    error = scores.calibration_error([sure, unsure], [[0, 1], [1, 1]], bins=10)
    assert error == pytest.approx(40, abs=1e-4)
    certain = torch.tensor([[1.0, 0.0]])
    assert scores.calibration_error([certain], [[0]]) == 0
