"""Speed, measured side by side: `python -m kdlib bench crf` writes figures/bench/crf.csv.

Ours and the peer take turns in one process on the same input; reported are medians in milliseconds
and their ratio, peer / ours. `surrogates` has no peer: it sets the k-best paths beside the
teacher's own forward passes, once each; `cost` adds up what a student takes.
"""

import copy
import itertools
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import onnxruntime
import pandas as pd
import torch
import torch_struct
import torchcrf
from gliner import GLiNER
from torch import Tensor

from kdlib.crf import LinearChainCRF
from kdlib.lab import evidence, plots, targets, timing
from kdlib.lab.study import Fitted, Study
from kdlib.methods import METHODS, Method
from kdlib.models import Tagger
from kdlib.students import Thin, pretrained
from kdlib.teachers.tagger import Taught
from kdlib.text import corpora
from kdlib.text.files import ROOT
from kdlib.text.tags import iob2_labels
from kdlib.twin_tower import TwinTower

SHAPES = ((32, 30, 9), (32, 128, 9), (64, 50, 23), (16, 128, 37))


def _potentials(crf: LinearChainCRF, emissions: Tensor, lengths: Tensor) -> Tensor:
    """The chain as torch-struct takes it, [B, L-1, to, from]; built once, outside the timing."""
    scores = crf.transitions.T + emissions[:, 1:, :, None]
    scores[:, 0] += (crf.start + emissions[:, 0])[:, None, :]
    rows = torch.arange(len(lengths))
    scores[rows, lengths - 2] += crf.end[:, None]
    return scores.detach()


def _operations(
    batch: int, length: int, num_labels: int
) -> dict[tuple[str, str], tuple[Callable, Callable]]:
    """(operation, peer) -> ours and theirs, on one random chain with sentences of half to full
    length."""
    torch.manual_seed(0)
    ours, peer = LinearChainCRF(num_labels), torchcrf.CRF(num_labels, batch_first=True)
    peer.start_transitions.data, peer.end_transitions.data = ours.start.data, ours.end.data
    peer.transitions.data = ours.transitions.data
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
            lambda: torch.autograd.grad(
                -ours.log_prob(emissions, tags, mask).mean(), (emissions, *ours.parameters())
            ),
            lambda: torch.autograd.grad(
                -peer(emissions, tags, mask, reduction="mean"), (emissions, *peer.parameters())
            ),
        ),
        ("viterbi", "pytorch-crf"): (
            lambda: ours.viterbi(emissions, mask),
            lambda: peer.decode(emissions, mask),
        ),
        ("k_best", "torch-struct"): (
            lambda: ours.k_best(emissions, mask, 5),
            lambda: struct().topk(5),
        ),
        ("marginals", "torch-struct"): (
            torch.no_grad()(lambda: ours.marginals(emissions, mask)),
            lambda: struct().marginals,
        ),
    }


def crf() -> pd.DataFrame:
    """NLL (forward and backward) and Viterbi against pytorch-crf; k_best(5) and marginals against
    torch-struct."""
    rows = []
    for shape in SHAPES:
        for (operation, peer), pair in _operations(*shape).items():
            calls = zip(("ours", "peer"), pair, strict=True)
            sides = {name: lambda _, call=call: call() for name, call in calls}
            taken = timing.in_turns(sides, 1, 6.0)
            ours_ms, peer_ms = (statistics.median(t) for t in taken.values())
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
    ours: LinearChainCRF,
    peer: torchcrf.CRF,
    emissions: Tensor,
    tags: Tensor,
    mask: Tensor,
    struct: torch_struct.LinearChainCRF,
) -> None:
    """AssertionError unless all three compute the same: a race between different numbers says
    nothing."""
    close = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(
        ours.log_prob(emissions, tags, mask), peer(emissions, tags, mask, reduction="none"), **close
    )
    torch.testing.assert_close(ours.log_partition(emissions, mask), struct.partition, **close)
    torch.testing.assert_close(
        ours.marginals(emissions, mask)[1].transpose(2, 3), struct.marginals, **close
    )
    paths = [
        path[words].tolist()
        for path, words in zip(ours.viterbi(emissions, mask), mask, strict=True)
    ]
    assert paths == peer.decode(emissions, mask)


DEBERTA_SMALL = {
    "model_type": "deberta-v2",
    "vocab_size": 30_600,
    "hidden_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "relative_attention": True,
    "position_buckets": 256,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "type_vocab_size": 0,
    "position_biased_input": False,
}
LABELS = ("person", "location", "organization", "animal", "plant")


def untrained_gliner(small: bool, mode: str) -> GLiNER:
    """A GLiNER with random weights in the shape of gliner_small-v2.1 (but the vocabulary, which
    costs no time), or on MiniLM."""
    config = {
        "model_type": f"gliner_uni_encoder_{'token' if mode == 'token_level' else 'span'}",
        "model_name": str(pretrained.minilm()),
        "span_mode": mode,
        "max_width": 12,
        "hidden_size": 512 if small else 384,
    }
    with pretrained.quiet():
        return GLiNER.from_config(
            config | ({"encoder_config": DEBERTA_SMALL} if small else {}),
            backbone_from_pretrained=not small,
        ).eval()


def runtimes(model: GLiNER) -> dict[str, GLiNER]:
    """The model in torch, in gliner's ONNX runtime, in its int8, and with `LABELS` read beforehand
    in place of with every text."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), pretrained.quiet():
        warnings.simplefilter("ignore")  # the exporter's remarks on gliner's code
        model.export_to_onnx(folder)
        options = onnxruntime.SessionOptions()
        # its idle threads would take our turn's cores
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        onnx = GLiNER.from_pretrained(folder, runtime="onnxruntime", session_options=options)
        int8 = copy.deepcopy(model)
        int8.quantize("int8")
        compressed = copy.deepcopy(model)
        compressed.compress_prompt_embeddings(sentences(how_many=32), list(LABELS))
    of_torch = {"torch": model, "torch int8": int8, "torch, prompts compressed": compressed}
    return of_torch | {"onnxruntime": onnx}


def sentences(words: int = 20, how_many: int = 128) -> list[str]:
    """Demo sentences put together until they have so many words."""
    tokens = [word for s in corpora.load("demo").test for word in s.tokens]
    return [" ".join(tokens[i : i + words]) for i in range(0, how_many * words, words)]


def gliner(seconds: float = 8.0) -> pd.DataFrame:
    """The twin tower against GLiNERs, from text to entities, tokenisation and offsets included, at
    batch 1 and 32, on the same texts."""
    texts, backbone = sentences(), pretrained.load()
    student = TwinTower(backbone.tokenizer).eval()  # speed does not depend on what it has learnt
    rows = []
    peers = {
        "gliner_small-v2.1's shape, random weights": (True, "markerV0"),
        "MiniLM, span mode": (False, "markerV0"),
    }
    for name, (small, mode) in (peers | {"MiniLM, token mode": (False, "token_level")}).items():
        for runtime, peer in runtimes(untrained_gliner(small, mode)).items():
            for batch in (1, 32):
                chunks = [texts[i : i + batch] for i in range(0, len(texts), batch)]
                calls = {
                    side: lambda i, model=model, chunks=chunks: model.inference(
                        chunks[i], list(LABELS), batch_size=len(chunks[i])
                    )
                    for side, model in (("ours", student), ("theirs", peer))
                }
                taken = timing.in_turns(calls, len(chunks), seconds)
                found = {"operation": f"batch {batch}", "peer": name, "runtime": runtime}
                found |= {"rounds": len(taken["ours"])}
                p50 = {}
                for side, t in zip(("ours", "peer"), taken.values(), strict=True):
                    p50[side] = statistics.median(t) / batch
                    p95 = statistics.quantiles(t, n=20)[-1] / batch
                    found |= {f"{side}_p50_ms": round(p50[side], 3)}
                    found |= {f"{side}_p95_ms": round(p95, 3)}
                found |= {"ours_per_second": round(1000 / p50["ours"])}
                found |= {"peer_per_second": round(1000 / p50["peer"], 1)}
                found |= {"ours_parameters": student.parameters_in_all}
                found |= {"ratio": round(p50["peer"] / p50["ours"], 1)}
                rows.append(found)
                print(found, flush=True)
    return pd.DataFrame(rows)


def surrogates(sentences: int = 14_000) -> pd.DataFrame:
    """Surrogate labels of demo sentences, storing and reading back included, against the teacher's
    forward passes over the same."""
    corpus, backbone = corpora.load("demo"), pretrained.load()
    teacher = Tagger(
        backbone.encoder, backbone.tokenizer, iob2_labels(corpus.types)
    )  # speed does not depend on training
    encoded = teacher.encode(list(itertools.islice(itertools.cycle(corpus.train), sentences)))
    start = time.perf_counter()
    emissions = teacher.emissions(encoded)
    forward, rows = time.perf_counter() - start, []
    seen = replace(encoded, teacher=emissions)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, {"KDLIB_CACHE": folder}),
    ):
        for k in (1, 5, 10, 20):
            start = time.perf_counter()
            targets.with_surrogates(seen, Taught(teacher), k)
            seconds = time.perf_counter() - start
            stored = (
                sum(f.stat().st_size for f in Path(folder).rglob("*.pt")) / 2**20 / (len(rows) + 1)
            )
            rows.append(
                {
                    "operation": f"k = {k}",
                    "sentences": sentences,
                    "words": sum(encoded.lengths),
                    "seconds": round(seconds, 2),
                }
            )
            rows[-1] |= {
                "forward_seconds": round(forward, 2),
                "ratio": round(forward / seconds, 1),
                "stored_mb": round(stored),
            }
            print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def students(seconds: float = 40.0) -> pd.DataFrame:
    """Students of notebook 02c against the teacher's shape, words to entities; demo sentences."""
    parts = corpora.shuffled(corpora.load("demo"), 100, 100)  # speed depends on no training
    shapes = {
        f"{layers} layers, {width} wide": Thin(layers=layers, width=width, feed_forward=units)
        for layers in (3, 2, 1)
        for width, units in ((240, 960), (156, 600), (96, 384))
    }
    shapes["6 layers, 108 wide"] = Thin(layers=6, width=108, feed_forward=432)
    study = Study(parts, Fitted(softmax=True))
    models: dict[str, Tagger] = {
        "teacher": study.new_teacher(),
        "3 of 6 layers": study.new_student("transformer", 0),
    }
    study = replace(study, students=shapes)
    models |= {name: study.new_student(name, 0) for name in shapes}
    table = timing.of_taggers(models, parts.test[:256], seconds)
    table = table.rename(columns={"speedup": "ratio"})
    table.insert(0, "operation", "batch " + table["batch"].astype(str))
    print(table.to_string(index=False))
    return table


def updates(rounds: int = 6) -> pd.DataFrame:
    """One update of a BiLSTM student by method, and of its teacher, on demo sentences."""
    parts = corpora.shuffled(corpora.load("demo"), 400, 2500)
    study = Study(parts, Fitted(updates=1, one=True), quiz=80)  # speed depends on no training
    rows: dict[str, Method | None] = {"teacher": None}
    stored = "student alone", "pseudo-labels", "top-k", "weighted top-k", "posterior", "structural"
    rows |= {name: METHODS[name] for name in stored}
    msd = METHODS["msd"]
    rows["posterior, teacher read anew"] = msd.tuned(every=0)
    rows |= {f"msd {way}": msd.tuned(way=way, every=1) for way in ("central", "exact")}
    rows["msd central, now and then"] = msd.tuned(way="central")
    plain = {"stored": "posterior", "read anew": "posterior, teacher read anew"}
    table = timing.of_updates(study, "bilstm", rows, plain, rounds).rename(
        columns={"row": "method"}
    )
    table.insert(0, "operation", "update")
    table.insert(4, "ratio", (1 / table["time over stored"]).round(2))
    print(table.to_string(index=False))
    return table


def cost(name: str = "ladder_wikiann", updates: int = 2400) -> pd.DataFrame:
    """CPU-seconds of all that a student costs, on one thread, nothing remembered: its teacher's
    training, its teacher's reading of the text, and its own making by method; each once.

    FileNotFoundError where the experiment's corpus is not here.
    """
    torch.set_num_threads(1)  # the second would wait in a loop, and its waiting would count
    own = replace(evidence.named(name), test=250)  # testing is no part of the cost
    methods, rows = {m.name: m for m in own.wanted}, []

    def spent(what: str, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        found = work()
        rows.append({"operation": "once", "what": what, "seconds": time.process_time() - start})
        print(rows[-1], flush=True)
        return found

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, {"KDLIB_CACHE": folder}),
    ):
        study = own.ground().with_budget(own.budget(updates))
        taught, _ = spent("teacher: training", lambda: study.taught(0))
        spent("teacher: reading", lambda: targets.emissions(taught, study.parts.text))
        for method in ("student alone", "pseudo-labels", "weighted top-k", "structural"):
            spent(method, lambda method=method: study.run(methods[method], "bilstm", 0))
    table = pd.DataFrame(rows).assign(updates=updates)
    alone = table.loc[table["what"] == "student alone", "seconds"].item()
    return table.assign(ratio=table["seconds"] / alone).round({"seconds": 1, "ratio": 2})


BENCHMARKS = {
    "cost": cost,
    "crf": crf,
    "gliner": gliner,
    "surrogates": surrogates,
    "students": students,
    "updates": updates,
}


CAPTIONS = {
    "cost": "CPU-seconds of a student of WikiAnn and of its teacher's work, one thread, each once; "
    "ratio = over the student alone's",
    "updates": "one update of a BiLSTM student by method, in turns, and what a few hold in memory "
    "at their peak: model, optimizer and a teacher that must be at hand included; ratio = "
    "posterior's time / this one's",
    "surrogates": "k-best surrogate labels of demo sentences beside the teacher's forward passes, "
    "once each; stored size",
    "shipped_": "ten minutes of `kdlib distil` on real corpora beside spaCy's tagger, which learns "
    "from the same labels: F1 on all of test, one thread, text to entities, all in turns; ratio = "
    "as fast as the teacher",
    "inference": "every model in turns on the same texts of 20 words, text to entities; ratio = as "
    "fast as a GLiNER of gliner_small's shape in torch",
    "students": "students of the adaptive notebook in turns with the teacher, medians a sentence, "
    "ratio of sentences per second",
}


def run(name: str, known: Mapping[str, Callable[[], pd.DataFrame]] = BENCHMARKS) -> None:
    """Run one benchmark, write its table, print the ratios; ValueError for an unknown name."""
    if name not in known:
        raise ValueError(f"no benchmark {name!r}: expected one of {list(known)}")
    warnings.filterwarnings("ignore", message=".*arg_constraints.*")  # torch-struct's, every call
    torch.set_num_threads(2)
    table = known[name]()
    what = "ours and a peer in turns, medians, ratio = peer / ours"
    what = next((about for begin, about in CAPTIONS.items() if name.startswith(begin)), what)
    plots.save(ROOT / "figures" / "bench" / name, table, f"`python -m kdlib bench {name}`: {what}")
    plots.gallery()
    for operation, ratios in table.groupby("operation")["ratio"]:
        mean = statistics.geometric_mean(ratios)
        print(f"{operation:10} least {ratios.min():.2f}, geometric mean {mean:.2f}")
