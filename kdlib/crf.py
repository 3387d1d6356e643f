"""The linear-chain CRF and all that distillation asks of one: partition, marginals, Viterbi,
k-best.

A tag sequence y of a sentence x has the score (Lafferty et al. 2001; eq. 1 of the MSD paper)

    s(x, y) = start[y_1] + sum_i emissions[i, y_i] + sum_i transitions[y_(i-1), y_i] + end[y_n]
    p(y | x) = exp(s) / Z

Two recursions give the same numbers. In log space: exact at any size, differentiable as often as
wanted. In probability space with rescaling: one small matrix product a word, several times faster,
used when no score is so large that a path could underflow.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib.text.tags import split_tag

NEG_INF = float("-inf")


def legal_iob2(labels: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """(start [K], transitions [K, K], end [K]) as booleans: I-X comes only after B-X or I-X; a
    sentence may end anywhere."""
    parts = [split_tag(label) for label in labels]
    if any(prefix not in ("O", "B", "I") for prefix, _ in parts):
        raise ValueError(f"expected IOB2 labels, got {list(labels)}")
    inside, outside = (torch.tensor([prefix == x for prefix, _ in parts]) for x in "IO")
    numbers = {kind: i for i, (_, kind) in enumerate(parts)}
    kinds = torch.tensor([numbers[kind] for _, kind in parts])
    goes_on = ~outside[:, None] & (kinds[:, None] == kinds)
    return ~inside, ~inside | goes_on, torch.ones(len(parts), dtype=torch.bool)


class LinearChainCRF(nn.Module):
    """p(y | x) over tag sequences; `transitions` [K, K] runs from -> to, `start` and `end` are [K].

    `legal`, if given, is (start [K], transitions [K, K], end [K]) as booleans, see `legal_iob2`: a
    path that breaks it has probability 0, everywhere. Scores in, scores out: every method takes
    `emissions` [B, L, K] and a boolean `mask` [B, L], True on words, padding on the right.
    ValueError for other shapes. `temperature` divides every score, emissions and CRF alike.
    """

    def __init__(self, num_labels: int, legal: tuple[Tensor, Tensor, Tensor] | None = None) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.empty(num_labels).uniform_(-0.1, 0.1))
        self.transitions = nn.Parameter(torch.empty(num_labels, num_labels).uniform_(-0.1, 0.1))
        self.end = nn.Parameter(torch.empty(num_labels).uniform_(-0.1, 0.1))
        for name, allowed in zip(
            ("start", "transitions", "end"), legal or (None, None, None), strict=True
        ):
            shape = getattr(self, name).shape
            if allowed is None:
                allowed = torch.ones(shape, dtype=torch.bool)
            if allowed.shape != shape or allowed.dtype != torch.bool:
                raise ValueError(
                    f"legal {name}: expected bool {tuple(shape)}, got {allowed.dtype} "
                    f"{tuple(allowed.shape)}"
                )
            self.register_buffer(f"legal_{name}", allowed.clone(), persistent=False)
        self._detours_are_short = self._every_label_is_near()

    @property
    def num_labels(self) -> int:
        """K."""
        return self.start.numel()

    def log_partition(self, emissions: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
        """log Z = log sum_y exp(s(x, y) / temperature) [B]; twice differentiable."""
        chain = self._chain(emissions, mask, temperature)
        return _LogPartition.apply(*chain, self._fast(*(x.detach() for x in chain)))

    def constrained_log_partition(self, emissions: Tensor, allowed: Tensor, mask: Tensor) -> Tensor:
        """log sum of exp(s(x, y)) over the paths with y_i in the set `allowed[i]` [B, L, K] alone
        (Shang et al. 2018) [B].

        -inf where no legal path is left. With every label allowed this is `log_partition`.
        """
        if allowed.shape != emissions.shape or allowed.dtype != torch.bool:
            raise ValueError(
                f"allowed: expected bool {tuple(emissions.shape)}, got {allowed.dtype} "
                f"{tuple(allowed.shape)}"
            )
        return self.log_partition(emissions.masked_fill(~allowed, NEG_INF), mask)

    def score(self, emissions: Tensor, tags: Tensor, mask: Tensor) -> Tensor:
        """s(x, y) of the given paths (eq. 1) [B]; -inf for an illegal one. Tags [B, L]; padding may
        hold any number."""
        chain, transitions, _ = self._chain(emissions, mask)
        if tags.shape != mask.shape:
            raise ValueError(f"tags: expected shape {tuple(mask.shape)}, got {tuple(tags.shape)}")
        tags = tags.masked_fill(~mask, 0)
        if tags.numel() and not 0 <= int(tags.min()) <= int(tags.max()) < self.num_labels:
            raise ValueError(
                f"tags: expected 0 to {self.num_labels - 1}, got {int(tags.min())} to "
                f"{int(tags.max())}"
            )
        words = chain.gather(2, tags[..., None]).squeeze(2).masked_fill(~mask, 0).sum(1)
        steps = transitions[tags[:, :-1], tags[:, 1:]].masked_fill(~mask[:, 1:], 0).sum(1)
        return words + steps

    def log_prob(self, emissions: Tensor, tags: Tensor, mask: Tensor) -> Tensor:
        """log p(y | x) = s(x, y) - log Z (eq. 3) [B]."""
        return self.score(emissions, tags, mask) - self.log_partition(emissions, mask)

    def log_prob_of_others(self, emissions: Tensor, tags: Tensor, mask: Tensor) -> Tensor:
        """log(1 - p(y | x)) [B], exact where p rounds to 1: summed over the words at which another
        sequence first leaves y."""
        chain, transitions, lengths = self._chain(emissions, mask)
        tags = tags.masked_fill(~mask, 0)
        _, after = _log_messages(chain, transitions, lengths)
        own = F.one_hot(tags, self.num_labels).bool()
        step = torch.cat(
            [torch.zeros_like(chain[:, :1]), transitions[tags[:, :-1]]], 1
        )  # from the label of y before
        along = _weighted(own.to(chain), step + chain).sum(2).cumsum(1)  # the score of y so far
        kept = torch.cat([torch.zeros_like(along[:, :1]), along[:, :-1]], 1)
        left = kept + logsumexp((step + chain + after).masked_fill(own, NEG_INF), 2)
        return logsumexp(left.masked_fill(~mask, NEG_INF), 1) - self.log_partition(emissions, mask)

    def marginals(
        self, emissions: Tensor, mask: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """p(y_i | x) [B, L, K] and p(y_i, y_(i+1) | x) [B, L-1, K, K] (eq. 8 and 11); zero on
        padding.

        Differentiable; without gradients the fast recursion is used.
        """
        chain = self._chain(emissions, mask, temperature)
        wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in chain[:2])
        fast = None if wants_grad else self._fast(*chain)
        if fast is None:
            return _log_space_marginals(*chain)
        return fast.unary, fast.left[..., None] * fast.step * fast.right[..., None, :]

    def log_marginals(self, emissions: Tensor, mask: Tensor) -> Tensor:
        """log p(y_i | x) [B, L, K], exact where p itself would underflow; -inf for impossible
        labels; zero on padding."""
        chain = self._chain(emissions, mask)
        before, after = _log_messages(*chain)
        return torch.log_softmax(chain[0] + before + after, -1).masked_fill(~mask[..., None], 0)

    def viterbi(self, emissions: Tensor, mask: Tensor) -> Tensor:
        """argmax_y s(x, y) [B, L]; 0 on padding, and where no path is legal."""
        return _viterbi(*(x.detach() for x in self._chain(emissions, mask))).masked_fill(~mask, 0)

    def k_best(self, emissions: Tensor, mask: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k highest-scoring legal paths [B, k, L], best first, and their scores s [B, k] (list
        Viterbi).

        Fewer than k legal paths: the rest scores -inf and holds label 0; no path comes twice.
        Padding holds label 0.
        """
        if k < 1:
            raise ValueError(f"k: expected at least 1, got {k}")
        paths, scores = _k_best(*(x.detach() for x in self._chain(emissions, mask)), k)
        return paths.masked_fill(~mask[:, None] | (scores == NEG_INF)[..., None], 0), scores

    def expected_score(
        self,
        emissions: Tensor,
        unary: Tensor,
        pairwise: Tensor,
        mask: Tensor,
        temperature: float = 1.0,
    ) -> Tensor:
        """Expected s(x, y) / temperature [B] under a distribution given by its marginals, or by any
        expected counts."""
        chain, transitions, _ = self._chain(emissions, mask, temperature)
        pairs = [len(mask), mask.shape[1] - 1, self.num_labels, self.num_labels]
        if unary.shape != emissions.shape or list(pairwise.shape) != pairs:
            raise ValueError(
                f"expected counts of shape {list(emissions.shape)} and {pairs}, got "
                f"{list(unary.shape)} and {list(pairwise.shape)}"
            )
        return _weighted(unary, chain).sum((1, 2)) + _weighted(pairwise, transitions).sum((1, 2, 3))

    def _every_label_is_near(self) -> bool:
        """Whether any label can follow any other after one in between, some first label, and end a
        sentence: IOB2 is so.

        Then a path is never more than one word's label away from joining a better one, which the
        fast recursion relies on.
        """
        step = self.legal_transitions.float()
        return bool(
            (step @ step > 0).all()
            and self.legal_transitions[self.legal_start].any(0).all()
            and self.legal_end.all()
        )

    def _fast(self, chain: Tensor, transitions: Tensor, lengths: Tensor) -> "_Rescaled | None":
        """The fast recursion's answers; None where it could lose precision, or no path is legal:
        then log space answers."""
        if not self._detours_are_short or _may_underflow(chain, transitions):
            return None
        found = _rescaled(chain, transitions, lengths)
        return found if bool(found.log_z.isfinite().all()) else None

    def _chain(
        self, emissions: Tensor, mask: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Emissions with start, end and padding folded in, transitions, lengths: all that the
        recursions need."""
        lengths = _lengths(emissions, mask, self.num_labels)
        if not temperature > 0:
            raise ValueError(f"temperature: expected more than 0, got {temperature}")
        start, transitions, end = (
            getattr(self, name).masked_fill(~getattr(self, f"legal_{name}"), NEG_INF)
            for name in ("start", "transitions", "end")
        )
        position = torch.arange(emissions.shape[1], device=emissions.device)
        first, last = position == 0, position == (lengths - 1)[:, None]
        chain = emissions.masked_fill(~mask[..., None], 0)
        chain = torch.where(first[:, None], chain + start, chain)
        chain = torch.where(last[..., None], chain + end, chain)
        return chain / temperature, transitions / temperature, lengths


class Chain(NamedTuple):
    """One side of a comparison: a CRF and its emissions [B, L, K] for a batch.

    `softmax`: the CRF is held at 0 (or there is none), so words are labelled one by one.
    """

    crf: LinearChainCRF | None
    emissions: Tensor
    softmax: bool = False

    def words(self, mask: Tensor) -> Tensor:
        """Logits of each word's label [B, L, K]: emissions, but a chain's log marginals, since its
        emissions leave out what the neighbours say."""
        return self.emissions if self.softmax else self.crf.log_marginals(self.emissions, mask)


def _lengths(emissions: Tensor, mask: Tensor, num_labels: int) -> Tensor:
    """Words per sentence [B]; ValueError unless the shapes fit and the padding is on the right."""
    if emissions.ndim != 3 or emissions.shape[2] != num_labels or not emissions.numel():
        raise ValueError(
            f"emissions: expected shape [B, L, {num_labels}], nowhere 0, got "
            f"{list(emissions.shape)}"
        )
    if mask.shape != emissions.shape[:2] or mask.dtype != torch.bool:
        raise ValueError(
            f"mask: expected bool {list(emissions.shape[:2])}, got {mask.dtype} {list(mask.shape)}"
        )
    if not bool(mask[:, 0].all()) or bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError(
            "mask: expected every sentence to start with a word and to be padded on the right only"
        )
    return mask.sum(1)


def _weighted(weight: Tensor, score: Tensor) -> Tensor:
    """weight * score with 0 * -inf = 0: what cannot happen costs nothing; NaN-free gradients on
    both sides."""
    return weight * torch.where((weight == 0) & (score == NEG_INF), 0, score)


def logsumexp(x: Tensor, dim: int) -> Tensor:
    """log sum exp whose gradient is 0, where torch.logsumexp gives NaN, when every term is -inf."""
    top = x.detach().amax(dim, keepdim=True)
    top = top.masked_fill(top == NEG_INF, 0)
    total = (x - top).exp().sum(dim)
    empty = total == 0
    return total.masked_fill(empty, 1).log().masked_fill(empty, NEG_INF) + top.squeeze(dim)


def _softmax(x: Tensor) -> Tensor:
    """Softmax over the last axis that is 0, where torch's is NaN, when every term is -inf."""
    total = logsumexp(x, -1)
    return (x - total.masked_fill(total == NEG_INF, 0)[..., None]).exp()


def reversed_rows(x: Tensor, lengths: Tensor) -> Tensor:
    """Each sentence of x [B, L, .] back to front, its padding left on the right."""
    position = torch.arange(x.shape[1], device=x.device)
    flipped = lengths[:, None] - 1 - position
    return x.gather(1, torch.where(flipped < 0, position, flipped)[..., None].expand_as(x))


def _log_messages(chain: Tensor, transitions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """log-sum over all ways to reach each label from the left, and from the right, without its own
    emission: two [B, L, K].

    The backward recursion is the forward one on the reversed sentence with transposed transitions,
    so both run in one loop.
    """
    both = torch.stack([chain, reversed_rows(chain, lengths)])
    steps = torch.stack([transitions, transitions.T])[:, None]
    messages = [torch.zeros_like(both[:, :, 0])]
    for i in range(chain.shape[1] - 1):
        state = both[:, :, i] + messages[-1]
        messages.append(logsumexp(state[..., None] + steps, -2))
    before, after = torch.stack(messages, 2)
    return before, reversed_rows(after, lengths)


def _log_space_marginals(
    chain: Tensor, transitions: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Unary and pairwise marginals, differentiable, exact at any size of the scores."""
    before, after = _log_messages(chain, transitions, lengths)
    position = torch.arange(chain.shape[1], device=chain.device)
    mask = position < lengths[:, None]
    unary = _softmax(chain + before + after).masked_fill(~mask[..., None], 0)
    left, right = (chain + before)[:, :-1], (chain + after)[:, 1:]
    joint = left[..., None] + transitions + right[..., None, :]
    pairwise = _softmax(joint.flatten(2)).view_as(joint).masked_fill(~mask[:, 1:, None, None], 0)
    return unary, pairwise


def _log_space_partition(chain: Tensor, transitions: Tensor, lengths: Tensor) -> Tensor:
    """log Z [B] from the forward messages; -inf where no path is legal."""
    before, _ = _log_messages(chain, transitions, lengths)
    rows = torch.arange(len(lengths), device=chain.device)
    return logsumexp((chain + before)[rows, lengths - 1], -1)


def _may_underflow(chain: Tensor, transitions: Tensor) -> bool:
    """Whether rescaled probabilities could lose a path that matters.

    A label more than 87 nats (float32) below the best one is dropped. A path through it can
    afterwards regain, on a rival that takes the best label and joins it one word later, an emission
    and two transitions; nothing is lost beyond a relative 2e-12 while twice the one and three times
    the other stay 27 nats inside. A label excluded within a sentence (`constrained_log_partition`)
    can force longer detours: log space.
    """
    if bool((chain[:, 1:-1] == NEG_INF).any()):
        return True
    reach = chain.amax(2) - chain.masked_fill(chain == NEG_INF, float("inf")).amin(2)
    finite = transitions.masked_select(transitions != NEG_INF)
    spread = 2 * float(reach.max()) + 3 * (
        float(finite.max() - finite.min()) if finite.numel() else 0.0
    )
    return not spread < -math.log(torch.finfo(chain.dtype).tiny) - 27


class _Rescaled(NamedTuple):
    """What the fast recursion finds; left[u] step[u, v] right[v] is a pairwise marginal, which
    nobody need hold to sum it."""

    log_z: Tensor  # [B]
    unary: Tensor  # [B, L, K]
    left: Tensor  # [B, L-1, K]
    step: Tensor  # [K, K]
    right: Tensor  # [B, L-1, K]


@torch.no_grad()
def _rescaled(chain: Tensor, transitions: Tensor, lengths: Tensor) -> _Rescaled:
    """The forward-backward algorithm on probabilities, both directions in one loop, each word
    rescaled to sum 1 (Rabiner 1989)."""
    mask = torch.arange(chain.shape[1], device=chain.device) < lengths[:, None]
    top = chain.amax(2, keepdim=True)
    weight = (chain - top).exp()
    weights = torch.stack([weight, reversed_rows(weight, lengths)])
    weights = weights.permute(2, 0, 1, 3).contiguous()  # [L, 2, B, K]
    peak = transitions.max()
    step = (transitions - peak).exp()
    steps = torch.stack([step, step.T])
    messages, states = torch.ones_like(weights), torch.empty_like(weights)
    scales = weights.new_empty(*weights.shape[:3], 1)
    words = zip(messages.unbind(), weights.unbind(), states.unbind(), scales.unbind(), strict=True)
    previous = None
    for message, own, state, scale in words:
        if previous is not None:
            torch.bmm(previous, steps, out=message)
        torch.mul(message, own, out=state)
        torch.sum(state, -1, keepdim=True, out=scale)
        previous = state.div_(scale)
    log_z = (scales[:, 0, :, 0].log().T + top.squeeze(2)).masked_fill(~mask, 0).sum(1) + peak * (
        lengths - 1
    )
    forward, before = states[:, 0].transpose(0, 1), messages[:, 0].transpose(0, 1)
    after = reversed_rows(messages[:, 1].transpose(0, 1), lengths)
    unary = forward * after
    unary = (unary / unary.sum(2, keepdim=True)).masked_fill(~mask[..., None], 0)
    right = (weight * after)[:, 1:].masked_fill(~mask[:, 1:, None], 0)
    total = (before[:, 1:] * right).sum(2, keepdim=True).masked_fill(~mask[:, 1:, None], 1)
    return _Rescaled(
        log_z, unary, forward[:, :-1].masked_fill(~mask[:, 1:, None], 0) / total, step, right
    )


class _LogPartition(torch.autograd.Function):
    """log Z, whose gradient is the marginals: computed here directly instead of by unrolling the
    recursion backwards."""

    @staticmethod
    def forward(
        ctx, chain: Tensor, transitions: Tensor, lengths: Tensor, fast: _Rescaled | None
    ) -> Tensor:
        ctx.save_for_backward(chain, transitions, lengths)
        ctx.fast = fast
        return (
            _log_space_partition(chain, transitions, lengths)
            if fast is None
            else fast.log_z.clone()
        )

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        if (
            torch.is_grad_enabled() or ctx.fast is None
        ):  # a gradient of this gradient is wanted, or the scores are too large
            unary, pairwise = _log_space_marginals(*ctx.saved_tensors)
            return (
                unary * grad[:, None, None],
                (pairwise * grad[:, None, None, None]).sum((0, 1)),
                None,
                None,
            )
        _, unary, left, step, right = ctx.fast
        left = (left * grad[:, None, None]).flatten(0, 1)
        return unary * grad[:, None, None], step * (left.T @ right.flatten(0, 1)), None, None


@torch.no_grad()
def _viterbi(chain: Tensor, transitions: Tensor, lengths: Tensor) -> Tensor:
    """Best paths [B, L]: the best score of every label at every word, then back along the one path
    that made it."""
    live = torch.arange(chain.shape[1], device=chain.device)[:, None] < lengths
    into = transitions.T.contiguous()  # [to, from]: the maximum runs over the last, contiguous axis
    scores = [chain[:, 0]]
    for i in range(1, chain.shape[1]):
        best = (scores[-1][:, None, :] + into).amax(-1) + chain[:, i]
        scores.append(torch.where(live[i, :, None], best, scores[-1]))
    path = [scores[-1].argmax(-1)]
    for i in range(chain.shape[1] - 1, 0, -1):
        path.append(torch.where(live[i], (scores[i - 1] + into[path[-1]]).argmax(-1), path[-1]))
    return torch.stack(path[::-1], 1)


@torch.no_grad()
def _k_best(chain: Tensor, transitions: Tensor, lengths: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """List Viterbi: per label the k best ways to reach it; a hypothesis is numbered label * k +
    rank."""
    batch, length, num_labels = chain.shape
    live = torch.arange(length, device=chain.device)[:, None, None, None] < lengths[:, None, None]
    itself = torch.arange(num_labels * k, device=chain.device).view(num_labels, k)
    into = transitions.T[:, :, None]  # [to, from, 1]
    score = chain.new_full((batch, num_labels, k), NEG_INF)
    score[:, :, 0] = chain[:, 0]
    pointers = []
    for i in range(1, length):
        best, came_from = (score[:, None] + into).flatten(2).topk(k, -1)
        score = torch.where(live[i], best + chain[:, i, :, None], score)
        pointers.append(torch.where(live[i], came_from, itself))
    scores, hypothesis = score.flatten(1).topk(k, -1)
    path = [hypothesis // k]
    for pointer in reversed(pointers):
        hypothesis = pointer.flatten(1).gather(1, hypothesis)
        path.append(hypothesis // k)
    return torch.stack(path[::-1], 2), scores
