"""Speed, measured side by side: `python -m kdlib.bench crf` writes figures/bench/crf.csv.

Ours and the peer take turns in one process on the same tensors; reported are medians in milliseconds and their ratio, peer / ours.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import pandas as pd
import torch
import torch_struct
import torchcrf
from torch import Tensor

from kdlib import plots
from kdlib.crf import LinearChainCRF
from kdlib.data import ROOT

SHAPES = ((32, 30, 9), (32, 128, 9), (64, 50, 23), (16, 128, 37))


def side_by_side(ours: Callable[[], object], peer: Callable[[], object], seconds: float = 6.0) -> tuple[float, float]:
    """Median milliseconds of each, taken in turns after a warm-up round, for about `seconds` and at least three rounds."""
    taken: list[tuple[float, float]] = []
    began = time.perf_counter()
    while len(taken) < 4 or (time.perf_counter() - began < seconds and len(taken) < 200):
        start = time.perf_counter()
        ours()
        between = time.perf_counter()
        peer()
        taken.append((between - start, time.perf_counter() - between))
    return tuple(1000 * statistics.median(column) for column in zip(*taken[1:], strict=True))


def _potentials(crf: LinearChainCRF, emissions: Tensor, lengths: Tensor) -> Tensor:
    """The chain as torch-struct takes it, [B, L-1, to, from]; built once, outside the timing."""
    scores = crf.transitions.T + emissions[:, 1:, :, None]
    scores[:, 0] += (crf.start + emissions[:, 0])[:, None, :]
    rows = torch.arange(len(lengths))
    scores[rows, lengths - 2] += crf.end[:, None]
    return scores.detach()


def _operations(batch: int, length: int, num_labels: int) -> dict[tuple[str, str], tuple[Callable, Callable]]:
    """(operation, peer) -> ours and theirs, on one random chain with sentences of half to full length."""
    torch.manual_seed(0)
    ours, peer = LinearChainCRF(num_labels), torchcrf.CRF(num_labels, batch_first=True)
    peer.start_transitions.data, peer.end_transitions.data, peer.transitions.data = (
        ours.start.data,
        ours.end.data,
        ours.transitions.data,
    )
    emissions = torch.randn(batch, length, num_labels, requires_grad=True)
    tags = torch.randint(0, num_labels, (batch, length))
    lengths = torch.randint(length // 2, length + 1, (batch,))
    lengths[0] = length
    mask = torch.arange(length) < lengths[:, None]
    potentials = _potentials(ours, emissions, lengths)

    def struct() -> torch_struct.LinearChainCRF:
        return torch_struct.LinearChainCRF(potentials.clone(), lengths=lengths)

    _same_answers(ours, peer, emissions, tags, mask, struct())
    return {
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


def crf() -> pd.DataFrame:
    """NLL (forward and backward) and Viterbi against pytorch-crf; k_best(5) and marginals against torch-struct."""
    rows = []
    for shape in SHAPES:
        for (operation, peer), pair in _operations(*shape).items():
            ours_ms, peer_ms = side_by_side(*pair)
            sizes = dict(zip("BLK", shape, strict=True))
            taken = {
                "ours_ms": round(ours_ms, 3),
                "peer": peer,
                "peer_ms": round(peer_ms, 3),
                "ratio": round(peer_ms / ours_ms, 2),
            }
            rows.append({"operation": operation} | sizes | taken)
            print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def _same_answers(
    ours: LinearChainCRF, peer: torchcrf.CRF, emissions: Tensor, tags: Tensor, mask: Tensor, struct: torch_struct.LinearChainCRF
) -> None:
    """AssertionError unless all three compute the same: a race between different numbers says nothing."""
    close = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(ours.log_prob(emissions, tags, mask), peer(emissions, tags, mask, reduction="none"), **close)
    torch.testing.assert_close(ours.log_partition(emissions, mask), struct.partition, **close)
    torch.testing.assert_close(ours.marginals(emissions, mask)[1].transpose(2, 3), struct.marginals, **close)
    paths = [path[words].tolist() for path, words in zip(ours.viterbi(emissions, mask), mask, strict=True)]
    assert paths == peer.decode(emissions, mask)


BENCHMARKS = {"crf": crf}


def main() -> None:
    """The command line: which benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=BENCHMARKS)
    name = parser.parse_args().name
    warnings.filterwarnings("ignore", message=".*arg_constraints.*")  # torch-struct's, at every call
    torch.set_num_threads(2)
    table = BENCHMARKS[name]()
    caption = f"`python -m kdlib.bench {name}`: ours and a peer in turns, medians, ratio = peer / ours"
    plots.save(ROOT / "figures" / "bench" / name, table, caption)
    plots.gallery()
    for operation, ratios in table.groupby("operation")["ratio"]:
        print(f"{operation:10} least {ratios.min():.2f}, geometric mean {statistics.geometric_mean(ratios):.2f}")


if __name__ == "__main__":
    main()
