import itertools

import pytest
import torch
from torchcrf import CRF as PytorchCrf

from kdlib.crf import Chain, LinearChainCRF, legal_iob2
from kdlib.losses import structural

IOB2 = legal_iob2(["O", "B-X", "I-X", "B-Y"])
LENGTHS = [6, 4, 2, 1]


def chain(num_labels=4, legal=None, scale=2.0, dtype=torch.double, seed=0):
    torch.manual_seed(seed)
    crf = LinearChainCRF(num_labels, legal).to(dtype)
    for p in crf.parameters():
        torch.nn.init.normal_(p, std=scale)
    emissions = (
        torch.randn(len(LENGTHS), max(LENGTHS), num_labels, dtype=dtype) * scale
    ).requires_grad_()
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return crf, emissions, mask


def every_path(crf, emissions, length, temperature=1.0):
    """All (path, score / temperature) of one sentence, legal ones alone, straight from the
    definition."""
    found = []
    for y in itertools.product(range(crf.num_labels), repeat=length):
        steps = list(itertools.pairwise(y))
        if not (
            crf.legal_start[y[0]]
            and crf.legal_end[y[-1]]
            and all(crf.legal_transitions[u, v] for u, v in steps)
        ):
            continue
        s = crf.start[y[0]] + crf.end[y[-1]] + sum(emissions[i, v] for i, v in enumerate(y))
        found.append((y, (s + sum(crf.transitions[u, v] for u, v in steps)) / temperature))
    return found


cases = pytest.mark.parametrize("legal", [None, IOB2], ids=["free", "iob2"])
scales = pytest.mark.parametrize("scale", [2.0, 60.0], ids=["fast recursion", "log space"])


@cases
@scales
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_partition_and_marginals_equal_enumeration(legal, scale, temperature):
    crf, emissions, mask = chain(legal=legal, scale=scale)
    log_z = crf.log_partition(emissions, mask, temperature)
    with_grad = crf.marginals(emissions, mask, temperature)
    with torch.no_grad():
        fast = crf.marginals(emissions, mask, temperature)
    for b, n in enumerate(LENGTHS):
        paths = every_path(crf, emissions[b], n, temperature)
        scores = torch.stack([s for _, s in paths])
        torch.testing.assert_close(log_z[b], scores.logsumexp(0))
        p, ys = scores.softmax(0), torch.tensor([y for y, _ in paths])
        for unary, pairwise in (with_grad, fast):
            expected = torch.stack(
                [torch.stack([p[ys[:, i] == v].sum() for v in range(4)]) for i in range(n)]
            )
            torch.testing.assert_close(unary[b, :n], expected, atol=1e-9, rtol=1e-7)
            assert (unary[b, n:] == 0).all() and (pairwise[b, max(n - 1, 0) :] == 0).all()
            for i, u, v in itertools.product(range(n - 1), range(4), range(4)):
                expected = p[(ys[:, i] == u) & (ys[:, i + 1] == v)].sum()
                torch.testing.assert_close(pairwise[b, i, u, v], expected, atol=1e-9, rtol=1e-7)
        shown = crf.log_marginals(emissions, mask)[b, :n].exp() if temperature == 1 else None
        if shown is not None:
            torch.testing.assert_close(shown, with_grad[0][b, :n], atol=1e-9, rtol=1e-7)


@cases
def test_score_and_log_prob_equal_enumeration_and_forbid_illegal_paths(legal):
    crf, emissions, mask = chain(legal=legal)
    legal_paths = dict(every_path(crf, emissions[1], 4))
    for y in itertools.product(range(4), repeat=4):
        tags = torch.zeros(len(LENGTHS), 6, dtype=torch.long)
        tags[1, :4] = torch.tensor(y)
        tags[1, 4:] = -100  # padding may hold anything
        expected = legal_paths.get(y, torch.tensor(float("-inf"), dtype=torch.double))
        torch.testing.assert_close(crf.score(emissions, tags, mask)[1], expected)
        log_z = crf.log_partition(emissions, mask)[1]
        torch.testing.assert_close(crf.log_prob(emissions, tags, mask)[1], expected - log_z)


@cases
@pytest.mark.parametrize("k", [1, 3, 5000])
def test_k_best_equals_enumeration(legal, k):
    crf, emissions, mask = chain(legal=legal)
    paths, scores = crf.k_best(emissions, mask, k)
    assert paths.shape == (4, k, 6) and scores.shape == (4, k)
    for b, n in enumerate(LENGTHS):
        expected = sorted(every_path(crf, emissions[b], n), key=lambda found: -found[1])[:k]
        found = [tuple(p.tolist()) for p in paths[b, : len(expected), :n]]
        assert found == [y for y, _ in expected]
        torch.testing.assert_close(
            scores[b, : len(expected)], torch.stack([s for _, s in expected])
        )
        assert (scores[b, len(expected) :] == float("-inf")).all() and (
            paths[b, len(expected) :] == 0
        ).all()
        assert len(set(found)) == len(found)
        assert (paths[b, :, n:] == 0).all()
        assert tuple(crf.viterbi(emissions, mask)[b, :n].tolist()) == expected[0][0]


def test_viterbi_and_nll_agree_with_pytorch_crf():
    ours, emissions, mask = chain(5, dtype=torch.float32)
    peer = PytorchCrf(5, batch_first=True)
    peer.start_transitions.data, peer.end_transitions.data, peer.transitions.data = (
        ours.start.data,
        ours.end.data,
        ours.transitions.data,
    )
    tags = torch.randint(0, 5, mask.shape)
    torch.testing.assert_close(
        ours.log_prob(emissions, tags, mask), peer(emissions, tags, mask, reduction="none")
    )
    assert peer.decode(emissions, mask) == [
        path[:n].tolist() for path, n in zip(ours.viterbi(emissions, mask), LENGTHS, strict=True)
    ]


@cases
def test_constrained_partition_equals_enumeration(legal):
    crf, emissions, mask = chain(legal=legal)
    allowed = torch.rand(emissions.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    found = crf.constrained_log_partition(emissions, allowed, mask)
    for b, n in enumerate(LENGTHS):
        kept = [
            s
            for y, s in every_path(crf, emissions[b], n)
            if all(allowed[b, i, v] for i, v in enumerate(y))
        ]
        expected = (
            torch.stack(kept).logsumexp(0)
            if kept
            else torch.tensor(float("-inf"), dtype=torch.double)
        )
        torch.testing.assert_close(found[b], expected)
    everything = crf.constrained_log_partition(emissions, torch.ones_like(allowed), mask)
    torch.testing.assert_close(everything, crf.log_partition(emissions, mask))


def test_constrained_partition_survives_forced_detours():
    """Labels that only a chain of unlikely steps can reach: what the fast recursion would lose."""
    crf = LinearChainCRF(3, legal_iob2(["O", "B-X", "I-X"])).float()
    emissions = torch.zeros(1, 40, 3)
    emissions[..., 0] = 9.0
    allowed = torch.ones(1, 40, 3, dtype=torch.bool)
    allowed[:, 1:, 1], allowed[:, -1, 0] = (
        False,
        False,
    )  # only B at the first word makes the last I legal
    mask = torch.ones(1, 40, dtype=torch.bool)
    only = crf.score(emissions, torch.tensor([[1] + [2] * 39]), mask)
    torch.testing.assert_close(crf.constrained_log_partition(emissions, allowed, mask), only)


def test_legality_that_forces_long_detours_is_computed_in_log_space():
    legal = torch.ones(3).bool(), torch.eye(3).bool(), torch.tensor([False, True, True])
    crf = LinearChainCRF(3, legal)
    for p in crf.parameters():
        torch.nn.init.zeros_(p)
    emissions = torch.tensor([[[0.0, -29.0, -15.0]] * 4 + [[-29.0, 0.0, -29.0]] * 4])
    mask = torch.ones(1, 8, dtype=torch.bool)
    torch.testing.assert_close(crf.log_partition(emissions, mask), torch.tensor([-116.0]))
    assert crf.log_prob(emissions, crf.viterbi(emissions, mask), mask) <= 0


def test_a_sentence_without_a_legal_path_spoils_no_other():
    crf, emissions, mask = chain()
    allowed = torch.ones(emissions.shape, dtype=torch.bool)
    allowed[0, 1] = False
    found = crf.constrained_log_partition(emissions, allowed, mask)
    assert found[0] == float("-inf") and found[1:].isfinite().all()
    found[1:].sum().backward()
    assert (
        (emissions.grad[0] == 0).all()
        and emissions.grad.isfinite().all()
        and crf.transitions.grad.isfinite().all()
    )


@cases
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_structural_distillation_is_the_kl_by_enumeration(legal, temperature):
    (p, e_p, mask), (q, e_q, _) = chain(legal=legal), chain(legal=legal, seed=1)
    found, expected = structural(Chain(q, e_q), Chain(p, e_p), mask, temperature), []
    for b, n in enumerate(LENGTHS):
        log_p = torch.stack([s for _, s in every_path(p, e_p[b], n, temperature)]).log_softmax(0)
        log_q = torch.stack([s for _, s in every_path(q, e_q[b], n, temperature)]).log_softmax(0)
        expected.append((log_p.exp() * (log_p - log_q)).sum())
    torch.testing.assert_close(found, temperature**2 * torch.stack(expected).mean())


def test_tempering_the_marginals_is_not_tempering_the_chain():
    """What public code mixes up: the two differ, so a structural loss must temper the teacher's
    chain itself."""
    crf, emissions, mask = chain()
    unary, _ = crf.marginals(emissions, mask)
    assert (
        unary[0].log().div(3).softmax(-1) - crf.marginals(emissions, mask, 3.0)[0][0]
    ).abs().max() > 0.05


@cases
@scales
def test_gradients_once_and_twice(legal, scale):
    crf, emissions, mask = chain(
        3, legal=None if legal is None else legal_iob2(["O", "B-X", "I-X"]), scale=scale
    )
    mask, emissions = mask[1:, :4], emissions.detach()[1:, :4].requires_grad_()
    legal_tags = torch.zeros(3, 4, dtype=torch.long)
    inputs = (emissions, crf.transitions, crf.start, crf.end)

    def on(quantity):
        return lambda e, *parameters: _with(
            crf, dict(zip(("transitions", "start", "end"), parameters, strict=True)), quantity, e
        )

    for quantity in (
        lambda e: crf.log_partition(e, mask, 1.5),
        lambda e: crf.log_prob(e, legal_tags, mask),
        lambda e: crf.constrained_log_partition(e, torch.ones_like(e, dtype=torch.bool), mask),
        lambda e: crf.marginals(e, mask)[0],
        lambda e: crf.marginals(e, mask)[1],
    ):
        assert torch.autograd.gradcheck(on(quantity), inputs)
        if scale < 10:
            assert torch.autograd.gradgradcheck(on(quantity), inputs)


def _with(crf, parameters, quantity, emissions):
    """The quantity as a function of the CRF's parameters too."""
    kept = {name: getattr(crf, name) for name in parameters}
    try:
        for name, value in parameters.items():
            delattr(crf, name)
            setattr(crf, name, value)
        return quantity(emissions)
    finally:
        for name, value in kept.items():
            if name in crf.__dict__:
                delattr(crf, name)
            setattr(crf, name, value)


@cases
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_float32_follows_float64_up_to_scores_of_10_000(legal, scale):
    crf, emissions, mask = chain(legal=legal, scale=scale, dtype=torch.double)
    single = chain(legal=legal, scale=scale, dtype=torch.double)[0].float()
    low = emissions.detach().float().requires_grad_()
    exact, found = crf.log_partition(emissions, mask), single.log_partition(low, mask)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)
    exact.sum().backward()
    found.sum().backward()
    assert low.grad.isfinite().all() and single.transitions.grad.isfinite().all()
    torch.testing.assert_close(
        low.grad.double(), emissions.grad, atol=5e-3 if scale > 100 else 1e-4, rtol=1e-3
    )
    assert crf.viterbi(emissions, mask).equal(single.viterbi(low, mask))


def test_gradients_are_finite_where_no_path_is_legal():
    crf = LinearChainCRF(
        2, (torch.tensor([False, False]), torch.ones(2, 2).bool(), torch.ones(2).bool())
    )
    emissions = torch.zeros(1, 3, 2, requires_grad=True)
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert crf.log_partition(emissions, mask).item() == float("-inf")
    paths, scores = crf.k_best(emissions, mask, 2)
    assert (scores == float("-inf")).all() and (paths == 0).all()


@cases
def test_padding_changes_nothing_and_inputs_are_not_mutated(legal):
    crf, emissions, mask = chain(legal=legal)
    kept = emissions.detach().clone()
    wide = torch.cat([emissions.detach(), torch.full((4, 3, 4), 1e30, dtype=torch.double)], 1)
    wide_mask = torch.cat([mask, torch.zeros(4, 3, dtype=torch.bool)], 1)
    torch.testing.assert_close(
        crf.log_partition(wide, wide_mask), crf.log_partition(emissions, mask)
    )
    torch.testing.assert_close(
        crf.marginals(wide, wide_mask)[1][:, :5], crf.marginals(emissions, mask)[1]
    )
    assert crf.viterbi(wide, wide_mask)[:, :6].equal(crf.viterbi(emissions, mask))
    assert crf.k_best(wide, wide_mask, 3)[0][..., :6].equal(crf.k_best(emissions, mask, 3)[0])
    assert emissions.equal(kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e, m: (e[0], m), "emissions: expected shape"),
        (lambda e, m: (e[..., :2], m), "emissions: expected shape"),
        (lambda e, m: (e, m.float()), "mask: expected bool"),
        (lambda e, m: (e, m[:, :-1]), "mask: expected bool"),
        (lambda e, m: (e, m.flip(1)), "start with a word"),
        (lambda e, m: (e[:0], m[:0]), "nowhere 0"),
        (lambda e, m: (e, m, 0.0), "temperature: expected more than 0"),
    ],
)
def test_wrong_shapes_are_refused(change, message):
    crf, emissions, mask = chain()
    with pytest.raises(ValueError, match=message):
        crf.log_partition(*change(emissions, mask))


def test_wrong_tags_allowed_and_k_are_refused():
    crf, emissions, mask = chain()
    with pytest.raises(ValueError, match="tags: expected 0 to 3, got 0 to 4"):
        crf.score(emissions, torch.full(mask.shape, 4), mask)
    with pytest.raises(ValueError, match="tags: expected shape"):
        crf.score(emissions, torch.zeros(4, 2, dtype=torch.long), mask)
    with pytest.raises(ValueError, match="allowed: expected bool"):
        crf.constrained_log_partition(emissions, torch.ones(4, 6, 4), mask)
    with pytest.raises(ValueError, match="k: expected at least 1"):
        crf.k_best(emissions, mask, 0)
    with pytest.raises(ValueError, match="legal start: expected bool"):
        LinearChainCRF(3, IOB2)


@cases
@scales
def test_the_probability_of_all_other_paths(legal, scale):
    crf, emissions, mask = chain(legal=legal, scale=scale)
    best = crf.viterbi(emissions, mask)
    found = crf.log_prob_of_others(emissions, best, mask)
    for b, length in enumerate(LENGTHS):
        paths = every_path(crf, emissions[b], length)
        others = torch.stack(
            [s for y, s in paths if list(y) != best[b, :length].tolist()]
        ).logsumexp(0)
        torch.testing.assert_close(
            found[b], others - torch.stack([s for _, s in paths]).logsumexp(0)
        )
