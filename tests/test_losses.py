import pytest
import torch

from kdlib import losses
from kdlib.crf import LinearChainCRF
from kdlib.labels import legal_iob2
from kdlib.surrogates import surrogate_labels

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


def soft_targets(crf, student, teacher_crf, teacher, mask, temperature=2.0):
    return losses.soft_targets(student, teacher, mask, temperature)


def weighted_top_k(*arguments):
    return losses.top_k(*arguments, k=3, weighted=True)


def fuzzy(crf, student, teacher_crf, teacher, mask):
    return losses.fuzzy(crf, student, surrogate_labels(teacher_crf, teacher, mask, k=2).allowed, mask)


def multi_grained(crf, student, teacher_crf, teacher, mask):
    surrogates = surrogate_labels(teacher_crf, teacher, mask, k=2)
    return losses.multi_grained(crf, student, teacher_crf, teacher, surrogates, mask, (0.2, 0.3, 0.5))


DIVERGENCES = {
    "soft targets": soft_targets,
    "posterior": losses.posterior,
    "posterior at 2": lambda *a: losses.posterior(*a, temperature=2.0),
    "structural": losses.structural,
    "structural at 3": lambda *a: losses.structural(*a, temperature=3.0),
    "decoupled": lambda *a: losses.decoupled(*a, k=4),
}
LOSSES = DIVERGENCES | {
    "top-k": losses.top_k,
    "weighted top-k": weighted_top_k,
    "fuzzy": fuzzy,
    "path set": lambda *a: losses.path_set(*a, k=2),
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
    wide = [torch.cat([e.detach(), torch.full((3, 2, 4), 7.0, dtype=torch.double)], 1) for e in (student, teacher)]
    wide_mask = torch.cat([mask, torch.zeros(3, 2, dtype=torch.bool)], 1)
    value = loss(crf, student, teacher_crf, teacher, mask)
    torch.testing.assert_close(loss(crf, wide[0], teacher_crf, wide[1], wide_mask), value)
    assert student.equal(kept[0]) and teacher.equal(kept[1])


@each
def test_a_constant_added_to_a_words_scores_changes_nothing(loss):
    crf, student, teacher_crf, teacher, mask = pair()
    shift = torch.randn(3, 5, 1, dtype=torch.double)
    value = loss(crf, student, teacher_crf, teacher, mask)
    torch.testing.assert_close(loss(crf, student + shift, teacher_crf, teacher - shift, mask), value)


@each
def test_one_word_sentences(loss):
    crf, student, teacher_crf, teacher, _ = pair()
    value = loss(crf, student[:, :1], teacher_crf, teacher[:, :1], torch.ones(3, 1, dtype=torch.bool))
    assert value.isfinite() and value > 0


@each
@both
def test_gradients_are_right(loss, legal):
    crf, student, teacher_crf, teacher, mask = pair(legal)
    assert torch.autograd.gradcheck(lambda s: loss(crf, s, teacher_crf, teacher, mask), (student,))
    assert torch.autograd.gradgradcheck(lambda s: loss(crf, s, teacher_crf, teacher, mask), (student,))


@pytest.mark.parametrize("loss", [soft_targets, losses.posterior, losses.structural])
def test_temperature_squared_keeps_the_gradients_size(loss):
    """Hinton's T^2: at high temperatures the gradient no longer depends on T (within 5 %)."""
    crf, student, teacher_crf, teacher, mask = pair(legal=None)
    sizes = []
    for temperature in (20.0, 40.0, 80.0):
        if loss is losses.posterior:  # its marginals are tempered afterwards: compare like with like
            arguments = (crf, student * 0.1, teacher_crf, teacher * 0.1, mask)
        else:
            arguments = (crf, student, teacher_crf, teacher, mask)
        sizes.append(torch.autograd.grad(loss(*arguments, temperature=temperature), student)[0].norm())
    assert max(sizes) / min(sizes) < 1.05


def test_crf_nll_and_its_gradient():
    crf, student, _, _, mask = pair()
    tags = torch.tensor([[1, 2, 0, 3, 0], [0, 1, 2, 9, 9], [3, 9, 9, 9, 9]])
    expected = -torch.stack(
        [crf.log_prob(student[b : b + 1, :n], tags[b : b + 1, :n], mask[b : b + 1, :n])[0] for b, n in enumerate(LENGTHS)]
    )
    torch.testing.assert_close(losses.crf_nll(crf, student, tags, mask), expected.mean())
    assert torch.autograd.gradcheck(lambda s: losses.crf_nll(crf, s, tags, mask), (student,))
    illegal = tags.clone()
    illegal[0, 0] = 2
    assert losses.crf_nll(crf, student, illegal, mask) == float("inf")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("k", [1, 4, 2000])
def test_top_k_by_counts_is_the_sum_over_paths(k, weighted):
    crf, student, teacher_crf, teacher, mask = pair()
    expected = []
    paths, scores = teacher_crf.k_best(teacher, mask, k)
    for b in range(3):
        real = scores[b] > float("-inf")
        weight = scores[b][real].softmax(0) if weighted else torch.full((int(real.sum()),), 1 / int(real.sum())).double()
        log_p = torch.stack([crf.log_prob(student[b : b + 1], p[None], mask[b : b + 1])[0] for p in paths[b][real]])
        expected.append(-(weight * log_p).sum())
    torch.testing.assert_close(losses.top_k(crf, student, teacher_crf, teacher, mask, k, weighted), torch.stack(expected).mean())


def test_one_best_is_the_nll_of_pseudo_labels():
    crf, student, teacher_crf, teacher, mask = pair()
    pseudo = losses.crf_nll(crf, student, teacher_crf.viterbi(teacher, mask), mask)
    for weighted in (False, True):
        torch.testing.assert_close(losses.top_k(crf, student, teacher_crf, teacher, mask, 1, weighted), pseudo)


def test_all_paths_weighted_is_structural_distillation():
    crf, student, teacher_crf, teacher, mask = pair()
    entropy = -sum((p := s[s > float("-inf")].log_softmax(0)).exp() @ p for s in teacher_crf.k_best(teacher, mask, 2000)[1]) / 3
    everything = losses.top_k(crf, student, teacher_crf, teacher, mask, 2000, weighted=True)
    torch.testing.assert_close(everything - entropy, losses.structural(crf, student, teacher_crf, teacher, mask))


def test_structural_is_never_below_posterior_of_a_word():
    crf, student, teacher_crf, teacher, mask = pair()
    one = mask & (torch.arange(5) == 0)
    first = losses.structural(crf, student, teacher_crf, teacher, mask)
    gap = teacher_crf.log_marginals(teacher, mask)[:, 0], crf.log_marginals(student, mask)[:, 0]
    kl = torch.where(gap[0] > -1e300, gap[0].exp() * (gap[0] - gap[1]), 0).nan_to_num(0).sum(-1).mean()
    assert one.any() and first >= kl


def test_posterior_in_float32_survives_certain_teachers():
    crf, student, teacher_crf, teacher, mask = pair(dtype=torch.float32)
    for scale in (1e2, 1e4):
        sure, unsure = (teacher.detach() * scale), (student.detach() * scale).requires_grad_()
        for loss in (losses.posterior, losses.structural):
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
    for soft in (losses.posterior, losses.structural, soft_targets):
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
    assert torch.autograd.gradcheck(lambda s: losses.hard_labels(s, tags, mask), student.detach().requires_grad_())


def test_soft_targets_leave_out_labels_excluded_on_both_sides():
    _, student, _, teacher, mask = pair()
    out = torch.zeros(4, dtype=torch.bool)
    out[2] = True
    value = losses.soft_targets(student.masked_fill(out, float("-inf")), teacher.detach().masked_fill(out, float("-inf")), mask)
    torch.testing.assert_close(value, losses.soft_targets(student[..., ~out], teacher[..., ~out], mask))
    value.backward()
    assert (student.grad[..., 2] == 0).all() and student.grad.isfinite().all()
