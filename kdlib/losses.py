"""One pure function per equation. Open this file first.

Losses over whole sequences (`crf_nll`, `top_k`, `posterior`, `structural` ...) compare two
`Chain`s, a CRF with its emissions [B, L, K] each; they sum over the words of a sentence and average
over sentences, so they can be mixed. Losses over words (`hard_labels`, `soft_targets` ...) take
logits [B, L, K] and average over words. `mask` [B, L] says which positions are words. Gradients
flow into the student alone, but for the last three functions, which a teacher that learns listens
to. Equation numbers are those of the meta-structured distillation (MSD) paper unless another is
named; "adaptive" is Chengqiong and Hernandez 2023.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kdlib.crf import NEG_INF, Chain

# ---- gold labels ----


def crf_nll(student: Chain, tags: Tensor, mask: Tensor) -> Tensor:
    """-log p(y | x), mean over sentences (eq. 4). Tags [B, L]; +inf for a sequence the CRF
    forbids."""
    return -student.crf.log_prob(student.emissions, tags, mask).mean()


def labelled_nll(student: Chain, tags: Tensor, mask: Tensor, labelled: Tensor) -> Tensor:
    """`crf_nll` of the sentences that have gold labels, `labelled` [B], over the number of all."""
    if not bool(labelled.any()):
        return student.emissions.sum() * 0
    known = student._replace(emissions=student.emissions[labelled])
    return crf_nll(known, tags[labelled], mask[labelled]) * labelled.float().mean()


def hard_labels(student: Tensor, tags: Tensor, mask: Tensor) -> Tensor:
    """-log softmax(student)[tag], mean over words. Logits [B, L, K], tags [B, L]."""
    return F.cross_entropy(student[mask], tags[mask])


def labelled_words(student: Tensor, tags: Tensor, mask: Tensor, labelled: Tensor) -> Tensor:
    """`hard_labels` of the sentences with gold labels, `labelled` [B], weighted with their share of
    the batch's words (adaptive eq. 13)."""
    known = mask & labelled[:, None]
    if not known.any():
        return student[mask].sum() * 0
    return hard_labels(student, tags, known) * (known.sum() / mask.sum())


def mix(gold: Tensor, distilled: Tensor, alpha: float) -> Tensor:
    """alpha L_NLL + (1 - alpha) L_KD (eq. 6); ValueError unless 0 <= alpha <= 1."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected a weight from 0 to 1, got {alpha}")
    return alpha * gold + (1 - alpha) * distilled


# ---- soft labels, a word at a time ----


def soft_targets(
    student: Tensor, teacher: Tensor, mask: Tensor, temperature: float = 2.0
) -> Tensor:
    """T^2 KL(teacher || student) at temperature T, mean over words (Hinton et al. 2015, section 2).

    Logits [B, L, K], or log probabilities; -inf on both sides excludes a label. T^2 keeps the
    gradient's size independent of T: each logit's gradient carries 1 / T twice.
    """
    _check(student, teacher, temperature)
    sides = (teacher.detach(), student)
    return temperature**2 * _kl(*(F.log_softmax(z[mask] / temperature, -1) for z in sides)).mean()


def soft_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    temperature: float = 1.0,
    student_temperature: float | None = None,
) -> Tensor:
    """-sum_i p_i(z_t, T) log p_i(z_s, T), mean over words (adaptive eq. 3).

    Logits [B, L, K]. The gradient for z_s is (p_s - p_t) / T (eq. 4). `student_temperature` 1 gives
    eq. 12, where the teacher alone is softened. Not multiplied by T^2, as in the paper: at a high
    temperature the gradient falls as 1 / T^2 (eq. 6).
    """
    own = temperature if student_temperature is None else student_temperature
    _check(student, teacher, min(temperature, own))
    teacher_p = F.softmax(teacher.detach()[mask] / temperature, -1)
    student_log = F.log_softmax(student[mask] / own, -1)
    return -(teacher_p * student_log.masked_fill(teacher_p == 0, 0)).sum(-1).mean()


# ---- layers ----


def layer_map(student: int, teacher: int) -> dict[int, int]:
    """Student layer m learns from teacher layer m N / M (adaptive fig. 5).

    ValueError unless M layers divide N.
    """
    if not 0 < student <= teacher or teacher % student:
        raise ValueError(
            f"expected a number of student layers that divides the teacher's {teacher}, "
            f"got {student}"
        )
    return {m: m * teacher // student for m in range(1, student + 1)}


def patient_map(student: int, teacher: int, last: bool = False) -> dict[int, int]:
    """BERT-PKD's map: every N/M-th layer, or with `last` the layers below the top; the top layer
    itself is left to the labels."""
    skip = layer_map(student, teacher)
    return {m: teacher - student + m if last else skip[m] for m in range(1, student)}


def attention_scores(student: Tensor, teacher: Tensor, piece_mask: Tensor) -> Tensor:
    """1/h sum_i MSE(A_i^S, A_i^T) over the h heads, before the softmax (adaptive eq. 17; TinyBERT).

    Scores [N, H, P, P] of one layer each; the mean is over pairs of pieces, padding left out.
    ValueError unless heads match.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            "expected attention scores of as many heads and pieces, "
            f"got {list(student.shape)} and {list(teacher.shape)}"
        )
    pairs = (piece_mask[:, None, :] & piece_mask[:, :, None])[:, None].float()  # no half precision
    gaps = (student - teacher.detach()) * pairs  # picking the pairs out takes longer than the model
    return gaps.square().sum() / (pairs.sum() * student.shape[1])


def hidden_states(
    student: Tensor, teacher: Tensor, piece_mask: Tensor, projection: Callable[[Tensor], Tensor]
) -> Tensor:
    """MSE(H^S W_h, H^T) over word pieces (adaptive eq. 18).

    [N, P, d] and [N, P, D]; `projection` is W_h, learned with the student.
    """
    own = projection(student[piece_mask])
    return F.mse_loss(own, teacher.detach()[piece_mask].to(own))


def cosine(student: Tensor, teacher: Tensor, piece_mask: Tensor) -> Tensor:
    """1 - cos(h_S, h_T), mean over word pieces (DistilBERT, Sanh et al. 2019). Both [N, P, D]."""
    return 1 - F.cosine_similarity(*_hidden(student, teacher, piece_mask), dim=-1).mean()


def patient(student: Tensor, teacher: Tensor, piece_mask: Tensor) -> Tensor:
    """|| h_S / |h_S| - h_T / |h_T| ||^2, mean over word pieces (BERT-PKD, Sun et al. 2019, who take
    [CLS] alone). Both [N, P, D]."""
    own, other = (F.normalize(h, dim=-1) for h in _hidden(student, teacher, piece_mask))
    return (own - other).square().sum(-1).mean()


def adaptive(soft: Tensor, hard: Tensor, layers: Tensor, theta: float) -> Tensor:
    """theta L_soft + (1 - theta) L_hard + theta L_trans (adaptive eq. 15); needs 0 <= theta <=
    1."""
    if not 0 <= theta <= 1:
        raise ValueError(f"theta: expected a weight from 0 to 1, got {theta}")
    return theta * soft + (1 - theta) * hard + theta * layers


def adaptive_weight(progress: float, b: float = 0.0) -> float:
    """theta_t = max(1 - e^(t / step + b) / e, 0) as printed (adaptive eq. 14); progress is t /
    step.

    Runs from 1 - e^(b - 1) down to max(1 - e^b, 0): no b takes it from 1 to 0, as the text says.
    """
    return max(1 - math.exp(min(_share(progress) + b - 1, 0)), 0.0)  # above 0 it is cut anyway


def rescaled_weight(progress: float) -> float:
    """(e - e^x) / (e - 1), x = t / step: eq. 14's curve taken from 1 to 0. The bias b cancels."""
    return (math.e - math.exp(_share(progress))) / (math.e - 1)


# ---- the teacher's k best paths ----


class Surrogates(NamedTuple):
    """What the k best paths y^(j) with weights w_j say of each word and pair of neighbours.

    unary [B, L, K]: U_i(v) = sum_j w_j [y_i^(j) = v]. pairwise [B, L-1, K, K]: P_i(u, v) =
    sum_j w_j [y_i^(j) = u, y_(i+1)^(j) = v]. allowed [B, L, K]: whether any path gives word i the
    label v, however small its weight. All zero on padding. Zhou et al. (2021) call them surrogate
    labels; only their abstract is public, so weights and counts are a reconstruction.
    """

    unary: Tensor
    pairwise: Tensor
    allowed: Tensor

    def to(self, device: torch.device | str) -> "Surrogates":
        """The same on another device."""
        return Surrogates(*(x.to(device) for x in self))


def path_weights(scores: Tensor, weight_temperature: float = 1.0) -> Tensor:
    """w_j = softmax_j(s_T(y^(j)) / tau_w) [B, k]; 0 where there is no such path (score -inf).

    tau_w = 1: the teacher's probabilities, renormalised within the list (Wang et al. 2020, Top-WK);
    infinity: 1/k each; towards 0: the best path alone.
    """
    if not weight_temperature > 0:
        raise ValueError(f"weight_temperature: expected more than 0, got {weight_temperature}")
    below_best = (scores - scores[:, :1]).double()  # the best path always exists
    below_best = (below_best / weight_temperature).masked_fill(scores == NEG_INF, NEG_INF)
    return below_best.softmax(1).to(scores)


def path_counts(
    paths: Tensor, weights: Tensor, mask: Tensor, num_labels: int
) -> tuple[Tensor, Tensor]:
    """Expected label counts [B, L, K] and transition counts [B, L-1, K, K] of weighted paths
    [B, k, L], weights [B, k]."""
    batch, _, length = paths.shape
    by_word, word_weights = paths.transpose(1, 2), weights[:, None].expand(-1, length, -1)
    steps = by_word[:, :-1] * num_labels + by_word[:, 1:]
    unary = weights.new_zeros(batch, length, num_labels).scatter_add(2, by_word, word_weights)
    pairwise = weights.new_zeros(batch, length - 1, num_labels**2)
    pairwise = pairwise.scatter_add(2, steps, word_weights[:, 1:])
    pairwise = pairwise.view(batch, length - 1, num_labels, num_labels)
    pairwise = pairwise.masked_fill(~mask[:, 1:, None, None], 0)
    return unary.masked_fill(~mask[..., None], 0), pairwise


@torch.no_grad()
def teacher_paths(teacher: Chain, mask: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The teacher's k best paths [B, k, L] and scores [B, k].

    ValueError for a sentence without a legal path, or with scores that are no numbers.
    """
    paths, scores = teacher.crf.k_best(teacher.emissions, mask, k)
    lost = ~scores[:, 0].isfinite()
    if bool(lost.any()):
        raise ValueError(
            "expected a legal path of finite score in every sentence, "
            f"got none in {lost.nonzero().flatten().tolist()}"
        )
    return paths, scores


@torch.no_grad()
def surrogate_labels(
    teacher: Chain,
    mask: Tensor,
    k: int = 10,
    weight_temperature: float = 1.0,
    held: float = 1.0,
    doubted: float = 1.0,
) -> Surrogates:
    """The surrogate labels of a batch; legal paths only, fewer than k where there are fewer.

    Two further readings of what a lattice holds: with `held` below 1 only the best paths that
    together reach this share of the teacher's probability (all k where these reach less); with
    `doubted` below 1 every label is allowed, so that `fuzzy` is 0, in a sentence whose best path
    has this probability or more.
    """
    for name, share in (("held", held), ("doubted", doubted)):
        if not 0 < share <= 1:
            raise ValueError(f"{name}: expected a probability above 0, up to 1, got {share}")
    paths, scores = teacher_paths(teacher, mask, k)
    p = (scores - teacher.crf.log_partition(teacher.emissions, mask)[:, None]).exp()
    if held < 1:
        scores = scores.masked_fill(p.cumsum(1) - p >= held, NEG_INF)  # reached by better paths
    labels = teacher.crf.num_labels
    unary, pairwise = path_counts(paths, path_weights(scores, weight_temperature), mask, labels)
    used, _ = path_counts(paths, (scores > NEG_INF).to(unary), mask, labels)
    sure = (p[:, :1] >= doubted) & mask if doubted < 1 else torch.zeros_like(mask)
    return Surrogates(unary, pairwise, (used > 0) | sure[..., None])


def top_k(
    student: Chain, teacher: Chain, mask: Tensor, k: int = 10, weighted: bool = False
) -> Tensor:
    """-1/k sum_j log p_S(y^(j) | x) over the teacher's k best paths (eq. 7), mean over sentences.

    `weighted`: the teacher's own weights instead of 1/k (Wang et al. 2020, Top-WK). A sentence with
    fewer than k legal paths uses those it has.
    """
    _check(student.emissions, teacher.emissions)
    found = surrogate_labels(teacher, mask, k, 1.0 if weighted else math.inf)
    return crf_cross_entropy(student, found, mask)


def crf_cross_entropy(student: Chain, surrogates: Surrogates, mask: Tensor) -> Tensor:
    """-sum_j w_j log p_S(y^(j) | x) = log Z_S - E_w[s_S(x, y)], mean over sentences.

    The sequence grain of multi-grained distillation, and Wang et al.'s (2020) Top-WK. One partition
    however large k: the expected score needs the surrogate labels' counts alone. With every path
    and w_j = p_T(y^(j)) it is eq. 10's cross entropy.
    """
    _check(student.emissions, surrogates.unary)
    crf, emissions = student.crf, student.emissions
    log_z = crf.log_partition(emissions, mask)
    expected = crf.expected_score(emissions, surrogates.unary, surrogates.pairwise, mask)
    return (log_z - expected).mean()


def fuzzy(student: Chain, allowed: Tensor, mask: Tensor) -> Tensor:
    """-log p_S(every y_i in A_i | x) = log Z_S - log Z_S(A), mean over sentences (fuzzy CRF, Shang
    et al. 2018).

    The label grain of multi-grained distillation: `allowed` [B, L, K] holds the labels that the
    teacher's k best paths use. Any legal mixture of them satisfies it, and it does not say which is
    best. 0 where every label is allowed. Its gradient for an emission is p_S(y_i) - p_S(y_i | A).
    ValueError where no legal path is left.
    """
    inside = student.crf.constrained_log_partition(student.emissions, allowed, mask)
    lost = inside == NEG_INF
    if bool(lost.any()):
        raise ValueError(
            "allowed: expected a legal path in every sentence, "
            f"got none in {lost.nonzero().flatten().tolist()}"
        )
    return (student.crf.log_partition(student.emissions, mask) - inside).mean()


def path_set(student: Chain, teacher: Chain, mask: Tensor, k: int = 10) -> Tensor:
    """-log sum_j p_S(y^(j) | x) over the teacher's k best paths, mean over sentences: fuzzy
    learning without recombined paths.
    """
    _check(student.emissions, teacher.emissions)
    paths, scores = teacher_paths(teacher, mask, k)
    return -_path_log_probs(student, paths, scores, mask).logsumexp(1).mean()


def decoupled(
    student: Chain, teacher: Chain, mask: Tensor, k: int = 10, beta: float = 1.0
) -> Tensor:
    """KL(p_T || p_S) on "the best path, or another" + beta KL over which other of the k best, mean
    over sentences.

    Decoupled distillation (Zhao B. et al. 2022, eq. 7) with paths for classes: our reading of kvDKD
    (Zhao et al. 2024), of which the abstract alone is public. With beta = 1 - p_T(best) and every
    path this is the KL over whole sequences, which so mutes the second part exactly where the
    teacher is sure; a constant beta does not.
    """
    _check(student.emissions, teacher.emissions)
    paths, scores = teacher_paths(teacher, mask, k)
    with torch.no_grad():
        teacher_log = scores - teacher.crf.log_partition(teacher.emissions, mask)[:, None]
    student_log = _path_log_probs(student, paths, scores, mask)
    others = [
        side.crf.log_prob_of_others(side.emissions, paths[:, 0], mask)
        for side in (teacher, student)
    ]
    pairs = [
        torch.stack([log_p[:, 0], other], 1)
        for log_p, other in zip((teacher_log, student_log), others, strict=True)
    ]
    target = _kl(pairs[0].detach(), pairs[1])
    if scores.shape[1] == 1:
        return target.mean()
    there = (scores[:, 1:2] > NEG_INF).squeeze(1)  # a sentence of one legal path has no other
    rest = [F.log_softmax(log_p[there, 1:], 1) for log_p in (teacher_log, student_log)]
    return target.mean() + beta * _kl(*rest).sum() / len(mask)


def multi_grained(
    student: Chain,
    teacher: Chain,
    surrogates: Surrogates,
    mask: Tensor,
    grains: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3),
    temperature: float = 1.0,
) -> Tensor:
    """g_1 crf_cross_entropy + g_2 fuzzy + g_3 posterior: sequence, label and token grain (Zhou et
    al. 2021, reconstructed).

    The abstract names the CRF cross entropy and fuzzy learning; the token grain, the weights and
    their sizes are our choice. A grain with weight 0 is not computed. `temperature` is the token
    grain's.
    """
    _check(student.emissions, teacher.emissions, temperature)
    if len(grains) != 3 or not all(0 <= g < math.inf for g in grains) or not any(grains):
        raise ValueError(f"grains: expected three weights of 0 or more, not all 0, got {grains}")
    sequence, label, token = grains
    loss = student.emissions.new_zeros(())
    if sequence:
        loss = loss + sequence * crf_cross_entropy(student, surrogates, mask)
    if label:
        loss = loss + label * fuzzy(student, surrogates.allowed, mask)
    if token:
        loss = loss + token * posterior(student, teacher, mask, temperature)
    return loss


# ---- the teacher's whole distribution ----


def posterior(student: Chain, teacher: Chain, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 sum_i KL(q_T(y_i | x) || q_S(y_i | x)) over words, of the CRFs' token marginals (eq.
    8-9), mean over sentences.

    Eq. 9 prints the cross entropy; KL has the same gradient and is 0 when the student is the
    teacher. The temperature is applied to both sides' marginals afterwards, as Wang et al. (2020)
    do.
    """
    _check(student.emissions, teacher.emissions, temperature)
    with torch.no_grad():
        teacher_log = teacher.crf.log_marginals(teacher.emissions, mask)[mask] / temperature
    student_log = student.crf.log_marginals(student.emissions, mask)[mask] / temperature
    if temperature != 1:
        teacher_log, student_log = F.log_softmax(teacher_log, -1), F.log_softmax(student_log, -1)
    return temperature**2 * _kl(teacher_log, student_log).sum() / len(mask)


def structural(student: Chain, teacher: Chain, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(p_T || p_S) over whole tag sequences, both chains at temperature T (eq. 10-11), mean
    over sentences.

    Eq. 10 prints the cross entropy; KL has the same gradient and is 0 when the student is the
    teacher (Wang et al. 2021). The expectation needs the marginals of the *tempered* chain:
    tempering the marginals of the chain at temperature 1 gives another, inconsistent object.
    """
    _check(student.emissions, teacher.emissions, temperature)
    with torch.no_grad():
        unary, pairwise = teacher.crf.marginals(teacher.emissions, mask, temperature)

    def cross_entropy(of: Chain) -> Tensor:
        log_z = of.crf.log_partition(of.emissions, mask, temperature)
        return log_z - of.crf.expected_score(of.emissions, unary, pairwise, mask, temperature)

    with torch.no_grad():
        entropy = cross_entropy(teacher)
    return temperature**2 * (cross_entropy(student) - entropy).mean()


# ---- the same lessons as the teacher hears them: MSD's gradient flows into both sides ----


def heard_posterior(student: Chain, teacher: Chain, mask: Tensor) -> Tensor:
    """-sum_i sum_j q_T(y_i = j) log q_S(y_i = j) (eq. 9 as printed), mean over sentences.

    `posterior` with the teacher's entropy left in, and with a gradient for the teacher.
    """
    log_q = student.crf.log_marginals(student.emissions, mask)
    q, _ = teacher.crf.marginals(teacher.emissions, mask)
    return -(q * log_q.masked_fill(log_q == NEG_INF, 0)).sum() / len(mask)


def heard_structural(student: Chain, teacher: Chain, mask: Tensor) -> Tensor:
    """-sum_u P_T(u) Score_S(u) + log Z_S (eq. 10 as printed), mean over sentences."""
    counts = teacher.crf.marginals(teacher.emissions, mask)
    own = student.crf.expected_score(student.emissions, *counts, mask)
    return (student.crf.log_partition(student.emissions, mask) - own).mean()


def heard_top_k(student: Chain, teacher: Chain, mask: Tensor, k: int = 3) -> Tensor:
    """-sum_j w_j log p_S(y^(j)) over the teacher's k best paths, mean over sentences.

    w_j are its own probabilities within the list: eq. 7's 1/k do not move with the teacher, whose
    gradient would be 0. The list itself is held fixed.
    """
    paths, scores = teacher_paths(teacher, mask, k)
    gone = scores == NEG_INF
    own, taken = (
        torch.stack([side.crf.score(side.emissions, path, mask) for path in paths.unbind(1)], 1)
        for side in (teacher, student)
    )
    weights = path_weights(own.masked_fill(gone, NEG_INF))
    taken = taken.masked_fill(gone, 0)
    log_z = student.crf.log_partition(student.emissions, mask)
    return (log_z - (weights * taken).sum(1)).mean()


def _share(progress: float) -> float:
    if not 0 <= progress <= 1:
        raise ValueError(f"progress: expected a share of the updates from 0 to 1, got {progress}")
    return progress


def _hidden(student: Tensor, teacher: Tensor, piece_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides' hidden states of word pieces [., D]."""
    if student.shape != teacher.shape:
        raise ValueError(
            "expected hidden states of one width, "
            f"got {list(student.shape)} and {list(teacher.shape)}"
        )
    return student[piece_mask], teacher.detach()[piece_mask].to(student)


def _kl(teacher_log: Tensor, student_log: Tensor) -> Tensor:
    """KL per row of log probabilities; a label that the teacher excludes, or that underflows to 0,
    costs nothing."""
    impossible = teacher_log.exp() == 0
    gap = teacher_log.masked_fill(impossible, 0) - student_log.masked_fill(impossible, 0)
    return (teacher_log.exp() * gap).sum(-1)


def _path_log_probs(student: Chain, paths: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """log p_S of the teacher's paths [B, k]; -inf where there is no such path."""
    crf, emissions = student.crf, student.emissions
    log_p = torch.stack([crf.score(emissions, path, mask) for path in paths.unbind(1)], 1)
    log_p = log_p - crf.log_partition(emissions, mask)[:, None]
    return log_p.masked_fill(scores == NEG_INF, NEG_INF)


def _check(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> None:
    """ValueError unless both score the same words and labels, at a temperature above 0."""
    if student.shape != teacher.shape:
        raise ValueError(
            "expected student and teacher scores of one shape, "
            f"got {list(student.shape)} and {list(teacher.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature: expected more than 0, got {temperature}")
