"""The identities that tie the k-best losses together: k = 1 is pseudo-labelling, every path is
structural distillation."""

import itertools
import math

import pytest
import torch
from test_losses import LEGAL, LENGTHS, pair

from kdlib import losses
from kdlib.crf import Chain, LinearChainCRF
from kdlib.losses import path_counts, path_weights, surrogate_labels

EVERY = 4**5  # more than any of the sentences has paths


def grains(crf, student, teacher_crf, teacher, mask, k):
    """Sequence and label grain, and the path set, at weight temperature 1."""
    found = surrogate_labels(Chain(teacher_crf, teacher), mask, k)
    return (
        losses.crf_cross_entropy(Chain(crf, student), found, mask),
        losses.fuzzy(Chain(crf, student), found.allowed, mask),
        losses.path_set(Chain(crf, student), Chain(teacher_crf, teacher), mask, k),
    )


def test_surrogates_by_hand():
    """Two paths of three words, weights 3/4 and 1/4."""
    paths = torch.tensor([[[0, 1, 1], [0, 0, 1]]])
    unary, pairwise = path_counts(
        paths, torch.tensor([[0.75, 0.25]]), torch.ones(1, 3, dtype=torch.bool), 2
    )
    assert unary.tolist() == [[[1, 0], [0.25, 0.75], [0, 1]]]
    assert pairwise.tolist() == [[[[0.25, 0.75], [0, 0]], [[0, 0.25], [0, 0.75]]]]


@pytest.mark.parametrize("k", [1, 3, 10])
def test_counts_are_those_of_the_listed_paths(k):
    _, _, teacher_crf, teacher, mask = pair()
    found = surrogate_labels(Chain(teacher_crf, teacher), mask, k, weight_temperature=2.0)
    paths, scores = teacher_crf.k_best(teacher, mask, k)
    for b, length in enumerate(LENGTHS):
        weights = (scores[b] / 2).softmax(0).tolist()
        for i, v in itertools.product(range(length), range(4)):
            expected = sum(w for w, path in zip(weights, paths[b], strict=True) if path[i] == v)
            assert found.unary[b, i, v].item() == pytest.approx(expected, abs=1e-12)
            used = any(w > 0 and path[i] == v for w, path in zip(weights, paths[b], strict=True))
            assert found.allowed[b, i, v].item() is used
        for i, u, v in itertools.product(range(length - 1), range(4), range(4)):
            expected = sum(
                w
                for w, path in zip(weights, paths[b], strict=True)
                if path[i] == u and path[i + 1] == v
            )
            assert found.pairwise[b, i, u, v].item() == pytest.approx(expected, abs=1e-12)
    assert (
        not found.unary[~mask].any()
        and not found.pairwise[~mask[:, 1:]].any()
        and not found.allowed[~mask].any()
    )
    assert found.unary.shape == (3, 5, 4) and found.pairwise.shape == (3, 4, 4, 4), (
        "the size does not depend on k"
    )


def test_the_cross_entropy_is_the_weighted_sum_over_paths():
    crf, student, teacher_crf, teacher, mask = pair()
    paths, scores = teacher_crf.k_best(teacher, mask, 4)
    weights = path_weights(scores)
    log_p = torch.stack([crf.log_prob(student, path, mask) for path in paths.unbind(1)], 1)
    direct = -torch.special.xlogy(weights, log_p.exp()).sum(1).mean()
    found = losses.crf_cross_entropy(
        Chain(crf, student), surrogate_labels(Chain(teacher_crf, teacher), mask, 4), mask
    )
    torch.testing.assert_close(found, direct)
    torch.testing.assert_close(
        found,
        losses.top_k(Chain(crf, student), Chain(teacher_crf, teacher), mask, 4, weighted=True),
    )


def test_one_path_is_pseudo_labelling_for_every_grain():
    crf, student, teacher_crf, teacher, mask = pair()
    pseudo = losses.crf_nll(Chain(crf, student), teacher_crf.viterbi(teacher, mask), mask)
    for value in grains(crf, student, teacher_crf, teacher, mask, 1):
        torch.testing.assert_close(value, pseudo)


@pytest.mark.parametrize("legal", [None, LEGAL], ids=["free", "iob2"])
@pytest.mark.parametrize("k", [2, 4, 10, 50])
def test_label_grain_asks_least_and_sequence_grain_most(k, legal):
    """fuzzy <= path set <= sequence - H(w) <= sequence: set inclusion, then Jensen's inequality."""
    crf, student, teacher_crf, teacher, mask = pair(legal)
    sequence, label, paths = grains(crf, student, teacher_crf, teacher, mask, k)
    weights = path_weights(teacher_crf.k_best(teacher, mask, k)[1])
    entropy = -torch.special.xlogy(weights, weights).sum(1).mean()
    assert 0 <= label <= paths + 1e-12 and paths <= sequence - entropy + 1e-12 and entropy > 0


def test_every_path_is_structural_distillation():
    crf, student, teacher_crf, teacher, mask = pair()
    found = surrogate_labels(Chain(teacher_crf, teacher), mask, EVERY)
    unary, pairwise = teacher_crf.marginals(teacher, mask)
    torch.testing.assert_close(found.unary, unary)
    torch.testing.assert_close(found.pairwise, pairwise)
    asked = [
        torch.autograd.grad(loss, student)[0]
        for loss in (
            losses.crf_cross_entropy(Chain(crf, student), found, mask),
            losses.structural(Chain(crf, student), Chain(teacher_crf, teacher), mask),
        )
    ]
    torch.testing.assert_close(*asked)
    assert (
        losses.path_set(Chain(crf, student), Chain(teacher_crf, teacher), mask, EVERY).abs() < 1e-9
    ), "all paths together are certain"


def test_fuzzy_with_every_label_is_0_and_with_gold_alone_the_nll():
    crf, student, _, _, mask = pair()
    everything = torch.ones(3, 5, 4, dtype=torch.bool)
    assert losses.fuzzy(Chain(crf, student), everything, mask).abs() < 1e-12
    tags = torch.tensor([[1, 2, 0, 3, 0], [0, 1, 2, 0, 0], [3, 0, 0, 0, 0]])
    gold = torch.nn.functional.one_hot(tags, 4).bool()
    torch.testing.assert_close(
        losses.fuzzy(Chain(crf, student), gold, mask),
        losses.crf_nll(Chain(crf, student), tags, mask),
    )


def test_fuzzy_counts_legal_recombinations_alone():
    """Allowed O or B, then O or I: four mixtures, of which O I is no IOB2; the other three count,
    two of them seen in no path."""
    crf, student, _, _, _ = pair()
    mask = torch.ones(3, 2, dtype=torch.bool)
    allowed = torch.zeros(3, 2, 4, dtype=torch.bool)
    allowed[:, 0, [0, 1]] = allowed[:, 1, [0, 2]] = True
    legal = [torch.tensor(y).expand(3, 2) for y in ((0, 0), (1, 0), (1, 2))]
    by_hand = torch.stack([crf.log_prob(student[:, :2], y, mask) for y in legal], 1).logsumexp(1)
    torch.testing.assert_close(
        losses.fuzzy(Chain(crf, student[:, :2]), allowed, mask), -by_hand.mean()
    )
    none = torch.zeros(3, 2, 4, dtype=torch.bool)
    none[..., 2] = True  # I at the start
    with pytest.raises(ValueError, match="expected a legal path in every sentence"):
        losses.fuzzy(Chain(crf, student[:, :2]), none, mask)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_lattice_of_a_given_probability_and_one_for_doubted_sentences(share):
    """`held`: the fewest best paths that reach the share, all of the k where they do not.
    `doubted`: as without it where the best path has less, every label elsewhere."""
    _, _, teacher_crf, teacher, mask = pair()
    teacher = teacher * torch.tensor([0.3, 1.0, 3.0], dtype=teacher.dtype)[:, None, None]
    told, k = Chain(teacher_crf, teacher.detach()), 30
    fixed, held = (surrogate_labels(told, mask, k, held=held) for held in (1.0, share))
    doubted = surrogate_labels(told, mask, k, doubted=share)
    scores = teacher_crf.k_best(told.emissions, mask, k)[1]
    p = (scores - teacher_crf.log_partition(told.emissions, mask)[:, None]).exp()
    sizes, sure = [], []
    for b, length in enumerate(LENGTHS):
        few = next((j for j in range(1, k + 1) if p[b, :j].sum() >= share), k)
        own = [x[b : b + 1] for x in (told.emissions, mask)]
        cut = surrogate_labels(Chain(teacher_crf, own[0]), own[1], few)
        for mine, other in zip(held, cut, strict=True):
            torch.testing.assert_close(mine[b], other[0])
        sizes.append(few)
        sure.append(bool(p[b, 0] >= share))
        wanted = (
            torch.ones_like(fixed.allowed[b, :length]) if sure[b] else fixed.allowed[b, :length]
        )
        assert torch.equal(doubted.allowed[b, :length], wanted)
    assert len(set(sizes)) > 1 and (share > 0.5 or len(set(sure)) > 1), (sizes, sure)
    assert torch.equal(doubted.unary, fixed.unary) and not doubted.allowed[~mask].any()
    for name in ("held", "doubted"):
        for wrong in (0.0, 1.1, math.nan):
            with pytest.raises(ValueError, match=f"{name}: expected a probability above 0"):
                surrogate_labels(told, mask, k, **{name: wrong})


def test_fuzzys_gradient_is_the_gap_between_free_and_allowed_marginals():
    crf, student, teacher_crf, teacher, mask = pair()
    allowed = surrogate_labels(Chain(teacher_crf, teacher), mask, 3).allowed
    grad = torch.autograd.grad(losses.fuzzy(Chain(crf, student), allowed, mask), student)[0] * 3
    inside, _ = crf.marginals(student.detach().masked_fill(~allowed, -torch.inf), mask)
    torch.testing.assert_close(grad, crf.marginals(student, mask)[0].detach() - inside)


def test_decoupled_with_every_path_and_muted_others_is_the_whole_kl():
    """KL = KL(best or not) + (1 - p_T(best)) KL(which other), sentence by sentence."""
    crf, student, teacher_crf, teacher, mask = pair()
    for b in range(3):
        one = [x[b : b + 1] for x in (student, teacher, mask)]
        best = (
            teacher_crf.log_prob(one[1], teacher_crf.viterbi(one[1], one[2]), one[2]).exp().item()
        )
        found = losses.decoupled(
            Chain(crf, one[0]), Chain(teacher_crf, one[1]), one[2], EVERY, beta=1 - best
        )
        torch.testing.assert_close(
            found, losses.structural(Chain(crf, one[0]), Chain(teacher_crf, one[1]), one[2])
        )


@pytest.mark.parametrize("k", [1, 2])
def test_decoupled_where_there_is_no_other_path(k):
    crf, student, teacher_crf, teacher, _ = pair()
    for chain in (crf, teacher_crf):
        chain.legal_start[1:] = False
    sides = Chain(crf, student[:, :1]), Chain(teacher_crf, teacher[:, :1])
    value = losses.decoupled(*sides, torch.ones(3, 1, dtype=torch.bool), k)
    assert (
        value.item() == pytest.approx(0, abs=1e-9)
        and torch.autograd.grad(value, student)[0].isfinite().all()
    )


def test_certain_teachers_and_students_have_finite_losses_and_gradients():
    """Scores of hundreds, as trained models give them, in float32."""
    for sign in (1, -1):
        crf, student, teacher_crf, teacher, mask = pair(dtype=torch.float)
        teacher, student = teacher * 300, (sign * 300 * teacher).detach().requires_grad_()
        found = surrogate_labels(Chain(teacher_crf, teacher), mask, 5)
        assert found.unary.isfinite().all() and found.unary[mask].sum(-1).allclose(torch.ones(9))
        for loss in (
            losses.decoupled(Chain(crf, student), Chain(teacher_crf, teacher), mask, 5),
            losses.multi_grained(Chain(crf, student), Chain(teacher_crf, teacher), found, mask),
            losses.path_set(Chain(crf, student), Chain(teacher_crf, teacher), mask, 5),
        ):
            assert loss.isfinite() and torch.autograd.grad(loss, student)[0].isfinite().all()


@pytest.mark.parametrize("gap", [8.0, 16.0, 60.0])
def test_a_student_that_is_sure_and_wrong_is_pushed_back(gap):
    """With two sequences in all, decoupled is the whole KL, also where 1 - p rounds to 0."""
    teacher_crf, crf = LinearChainCRF(2), LinearChainCRF(2)
    for parameter in (*teacher_crf.parameters(), *crf.parameters()):
        torch.nn.init.zeros_(parameter)
    teacher, mask = torch.tensor([[[0.4, 0.0]]]), torch.ones(1, 1, dtype=torch.bool)
    student = torch.tensor([[[gap, 0.0]]], requires_grad=True)
    values = [
        loss(Chain(crf, student), Chain(teacher_crf, teacher), mask)
        for loss in (losses.decoupled, losses.structural)
    ]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in values))


def test_weights():
    scores = torch.tensor([[2.0, 1.0, -torch.inf]])
    assert path_weights(scores, math.inf).tolist() == [[0.5, 0.5, 0]]
    torch.testing.assert_close(path_weights(scores, 0.5), (scores / 0.5).softmax(1))
    assert (
        path_weights(scores, 1e-6).tolist() == path_weights(scores, 1e-46).tolist() == [[1, 0, 0]]
    )
    for wrong in (0, -1, math.nan):
        with pytest.raises(ValueError, match="weight_temperature: expected more than 0"):
            path_weights(scores, wrong)


def test_multi_grained_is_the_weighted_sum_and_skips_what_weighs_nothing(monkeypatch):
    crf, student, teacher_crf, teacher, mask = pair()
    found = surrogate_labels(Chain(teacher_crf, teacher), mask, 3)
    arguments = Chain(crf, student), Chain(teacher_crf, teacher), found, mask
    sequence, label, token = (
        losses.multi_grained(*arguments, g) for g in ((1, 0, 0), (0, 1, 0), (0, 0, 1))
    )
    torch.testing.assert_close(token, losses.posterior(*arguments[:2], mask))
    torch.testing.assert_close(
        losses.multi_grained(*arguments, (0.2, 0.3, 0.5)),
        0.2 * sequence + 0.3 * label + 0.5 * token,
    )
    for wrong in ((0, 0, 0), (1, -1, 1), (1, 1), (1, math.nan, 0)):
        with pytest.raises(ValueError, match="grains: expected three weights"):
            losses.multi_grained(*arguments, wrong)
    monkeypatch.setattr(losses, "fuzzy", None)
    losses.multi_grained(*arguments, (0.5, 0, 0.5))


def test_what_cannot_be_is_refused():
    crf, student, teacher_crf, teacher, mask = pair()
    found = surrogate_labels(Chain(teacher_crf, teacher), mask, 3)
    with pytest.raises(ValueError, match=r"scores of one shape, got \[3, 4, 4\] and \[3, 5, 4\]"):
        losses.crf_cross_entropy(Chain(crf, student[:, :4]), found, mask[:, :4])
    with pytest.raises(
        ValueError, match=r"expected counts of shape \[3, 5, 4\] and \[3, 4, 4, 4\]"
    ):
        losses.crf_cross_entropy(
            Chain(crf, student), found._replace(pairwise=found.pairwise[:1]), mask
        )
    nothing = teacher.detach().index_fill(0, torch.tensor(1), -torch.inf)
    for loss in (losses.path_set, losses.decoupled, losses.top_k):
        with pytest.raises(
            ValueError,
            match=r"expected a legal path of finite score in every sentence, got none in \[1\]",
        ):
            loss(Chain(crf, student), Chain(teacher_crf, nothing), mask, 3)
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        surrogate_labels(Chain(teacher_crf, teacher), mask, 0)
    with pytest.raises(
        ValueError,
        match=r"expected a legal path of finite score in every sentence, got none in \[1\]",
    ):
        lost = teacher.detach().index_fill(0, torch.tensor(1), -torch.inf)
        surrogate_labels(Chain(teacher_crf, lost), mask, 3)
