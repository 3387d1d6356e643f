"""One pure function per equation. Open this file first.

`student` and `teacher` are emissions [B, L, K] of the same batch, `mask` [B, L] says which positions are words. Gradients flow into
`student` and `crf` alone: the teacher's side is a constant. Every loss over whole sequences (`crf_nll`, `top_k`, `posterior`,
`structural`) is a sum over the words of a sentence and a mean over sentences, so they can be mixed; so can `hard_labels` and
`soft_targets`, which know no CRF and are means over words. Equation numbers are those of the meta-structured distillation (MSD) paper
unless another is named.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kdlib.crf import NEG_INF, LinearChainCRF


def crf_nll(crf: LinearChainCRF, student: Tensor, tags: Tensor, mask: Tensor) -> Tensor:
    """-log p(y | x), mean over sentences (eq. 4). Tags [B, L]; +inf for a tag sequence that the CRF forbids."""
    return -crf.log_prob(student, tags, mask).mean()


def hard_labels(student: Tensor, tags: Tensor, mask: Tensor) -> Tensor:
    """-log softmax(student)[tag], mean over words: what a student without a teacher learns from. Logits [B, L, K], tags [B, L]."""
    return F.cross_entropy(student[mask], tags[mask])


def soft_targets(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float = 2.0) -> Tensor:
    """T^2 KL(teacher || student) at temperature T, mean over words (Hinton et al. 2015, section 2).

    Logits [B, L, K], or the teacher's log probabilities; -inf on both sides excludes a label. T^2 keeps the gradient's size
    independent of T: each logit's gradient carries 1 / T twice.
    """
    _check(student, teacher, temperature)
    teacher_log, student_log = (F.log_softmax(z[mask] / temperature, -1) for z in (teacher.detach(), student))
    return temperature**2 * _kl(teacher_log, student_log).mean()


def top_k(
    crf: LinearChainCRF,
    student: Tensor,
    teacher_crf: LinearChainCRF,
    teacher: Tensor,
    mask: Tensor,
    k: int = 10,
    weighted: bool = False,
) -> Tensor:
    """-1/k sum_j log p_S(y^(j) | x) over the teacher's k best paths (eq. 7), mean over sentences.

    `weighted`: weights softmax of the paths' teacher scores instead of 1/k (Wang et al. 2020, Top-WK). A sentence with fewer than
    k legal paths uses those it has. One partition however large k: sum_j w_j s(y^(j)) is the score of the expected label counts.
    """
    _check(student, teacher)
    with torch.no_grad():
        paths, scores = teacher_crf.k_best(teacher, mask, k)
        weights = scores if weighted else scores.masked_fill(scores > NEG_INF, 0)
        unary, pairwise = path_counts(paths, weights.softmax(1), mask, crf.num_labels)
    return (crf.log_partition(student, mask) - crf.expected_score(student, unary, pairwise, mask)).mean()


def path_counts(paths: Tensor, weights: Tensor, mask: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
    """Expected label counts [B, L, K] and transition counts [B, L-1, K, K] of weighted paths [B, k, L], weights [B, k]."""
    chosen = F.one_hot(paths, num_labels).to(weights) * mask[:, None, :, None]
    unary = torch.einsum("bj,bjlv->blv", weights, chosen)
    pairwise = torch.einsum("bj,bjlu,bjlv->bluv", weights, chosen[:, :, :-1], chosen[:, :, 1:])
    return unary, pairwise


def posterior(
    crf: LinearChainCRF,
    student: Tensor,
    teacher_crf: LinearChainCRF,
    teacher: Tensor,
    mask: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """T^2 sum_i KL(q_T(y_i | x) || q_S(y_i | x)) over words of the CRFs' token marginals (eq. 8-9), mean over sentences.

    Eq. 9 prints the cross entropy; KL has the same gradient and is 0 when the student is the teacher. The temperature is applied
    to both sides' marginals afterwards, as Wang et al. (2020) do.
    """
    _check(student, teacher, temperature)
    with torch.no_grad():
        teacher_log = teacher_crf.log_marginals(teacher, mask)[mask] / temperature
    student_log = crf.log_marginals(student, mask)[mask] / temperature
    if temperature != 1:
        teacher_log, student_log = F.log_softmax(teacher_log, -1), F.log_softmax(student_log, -1)
    return temperature**2 * _kl(teacher_log, student_log).sum() / len(mask)


def structural(
    crf: LinearChainCRF,
    student: Tensor,
    teacher_crf: LinearChainCRF,
    teacher: Tensor,
    mask: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """T^2 KL(p_T || p_S) over whole tag sequences, both chains at temperature T (eq. 10-11), mean over sentences.

    Eq. 10 prints the cross entropy; KL has the same gradient and is 0 when the student is the teacher (Wang et al. 2021).
    """
    _check(student, teacher, temperature)
    with torch.no_grad():
        unary, pairwise = teacher_crf.marginals(teacher, mask, temperature)
        entropy = teacher_crf.log_partition(teacher, mask, temperature)
        entropy = entropy - teacher_crf.expected_score(teacher, unary, pairwise, mask, temperature)
    cross = crf.log_partition(student, mask, temperature)
    cross = cross - crf.expected_score(student, unary, pairwise, mask, temperature)
    return temperature**2 * (cross - entropy).mean()


def mix(gold: Tensor, distilled: Tensor, alpha: float) -> Tensor:
    """alpha L_NLL + (1 - alpha) L_KD (eq. 6); ValueError unless 0 <= alpha <= 1."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected a weight from 0 to 1, got {alpha}")
    return alpha * gold + (1 - alpha) * distilled


def _kl(teacher_log: Tensor, student_log: Tensor) -> Tensor:
    """KL per row of log probabilities; a label that the teacher excludes, or that underflows to 0, costs nothing."""
    impossible = teacher_log.exp() == 0
    gap = teacher_log.masked_fill(impossible, 0) - student_log.masked_fill(impossible, 0)
    return (teacher_log.exp() * gap).sum(-1)


def _check(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> None:
    """ValueError unless student and teacher score the same words and labels, at a temperature above 0."""
    if student.shape != teacher.shape:
        raise ValueError(f"expected student and teacher scores of one shape, got {list(student.shape)} and {list(teacher.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature: expected more than 0, got {temperature}")
