import math

import pytest
import torch

from kdlib import losses
from kdlib.crf import Chain, LinearChainCRF, legal_iob2
from kdlib.losses import surrogate_labels

LENGTHS = [5, 3, 1]
LEGAL = legal_iob2(["O", "B-X", "I-X", "B-Y"])


def pair(legal=LEGAL, dtype=torch.double):
    """A student and a teacher chain with their emissions, and the mask."""
    torch.manual_seed(0)
    out = []
    for _ in range(2):
        crf = LinearChainCRF(4, legal).to(dtype)
        for p in crf.parameters():
            torch.nn.init.normal_(p)
        out += [crf, torch.randn(3, 5, 4, dtype=dtype).requires_grad_()]
    return *out, torch.arange(5) < torch.tensor(LENGTHS)[:, None]


def of_chains(loss):
    """The loss as a function of both CRFs and emissions one by one."""
    return lambda crf, student, teacher_crf, teacher, mask, *knobs, **more: loss(
        Chain(crf, student), Chain(teacher_crf, teacher), mask, *knobs, **more
    )


posterior, structural = of_chains(losses.posterior), of_chains(losses.structural)
decoupled, path_set = of_chains(losses.decoupled), of_chains(losses.path_set)
top_k = of_chains(losses.top_k)


def soft_targets(crf, student, teacher_crf, teacher, mask, temperature=2.0):
    return losses.soft_targets(student, teacher, mask, temperature)


def weighted_top_k(*arguments):
    return top_k(*arguments, k=3, weighted=True)


def fuzzy(crf, student, teacher_crf, teacher, mask):
    allowed = surrogate_labels(Chain(teacher_crf, teacher), mask, k=2).allowed
    return losses.fuzzy(Chain(crf, student), allowed, mask)


def multi_grained(crf, student, teacher_crf, teacher, mask):
    own, other = Chain(crf, student), Chain(teacher_crf, teacher)
    surrogates = surrogate_labels(other, mask, k=2)
    return losses.multi_grained(own, other, surrogates, mask, (0.2, 0.3, 0.5))


DIVERGENCES = {
    "soft targets": soft_targets,
    "posterior": posterior,
    "posterior at 2": lambda *a: posterior(*a, temperature=2.0),
    "structural": structural,
    "structural at 3": lambda *a: structural(*a, temperature=3.0),
    "decoupled": lambda *a: decoupled(*a, k=4),
}
LOSSES = DIVERGENCES | {
    "top-k": top_k,
    "weighted top-k": weighted_top_k,
    "fuzzy": fuzzy,
    "path set": lambda *a: path_set(*a, k=2),
    "multi-grained": multi_grained,
}
each = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
divergences = pytest.mark.parametrize("loss", DIVERGENCES.values(), ids=DIVERGENCES.keys())
both = pytest.mark.parametrize("legal", [None, LEGAL], ids=["free", "iob2"])


@divergences
@both
def test_zero_with_zero_gradient_when_the_student_is_the_teacher(loss, legal):
    crf, student, _, _, mask = pair(legal)
    value = loss(crf, student, crf, student.detach(), mask)
    value.backward()
    assert abs(value.item()) < 1e-9
    assert student.grad.abs().max() < 1e-9


@each
@both
def test_the_student_gets_a_gradient_and_the_teacher_none(loss, legal):
    crf, student, teacher_crf, teacher, mask = pair(legal)
    value = loss(crf, student, teacher_crf, teacher, mask)
    value.backward()
    assert value > 0 and student.grad.isfinite().all()
    assert (student.grad[mask].abs().sum(-1) > 1e-6).all()
    assert (student.grad[~mask] == 0).all()
    assert teacher.grad is None and all(p.grad is None for p in teacher_crf.parameters())
    if loss is not soft_targets:
        assert crf.transitions.grad.abs().sum() > 1e-6


@each
def test_padding_changes_nothing_and_inputs_are_not_mutated(loss):
    crf, student, teacher_crf, teacher, mask = pair()
    kept = student.detach().clone(), teacher.detach().clone()
    wide = [
        torch.cat([e.detach(), torch.full((3, 2, 4), 7.0, dtype=torch.double)], 1)
        for e in (student, teacher)
    ]
    wide_mask = torch.cat([mask, torch.zeros(3, 2, dtype=torch.bool)], 1)
    value = loss(crf, student, teacher_crf, teacher, mask)
    torch.testing.assert_close(loss(crf, wide[0], teacher_crf, wide[1], wide_mask), value)
    assert student.equal(kept[0]) and teacher.equal(kept[1])


@each
def test_a_constant_added_to_a_words_scores_changes_nothing(loss):
    crf, student, teacher_crf, teacher, mask = pair()
    shift = torch.randn(3, 5, 1, dtype=torch.double)
    value = loss(crf, student, teacher_crf, teacher, mask)
    torch.testing.assert_close(
        loss(crf, student + shift, teacher_crf, teacher - shift, mask), value
    )


@each
def test_one_word_sentences(loss):
    crf, student, teacher_crf, teacher, _ = pair()
    value = loss(
        crf, student[:, :1], teacher_crf, teacher[:, :1], torch.ones(3, 1, dtype=torch.bool)
    )
    assert value.isfinite() and value > 0


@each
@both
def test_gradients_are_right(loss, legal):
    crf, student, teacher_crf, teacher, mask = pair(legal)
    assert torch.autograd.gradcheck(lambda s: loss(crf, s, teacher_crf, teacher, mask), (student,))
    assert torch.autograd.gradgradcheck(
        lambda s: loss(crf, s, teacher_crf, teacher, mask), (student,)
    )


@pytest.mark.parametrize("loss", [soft_targets, posterior, structural])
def test_temperature_squared_keeps_the_gradients_size(loss):
    """Hinton's T^2: at high temperatures the gradient no longer depends on T (within 5 %)."""
    crf, student, teacher_crf, teacher, mask = pair(legal=None)
    sizes = []
    for temperature in (20.0, 40.0, 80.0):
        if loss is posterior:  # its marginals are tempered afterwards: compare like with like
            arguments = (crf, student * 0.1, teacher_crf, teacher * 0.1, mask)
        else:
            arguments = (crf, student, teacher_crf, teacher, mask)
        sizes.append(
            torch.autograd.grad(loss(*arguments, temperature=temperature), student)[0].norm()
        )
    assert max(sizes) / min(sizes) < 1.05


def test_crf_nll_and_its_gradient():
    crf, student, _, _, mask = pair()
    tags = torch.tensor([[1, 2, 0, 3, 0], [0, 1, 2, 9, 9], [3, 9, 9, 9, 9]])
    expected = -torch.stack(
        [
            crf.log_prob(student[b : b + 1, :n], tags[b : b + 1, :n], mask[b : b + 1, :n])[0]
            for b, n in enumerate(LENGTHS)
        ]
    )
    torch.testing.assert_close(losses.crf_nll(Chain(crf, student), tags, mask), expected.mean())
    assert torch.autograd.gradcheck(lambda s: losses.crf_nll(Chain(crf, s), tags, mask), (student,))
    illegal = tags.clone()
    illegal[0, 0] = 2
    assert losses.crf_nll(Chain(crf, student), illegal, mask) == float("inf")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("k", [1, 4, 2000])
def test_top_k_by_counts_is_the_sum_over_paths(k, weighted):
    crf, student, teacher_crf, teacher, mask = pair()
    expected = []
    paths, scores = teacher_crf.k_best(teacher, mask, k)
    for b in range(3):
        real = scores[b] > float("-inf")
        weight = (
            scores[b][real].softmax(0)
            if weighted
            else torch.full((int(real.sum()),), 1 / int(real.sum())).double()
        )
        log_p = torch.stack(
            [crf.log_prob(student[b : b + 1], p[None], mask[b : b + 1])[0] for p in paths[b][real]]
        )
        expected.append(-(weight * log_p).sum())
    torch.testing.assert_close(
        top_k(crf, student, teacher_crf, teacher, mask, k, weighted), torch.stack(expected).mean()
    )


def test_one_best_is_the_nll_of_pseudo_labels():
    crf, student, teacher_crf, teacher, mask = pair()
    pseudo = losses.crf_nll(Chain(crf, student), teacher_crf.viterbi(teacher, mask), mask)
    for weighted in (False, True):
        torch.testing.assert_close(
            top_k(crf, student, teacher_crf, teacher, mask, 1, weighted), pseudo
        )


def test_all_paths_weighted_is_structural_distillation():
    crf, student, teacher_crf, teacher, mask = pair()
    entropy = (
        -sum(
            (p := s[s > float("-inf")].log_softmax(0)).exp() @ p
            for s in teacher_crf.k_best(teacher, mask, 2000)[1]
        )
        / 3
    )
    everything = top_k(crf, student, teacher_crf, teacher, mask, 2000, weighted=True)
    torch.testing.assert_close(
        everything - entropy, structural(crf, student, teacher_crf, teacher, mask)
    )


def test_structural_is_never_below_posterior_of_a_word():
    crf, student, teacher_crf, teacher, mask = pair()
    one = mask & (torch.arange(5) == 0)
    first = structural(crf, student, teacher_crf, teacher, mask)
    gap = teacher_crf.log_marginals(teacher, mask)[:, 0], crf.log_marginals(student, mask)[:, 0]
    kl = (
        torch.where(gap[0] > -1e300, gap[0].exp() * (gap[0] - gap[1]), 0)
        .nan_to_num(0)
        .sum(-1)
        .mean()
    )
    assert one.any() and first >= kl


def test_posterior_in_float32_survives_certain_teachers():
    crf, student, teacher_crf, teacher, mask = pair(dtype=torch.float32)
    for scale in (1e2, 1e4):
        sure, unsure = (teacher.detach() * scale), (student.detach() * scale).requires_grad_()
        for loss in (posterior, structural):
            value = loss(crf, unsure, teacher_crf, sure, mask)
            value.backward()
            assert value.isfinite() and unsure.grad.isfinite().all()


def test_mix():
    gold, distilled = torch.tensor(3.0), torch.tensor(1.0)
    assert losses.mix(gold, distilled, 0.25).item() == pytest.approx(1.5)
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="alpha"):
            losses.mix(gold, distilled, alpha)


@pytest.mark.parametrize(
    "loss", [x for x in LOSSES.values() if x not in (fuzzy, multi_grained)]
)  # these ask the teacher themselves
def test_scores_of_other_labels_and_bad_temperatures_are_refused(loss):
    crf, student, teacher_crf, teacher, mask = pair()
    with pytest.raises(ValueError, match=r"scores of one shape, got \[3, 5, 4\] and \[3, 5, 3\]"):
        loss(crf, student, teacher_crf, teacher[..., :3], mask)
    for soft in (posterior, structural, soft_targets):
        with pytest.raises(ValueError, match="temperature: expected more than 0, got -2"):
            soft(crf, student, teacher_crf, teacher, mask, temperature=-2)


def test_hard_labels_are_the_mean_surprise_over_words():
    _, student, _, _, mask = pair()
    tags = torch.randint(4, (3, 5))
    picked = student.log_softmax(-1).gather(2, tags[..., None])[..., 0]
    value = losses.hard_labels(student, tags, mask)
    torch.testing.assert_close(value, -picked[mask].mean())
    value.backward()
    assert (student.grad[~mask] == 0).all() and (student.grad[mask].abs().sum(-1) > 0).all()
    assert torch.autograd.gradcheck(
        lambda s: losses.hard_labels(s, tags, mask), student.detach().requires_grad_()
    )


def test_soft_targets_leave_out_labels_excluded_on_both_sides():
    _, student, _, teacher, mask = pair()
    out = torch.zeros(4, dtype=torch.bool)
    out[2] = True
    value = losses.soft_targets(
        student.masked_fill(out, float("-inf")),
        teacher.detach().masked_fill(out, float("-inf")),
        mask,
    )
    torch.testing.assert_close(
        value, losses.soft_targets(student[..., ~out], teacher[..., ~out], mask)
    )
    value.backward()
    assert (student.grad[..., 2] == 0).all() and student.grad.isfinite().all()


def layered(seed=0):
    """Scores [2, 3, 4, 4] and hidden states [2, 4, 6] of two models, and which pieces are no
    padding."""
    torch.manual_seed(seed)
    scores = [torch.randn(2, 3, 4, 4, dtype=torch.double).requires_grad_() for _ in range(2)]
    hidden = [torch.randn(2, 4, 6, dtype=torch.double).requires_grad_() for _ in range(2)]
    return scores, hidden, torch.tensor([[True] * 4, [True, True, False, False]])


def no_projection(states):
    return states


LAYER_LOSSES = {
    "attention": lambda scores, hidden, mask: losses.attention_scores(*scores, mask),
    "hidden": lambda scores, hidden, mask: losses.hidden_states(*hidden, mask, no_projection),
    "cosine": lambda scores, hidden, mask: losses.cosine(*hidden, mask),
    "patient": lambda scores, hidden, mask: losses.patient(*hidden, mask),
}


@pytest.mark.parametrize("loss", LAYER_LOSSES.values(), ids=LAYER_LOSSES)
def test_layer_losses_are_0_for_equal_models_alone_and_teach_the_student_alone(loss):
    scores, hidden, mask = layered()
    value = loss(scores, hidden, mask)
    assert value > 0.1
    value.backward()
    assert sum(x[0].grad.norm() for x in (scores, hidden) if x[0].grad is not None) > 0
    assert scores[1].grad is None and hidden[1].grad is None
    same = loss([scores[0]] * 2, [hidden[0]] * 2, mask)
    assert same.abs() < 1e-12


@pytest.mark.parametrize("loss", LAYER_LOSSES.values(), ids=LAYER_LOSSES)
def test_layer_losses_do_not_see_padding(loss):
    scores, hidden, mask = layered()
    value = loss(scores, hidden, mask)
    wider = [torch.nn.functional.pad(s, (0, 2, 0, 2), value=i + 5.0) for i, s in enumerate(scores)]
    longer = [torch.nn.functional.pad(h, (0, 0, 0, 2), value=i + 5.0) for i, h in enumerate(hidden)]
    torch.testing.assert_close(loss(wider, longer, torch.nn.functional.pad(mask, (0, 2))), value)
    with torch.no_grad():
        scores[1][1, :, 2:] = 99.0
        scores[1][1, :, :, 2:] = 99.0
        hidden[1][1, 2:] = 99.0
    torch.testing.assert_close(loss(scores, hidden, mask), value)


@pytest.mark.parametrize("loss", LAYER_LOSSES.values(), ids=LAYER_LOSSES)
def test_layer_losses_gradcheck(loss):
    scores, hidden, mask = layered()
    assert torch.autograd.gradcheck(
        lambda s, h: loss([s, scores[1]], [h, hidden[1]], mask),
        (scores[0], hidden[0]),
        raise_exception=True,
    )


def test_layers_of_other_shapes_are_refused():
    scores, hidden, mask = layered()
    with pytest.raises(
        ValueError, match=r"as many heads and pieces, got \[2, 2, 4, 4\] and \[2, 3, 4, 4\]"
    ):
        losses.attention_scores(scores[0][:, :2], scores[1], mask)
    for loss in (losses.cosine, losses.patient):
        with pytest.raises(ValueError, match="hidden states of one width"):
            loss(hidden[0][..., :3], hidden[1], mask)


def test_hidden_states_meet_through_the_projection():
    _, hidden, mask = layered()
    projection = torch.nn.Linear(3, 6, bias=False).double()
    own = hidden[0][..., :3]
    by_hand = (own[mask] @ projection.weight.T - hidden[1][mask]).square().mean()
    torch.testing.assert_close(losses.hidden_states(own, hidden[1], mask, projection), by_hand)


def test_soft_cross_entropy_has_the_papers_gradient_and_limit():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 1, 3, 5, dtype=torch.double)
    student, teacher = (z - z.mean(-1, keepdim=True) for z in (student, teacher))
    student.requires_grad_()
    mask = torch.ones(1, 3, dtype=torch.bool)
    for t in (0.5, 1.0, 4.0):
        (found,) = torch.autograd.grad(
            losses.soft_cross_entropy(student, teacher, mask, t), student
        )
        torch.testing.assert_close(
            found, ((student / t).softmax(-1) - (teacher / t).softmax(-1)).detach() / t / 3
        )  # eq. 4
    (found,) = torch.autograd.grad(losses.soft_cross_entropy(student, teacher, mask, 1e4), student)
    torch.testing.assert_close(
        found * 1e8, (student - teacher).detach() / 5 / 3, rtol=1e-3, atol=1e-5
    )  # eq. 6
    (found,) = torch.autograd.grad(
        losses.soft_cross_entropy(student, teacher, mask, 4.0, 1.0), student
    )
    torch.testing.assert_close(
        found, (student.softmax(-1) - (teacher / 4).softmax(-1)).detach() / 3
    )  # eq. 12
    kl = losses.soft_targets(student, teacher, mask, 3.0) / 9
    p = (teacher / 3).softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean()
    torch.testing.assert_close(losses.soft_cross_entropy(student, teacher, mask, 3.0), kl + entropy)
    with pytest.raises(ValueError, match="temperature"):
        losses.soft_cross_entropy(student, teacher, mask, 1.0, 0.0)


def test_the_adaptive_weight_is_eq_14_and_does_not_do_what_the_text_says():
    e = math.e
    for b in (0.0, -0.5, -3.6, 1.0):
        for x in (0.0, 0.25, 1.0):
            assert losses.adaptive_weight(x, b) == pytest.approx(max(1 - e ** (x + b) / e, 0))
    assert (
        losses.adaptive_weight(0.0) == pytest.approx(0.632, abs=1e-3)
        and losses.adaptive_weight(1.0) == 0
    )
    assert not any(
        losses.adaptive_weight(0.0, b / 10) > 0.99 and losses.adaptive_weight(1.0, b / 10) < 0.01
        for b in range(-60, 20)
    )
    assert losses.rescaled_weight(0.0) == 1 and losses.rescaled_weight(1.0) == pytest.approx(0)
    top, bottom = (1 - e ** (x - 1) for x in (0, 1))
    assert losses.rescaled_weight(0.4) == pytest.approx(
        (1 - e ** (0.4 - 1) - bottom) / (top - bottom)
    )
    for schedule in (losses.adaptive_weight, losses.rescaled_weight):
        with pytest.raises(ValueError, match="from 0 to 1, got 1.5"):
            schedule(1.5)


def test_eq_15():
    soft, hard, layers = (torch.tensor(v) for v in (2.0, 3.0, 5.0))
    assert losses.adaptive(soft, hard, layers, 0.25) == pytest.approx(
        0.25 * 2 + 0.75 * 3 + 0.25 * 5
    )
    with pytest.raises(ValueError, match=r"theta.*got -0\.1"):
        losses.adaptive(soft, hard, layers, -0.1)
