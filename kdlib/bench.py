"""Speed, measured side by side: `python -m kdlib.bench crf` writes figures/bench/crf.csv.

Ours and the peer take turns in one process on the same tensors; reported are medians in milliseconds and their ratio, peer / ours.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import pandas as pd
import torch
import torch_struct
from torchcrf import CRF as PytorchCrf

from kdlib import plots
from kdlib.crf import LinearChainCRF
from kdlib.data import ROOT

SHAPES = ((32, 30, 9), (32, 128, 9), (64, 50, 23), (16, 128, 37))


def side_by_side(ours: Callable[[], object], peer: Callable[[], object], seconds: float = 6.0) -> tuple[float, float]:
    """Median milliseconds of each, taken in turns after two warm-up rounds, for about `seconds` and at least three rounds."""
    taken: list[tuple[float, float]] = []
    began = time.perf_counter()
    while len(taken) < 5 or (time.perf_counter() - began < seconds and len(taken) < 200):
        start = time.perf_counter()
        ours()
        between = time.perf_counter()
        peer()
        taken.append((between - start, time.perf_counter() - between))
    return tuple(1000 * statistics.median(column) for column in zip(*taken[2:], strict=True))


def _chain(batch: int, length: int, num_labels: int) -> tuple:
    """The same random chain for ours and for pytorch-crf; sentences of half to full length."""
    torch.manual_seed(0)
    ours, peer = LinearChainCRF(num_labels), PytorchCrf(num_labels, batch_first=True)
    peer.start_transitions.data, peer.end_transitions.data, peer.transitions.data = (
        ours.start.data,
        ours.end.data,
        ours.transitions.data,
    )
    emissions = torch.randn(batch, length, num_labels, requires_grad=True)
    lengths = torch.randint(length // 2, length + 1, (batch,))
    lengths[0] = length
    mask = torch.arange(length) < lengths[:, None]
    return ours, peer, emissions, torch.randint(0, num_labels, (batch, length)), mask, lengths


def _potentials(crf: LinearChainCRF, emissions: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The chain as torch-struct takes it: [B, L-1, to, from]. Built once, outside the timing."""
    scores = crf.transitions.T + emissions[:, 1:, :, None]
    first = (crf.start + emissions[:, 0])[:, None, :]
    scores[:, 0] = scores[:, 0] + first
    rows = torch.arange(len(lengths))
    scores[rows, lengths - 2] = scores[rows, lengths - 2] + crf.end[:, None]
    return scores.detach()


def crf() -> pd.DataFrame:
    """NLL (forward and backward) and Viterbi against pytorch-crf; k_best(5) and marginals against torch-struct."""
    rows = []
    for shape in SHAPES:
        ours, peer, emissions, tags, mask, lengths = _chain(*shape)
        potentials = _potentials(ours, emissions, lengths)

        def struct(potentials: torch.Tensor = potentials, lengths: torch.Tensor = lengths) -> torch_struct.LinearChainCRF:
            return torch_struct.LinearChainCRF(potentials.clone(), lengths=lengths)

        _same_answers(ours, peer, emissions, tags, mask, struct(), lengths)
        pairs = {
            ("nll", "pytorch-crf"): (
                lambda: torch.autograd.grad(-ours.log_prob(emissions, tags, mask).mean(), (emissions, *ours.parameters())),
                lambda: torch.autograd.grad(-peer(emissions, tags, mask, reduction="mean"), (emissions, *peer.parameters())),
            ),
            ("viterbi", "pytorch-crf"): (lambda: ours.viterbi(emissions, mask), lambda: peer.decode(emissions, mask)),
            ("k_best", "torch-struct"): (lambda: ours.k_best(emissions, mask, 5), lambda: struct().topk(5)),
            ("marginals", "torch-struct"): (
                torch.no_grad()(lambda: ours.marginals(emissions, mask)),
                lambda: struct().marginals,
            ),
        }
        for (operation, name), (own, other) in pairs.items():
            ours_ms, peer_ms = side_by_side(own, other)
            found = dict(zip("BLK", shape, strict=True), ours_ms=round(ours_ms, 3), peer=name, peer_ms=round(peer_ms, 3))
            rows.append({"operation": operation} | found | {"ratio": round(peer_ms / ours_ms, 2)})
            print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def _same_answers(ours, peer, emissions, tags, mask, struct, lengths) -> None:
    """A benchmark of two things that compute different numbers says nothing."""
    torch.testing.assert_close(
        ours.log_prob(emissions, tags, mask), peer(emissions, tags, mask, reduction="none"), rtol=1e-4, atol=1e-3
    )
    torch.testing.assert_close(ours.log_partition(emissions, mask), struct.partition, rtol=1e-4, atol=1e-3)
    pairwise = ours.marginals(emissions, mask)[1]
    torch.testing.assert_close(pairwise.transpose(2, 3), struct.marginals, rtol=1e-3, atol=1e-3)
    assert peer.decode(emissions, mask) == [
        p[:n].tolist() for p, n in zip(ours.viterbi(emissions, mask), lengths.tolist(), strict=True)
    ]


BENCHMARKS = {"crf": crf}


def main() -> None:
    """The command line: which benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=BENCHMARKS)
    name = parser.parse_args().name
    torch.set_num_threads(2)
    table = BENCHMARKS[name]()
    caption = f"`python -m kdlib.bench {name}`: ours and a peer in turns, medians, ratio = peer / ours"
    plots.save(ROOT / "figures" / "bench" / name, table, caption)
    plots.gallery()
    print(
        table.groupby("operation")["ratio"]
        .agg(["min", lambda r: statistics.geometric_mean(r)])
        .set_axis(["least", "geometric mean"], axis=1)
    )


if __name__ == "__main__":
    main()
