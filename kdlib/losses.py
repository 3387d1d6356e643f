"""One pure function per equation. Open this file first.

`student` and `teacher` are emissions [B, L, K] of the same batch, `mask` [B, L] says which positions are words. Gradients flow into
`student` and `crf` alone: the teacher's side is a constant. Every loss over whole sequences (`crf_nll`, `top_k`, `posterior`,
`structural`) is a sum over the words of a sentence and a mean over sentences, so they can be mixed; so can `hard_labels` and
`soft_targets`, which know no CRF and are means over words. Equation numbers are those of the meta-structured distillation (MSD) paper
unless another is named; "adaptive" is Chengqiong and Hernandez 2023. Losses between layers take what `layers.watched` finds.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from kdlib.crf import NEG_INF, LinearChainCRF
from kdlib.surrogates import Surrogates, surrogate_labels, teacher_paths


def crf_nll(crf: LinearChainCRF, student: Tensor, tags: Tensor, mask: Tensor) -> Tensor:
    """-log p(y | x), mean over sentences (eq. 4). Tags [B, L]; +inf for a tag sequence that the CRF forbids."""
    return -crf.log_prob(student, tags, mask).mean()


def labelled_nll(crf: LinearChainCRF, student: Tensor, tags: Tensor, mask: Tensor, labelled: Tensor) -> Tensor:
    """`crf_nll` of the sentences that have gold labels, `labelled` [B], over the number of all: 0 where there are none."""
    if not bool(labelled.any()):
        return student.sum() * 0
    return crf_nll(crf, student[labelled], tags[labelled], mask[labelled]) * labelled.float().mean()


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


def soft_cross_entropy(
    student: Tensor, teacher: Tensor, mask: Tensor, temperature: float = 1.0, student_temperature: float | None = None
) -> Tensor:
    """-sum_i p_i(z_t, T) log p_i(z_s, T), mean over words (adaptive eq. 3); its gradient for z_s is (p_s - p_t) / T (eq. 4).

    Logits [B, L, K]. `student_temperature` 1 gives the adaptive paper's eq. 12, where the teacher alone is softened. Not multiplied by
    T^2, as in the paper: at a high temperature the gradient falls as 1 / T^2 (eq. 6).
    """
    own = temperature if student_temperature is None else student_temperature
    _check(student, teacher, min(temperature, own))
    teacher_p, student_log = F.softmax(teacher.detach()[mask] / temperature, -1), F.log_softmax(student[mask] / own, -1)
    return -(teacher_p * student_log).sum(-1).mean()


def attention_scores(student: Tensor, teacher: Tensor, piece_mask: Tensor) -> Tensor:
    """1/h sum_i MSE(A_i^S, A_i^T) over the h heads, on scores before the softmax (adaptive eq. 17; Jiao et al. 2020).

    Scores [N, H, P, P] of one layer each; the mean is over pairs of pieces, padding left out. ValueError unless heads match.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"expected attention scores of as many heads and pieces, got {list(student.shape)} and {list(teacher.shape)}"
        )
    pairs = (piece_mask[:, None, :] & piece_mask[:, :, None])[:, None].float()  # half precision could not count them
    gaps = (student - teacher.detach()) * pairs  # a product, as picking the pairs out one by one takes longer than the model
    return gaps.square().sum() / (pairs.sum() * student.shape[1])


def hidden_states(student: Tensor, teacher: Tensor, piece_mask: Tensor, projection: Callable[[Tensor], Tensor]) -> Tensor:
    """MSE(H^S W_h, H^T) over word pieces (adaptive eq. 18). [N, P, d] and [N, P, D]; `projection` is W_h, learned with the student."""
    own = projection(student[piece_mask])
    return F.mse_loss(own, teacher.detach()[piece_mask].to(own))


def cosine(student: Tensor, teacher: Tensor, piece_mask: Tensor) -> Tensor:
    """1 - cos(h_S, h_T), mean over word pieces: DistilBERT's third term (Sanh et al. 2019). Hidden states [N, P, D] of one width."""
    return 1 - F.cosine_similarity(*_hidden(student, teacher, piece_mask), dim=-1).mean()


def patient(student: Tensor, teacher: Tensor, piece_mask: Tensor) -> Tensor:
    """|| h_S / |h_S| - h_T / |h_T| ||^2, mean over word pieces (BERT-PKD, Sun et al. 2019, who take [CLS] alone). [N, P, D] both."""
    own, other = (F.normalize(h, dim=-1) for h in _hidden(student, teacher, piece_mask))
    return (own - other).square().sum(-1).mean()


def adaptive(soft: Tensor, hard: Tensor, layers: Tensor, theta: float) -> Tensor:
    """theta L_soft + (1 - theta) L_hard + theta L_trans (adaptive eq. 15); ValueError unless 0 <= theta <= 1."""
    if not 0 <= theta <= 1:
        raise ValueError(f"theta: expected a weight from 0 to 1, got {theta}")
    return theta * soft + (1 - theta) * hard + theta * layers


def adaptive_weight(progress: float, b: float = 0.0) -> float:
    """theta_t = max(1 - e^(t / step + b) / e, 0) as printed (adaptive eq. 14); progress is t / step, from 0 to 1.

    Runs from 1 - e^(b - 1) down to max(1 - e^b, 0), so no b takes it from 1 to 0, as the text says it goes.
    """
    return max(1 - math.exp(min(_share(progress) + b - 1, 0)), 0.0)  # above 0 it is cut anyway


def rescaled_weight(progress: float) -> float:
    """(e - e^x) / (e - 1), x = t / step: eq. 14's curve rescaled to go from 1 to 0. The bias b cancels."""
    return (math.e - math.exp(_share(progress))) / (math.e - 1)


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
    k legal paths uses those it has.
    """
    _check(student, teacher)
    found = surrogate_labels(teacher_crf, teacher, mask, k, 1.0 if weighted else math.inf)
    return crf_cross_entropy(crf, student, found, mask)


def crf_cross_entropy(crf: LinearChainCRF, student: Tensor, surrogates: Surrogates, mask: Tensor) -> Tensor:
    """-sum_j w_j log p_S(y^(j) | x) = log Z_S - E_w[s_S(x, y)] over the teacher's k best paths, mean over sentences.

    The sequence grain of multi-grained distillation, and Wang et al.'s (2020) Top-WK. One partition however large k: the expected score
    needs the surrogate labels' counts alone. With every path and w_j = p_T(y^(j)) it is eq. 10's cross entropy.
    """
    _check(student, surrogates.unary)
    return (crf.log_partition(student, mask) - crf.expected_score(student, surrogates.unary, surrogates.pairwise, mask)).mean()


def fuzzy(crf: LinearChainCRF, student: Tensor, allowed: Tensor, mask: Tensor) -> Tensor:
    """-log p_S(every y_i in A_i | x) = log Z_S - log Z_S(A), mean over sentences (fuzzy CRF, Shang et al. 2018).

    The label grain of multi-grained distillation: `allowed` [B, L, K] holds the labels that the teacher's k best paths use. Any legal
    mixture of them satisfies it, and it does not say which is best. 0 where every label is allowed. Its gradient for an emission is
    p_S(y_i) - p_S(y_i | A). ValueError where no legal path is left.
    """
    inside = crf.constrained_log_partition(student, allowed, mask)
    if bool((inside == NEG_INF).any()):
        raise ValueError(
            f"allowed: expected a legal path in every sentence, got none in {(inside == NEG_INF).nonzero().flatten().tolist()}"
        )
    return (crf.log_partition(student, mask) - inside).mean()


def path_set(
    crf: LinearChainCRF, student: Tensor, teacher_crf: LinearChainCRF, teacher: Tensor, mask: Tensor, k: int = 10
) -> Tensor:
    """-log sum_j p_S(y^(j) | x) over the teacher's k best paths, mean over sentences: fuzzy learning without recombined paths."""
    _check(student, teacher)
    paths, scores = teacher_paths(teacher_crf, teacher, mask, k)
    return -_path_log_probs(crf, student, paths, scores, mask).logsumexp(1).mean()


def decoupled(
    crf: LinearChainCRF,
    student: Tensor,
    teacher_crf: LinearChainCRF,
    teacher: Tensor,
    mask: Tensor,
    k: int = 10,
    beta: float = 1.0,
) -> Tensor:
    """KL(p_T || p_S) on "the best path, or another" + beta KL over which other of the k best, mean over sentences.

    Decoupled distillation (Zhao B. et al. 2022, eq. 7) with paths for classes: our reading of kvDKD (Zhao et al. 2024), of which the
    abstract alone is public. With beta = 1 - p_T(best) and every path this is the KL over whole sequences, which so mutes the second
    part exactly where the teacher is sure; a constant beta does not.
    """
    _check(student, teacher)
    with torch.no_grad():
        paths, scores = teacher_paths(teacher_crf, teacher, mask, k)
        teacher_log = scores - teacher_crf.log_partition(teacher, mask)[:, None]
        teacher_other = teacher_crf.log_prob_of_others(teacher, paths[:, 0], mask)
    student_log = _path_log_probs(crf, student, paths, scores, mask)
    student_other = crf.log_prob_of_others(student, paths[:, 0], mask)
    target = _kl(torch.stack([teacher_log[:, 0], teacher_other], 1), torch.stack([student_log[:, 0], student_other], 1))
    if scores.shape[1] == 1:
        return target.mean()
    there = (scores[:, 1:2] > NEG_INF).squeeze(1)  # a sentence of one legal path has no other
    others = [F.log_softmax(log_p[there, 1:], 1) for log_p in (teacher_log, student_log)]
    return target.mean() + beta * _kl(*others).sum() / len(mask)


def multi_grained(
    crf: LinearChainCRF,
    student: Tensor,
    teacher_crf: LinearChainCRF,
    teacher: Tensor,
    surrogates: Surrogates,
    mask: Tensor,
    grains: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3),
    temperature: float = 1.0,
) -> Tensor:
    """g_1 crf_cross_entropy + g_2 fuzzy + g_3 posterior: sequence, label and token grain (Zhou et al. 2021, reconstructed).

    The abstract names the CRF cross entropy and fuzzy learning; the token grain, the weights and their sizes are our choice. A grain
    with weight 0 is not computed. `temperature` is the token grain's.
    """
    _check(student, teacher, temperature)
    if len(grains) != 3 or not all(0 <= g < math.inf for g in grains) or not any(grains):
        raise ValueError(f"grains: expected three weights of 0 or more, not all 0, got {grains}")
    sequence, label, token = grains
    loss = student.new_zeros(())
    if sequence:
        loss = loss + sequence * crf_cross_entropy(crf, student, surrogates, mask)
    if label:
        loss = loss + label * fuzzy(crf, student, surrogates.allowed, mask)
    if token:
        loss = loss + token * posterior(crf, student, teacher_crf, teacher, mask, temperature)
    return loss


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


def _share(progress: float) -> float:
    if not 0 <= progress <= 1:
        raise ValueError(f"progress: expected a share of the updates from 0 to 1, got {progress}")
    return progress


def _hidden(student: Tensor, teacher: Tensor, piece_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides' hidden states of word pieces [., D]."""
    if student.shape != teacher.shape:
        raise ValueError(f"expected hidden states of one width, got {list(student.shape)} and {list(teacher.shape)}")
    return student[piece_mask], teacher.detach()[piece_mask].to(student)


def _kl(teacher_log: Tensor, student_log: Tensor) -> Tensor:
    """KL per row of log probabilities; a label that the teacher excludes, or that underflows to 0, costs nothing."""
    impossible = teacher_log.exp() == 0
    gap = teacher_log.masked_fill(impossible, 0) - student_log.masked_fill(impossible, 0)
    return (teacher_log.exp() * gap).sum(-1)


def _path_log_probs(crf: LinearChainCRF, student: Tensor, paths: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """log p_S of the teacher's paths [B, k]; -inf where there is no such path."""
    log_p = torch.stack([crf.score(student, path, mask) for path in paths.unbind(1)], 1)
    return (log_p - crf.log_partition(student, mask)[:, None]).masked_fill(scores == NEG_INF, NEG_INF)


def _check(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> None:
    """ValueError unless student and teacher score the same words and labels, at a temperature above 0."""
    if student.shape != teacher.shape:
        raise ValueError(f"expected student and teacher scores of one shape, got {list(student.shape)} and {list(teacher.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature: expected more than 0, got {temperature}")
