"""Surrogate labels: a teacher's k best label sequences as something to train a student on (Zhou et al. 2021).

Only that paper's abstract is public, so the weights and the counts are a reconstruction; Wang et al. (2020) weigh their Top-WK paths
in the same way, at weight temperature 1.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kdlib.crf import NEG_INF, LinearChainCRF


class Surrogates(NamedTuple):
    """What the k best paths y^(j) with weights w_j say of each word and of each pair of neighbours; its size does not depend on k.

    unary [B, L, K]: U_i(v) = sum_j w_j [y_i^(j) = v]. pairwise [B, L-1, K, K]: P_i(u, v) = sum_j w_j [y_i^(j) = u, y_(i+1)^(j) = v].
    allowed [B, L, K]: whether any of the paths gives word i the label v, however small its weight. All zero on padding.
    """

    unary: Tensor
    pairwise: Tensor
    allowed: Tensor

    def to(self, device: torch.device | str) -> "Surrogates":
        """The same on another device."""
        return Surrogates(*(x.to(device) for x in self))


def path_weights(scores: Tensor, weight_temperature: float = 1.0) -> Tensor:
    """w_j = softmax_j(s_T(y^(j)) / tau_w) [B, k]; 0 where there is no such path (score -inf).

    tau_w = 1: the teacher's own probabilities, renormalised within the list; infinity: 1/k each; towards 0: the best path alone.
    """
    if not weight_temperature > 0:
        raise ValueError(f"weight_temperature: expected more than 0, got {weight_temperature}")
    below_best = (scores - scores[:, :1]).double()  # the best path always exists
    return (below_best / weight_temperature).masked_fill(scores == NEG_INF, NEG_INF).softmax(1).to(scores)


def path_counts(paths: Tensor, weights: Tensor, mask: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
    """Expected label counts [B, L, K] and transition counts [B, L-1, K, K] of weighted paths [B, k, L], weights [B, k]."""
    batch, _, length = paths.shape
    by_word, word_weights = paths.transpose(1, 2), weights[:, None].expand(-1, length, -1)
    steps = by_word[:, :-1] * num_labels + by_word[:, 1:]
    unary = weights.new_zeros(batch, length, num_labels).scatter_add(2, by_word, word_weights)
    pairwise = weights.new_zeros(batch, length - 1, num_labels**2).scatter_add(2, steps, word_weights[:, 1:])
    pairwise = pairwise.view(batch, length - 1, num_labels, num_labels)
    return unary.masked_fill(~mask[..., None], 0), pairwise.masked_fill(~mask[:, 1:, None, None], 0)


@torch.no_grad()
def teacher_paths(teacher_crf: LinearChainCRF, teacher: Tensor, mask: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The teacher's k best paths and scores; ValueError for a sentence without a legal path, or with scores that are no numbers."""
    paths, scores = teacher_crf.k_best(teacher, mask, k)
    lost = ~scores[:, 0].isfinite()
    if bool(lost.any()):
        raise ValueError(
            f"expected a legal path of finite score in every sentence, got none in {lost.nonzero().flatten().tolist()}"
        )
    return paths, scores


@torch.no_grad()
def surrogate_labels(
    teacher_crf: LinearChainCRF, teacher: Tensor, mask: Tensor, k: int = 10, weight_temperature: float = 1.0
) -> Surrogates:
    """The surrogate labels of a batch from the teacher's emissions [B, L, K]; legal paths only, fewer than k where there are fewer.

    ValueError as for `teacher_paths`.
    """
    paths, scores = teacher_paths(teacher_crf, teacher, mask, k)
    unary, pairwise = path_counts(paths, path_weights(scores, weight_temperature), mask, teacher_crf.num_labels)
    used, _ = path_counts(paths, (scores > NEG_INF).to(unary), mask, teacher_crf.num_labels)
    return Surrogates(unary, pairwise, used > 0)
