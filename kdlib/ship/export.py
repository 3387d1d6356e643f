"""A tagger as a folder that needs no torch: tokenizer and config.json at its root, ONNX graphs in
fp32 and int8 under onnx/, and the weights for those who want to train on.

The BiLSTM's graph is written by hand: ONNX's LSTM takes the length of each row, so a padded batch
gives exactly what each sentence gives alone, which an exported packed sequence does not.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from safetensors.torch import save_file
from torch import Tensor, nn

from kdlib.batches import special_pieces
from kdlib.models import BiLstm, Tagger
from kdlib.ship import runtime
from kdlib.text.files import saving
from kdlib.text.tags import split_tag

OPSET = 20


def export(
    tagger: Tagger, folder: str | Path, thresholds: Mapping[str, float], card: str = ""
) -> None:
    """Write a student's folder, whole or not at all. thresholds: a label's least score, 0 for those
    that are not named. card: its README.

    ValueError for an encoder without a graph here, or one that reads letter case.
    """
    types = sorted({kind for _, kind in map(split_tag, tagger.labels) if kind})
    strange = sorted(thresholds.keys() - set(types))
    if strange:
        raise ValueError(f"thresholds: expected labels among {types}, got {strange}")
    graph = bilstm_graph(tagger)
    with saving(folder) as aside:
        tagger.tokenizer.save_pretrained(aside)
        weights = {k: v.contiguous() for k, v in tagger.state_dict().items()}
        save_file(weights, aside / "model.safetensors")
        (aside / "onnx").mkdir()
        onnx.save(graph, aside / "onnx" / "model.onnx")
        quantize(aside / "onnx" / "model.onnx", aside / "onnx" / "model_int8.onnx")
        config = {
            "format": runtime.FORMAT,
            "model_type": f"kdlib-{tagger.encoder.kind}",
            "labels": types,
            "thresholds": {kind: round(thresholds.get(kind, 0.0), 4) for kind in types},
            "tags": tagger.labels,
            "id2label": dict(enumerate(tagger.labels)),
            "crf": crf_of(tagger),
            "special_pieces": special_pieces(tagger.tokenizer),
            "unknown_piece": tagger.tokenizer.unk_token_id,
            "most_pieces": tagger.encoder.max_pieces,
            "encoder": tagger.encoder.config(),
        }
        (aside / runtime.CONFIG).write_text(json.dumps(config, indent=1), encoding="utf8")
        (aside / "README.md").write_text(card, encoding="utf8")


def crf_of(tagger: Tagger) -> dict[str, list]:
    """Its scores as JSON can hold them: null for what is illegal."""

    def plain(scores: Tensor, legal: Tensor) -> list:
        values = scores.detach().masked_fill(~legal, float("-inf")).tolist()
        rows = values if isinstance(values[0], list) else [values]
        told = [[None if x == float("-inf") else x for x in row] for row in rows]
        return told if isinstance(values[0], list) else told[0]

    crf, names = tagger.crf, runtime.SCORES
    return {name: plain(getattr(crf, name), getattr(crf, f"legal_{name}")) for name in names}


def bilstm_graph(tagger: Tagger) -> onnx.ModelProto:
    """pieces [B, P] int64 and lengths [B] int32 -> each piece's label scores [B, P, K]."""
    encoder = tagger.encoder
    if not isinstance(encoder, BiLstm) or encoder.reads_shapes:
        raise ValueError(
            "expected a BiLSTM over word pieces alone, the encoder with a graph here, got "
            f"{type(encoder).__name__}{' that reads letter case' * encoder.reads_shapes}"
        )
    held = {"embedding": encoder.embedding.weight, "output.bias": tagger.output.bias}
    held["output.weight"] = tagger.output.weight.T
    node, depth = helper.make_node, encoder.lstm.num_layers
    recurrent = {"hidden_size": encoder.lstm.hidden_size, "direction": "bidirectional"}
    nodes = [node("Gather", ["embedding", "pieces"], ["read"])]
    nodes.append(node("Transpose", ["read"], ["layer 0"], perm=[1, 0, 2]))  # [P, B, width]
    for layer in range(depth):
        gates = {f"{name} {layer}": w for name, w in _gates(encoder.lstm, layer).items()}
        held |= gates
        inputs = [f"layer {layer}", *gates, "lengths"]
        nodes.append(node("LSTM", inputs, [f"both {layer}"], **recurrent))  # [P, 2, B, hidden]
        nodes.append(node("Transpose", [f"both {layer}"], [f"side {layer}"], perm=[0, 2, 1, 3]))
        nodes.append(node("Reshape", [f"side {layer}", "wide"], [f"layer {layer + 1}"]))
    nodes.append(node("MatMul", [f"layer {depth}", "output.weight"], ["scored"]))
    nodes.append(node("Add", ["scored", "output.bias"], ["turned"]))
    nodes.append(node("Transpose", ["turned"], ["scores"], perm=[1, 0, 2]))
    constants = [
        numpy_helper.from_array(np.ascontiguousarray(w.detach().float().numpy()), name)
        for name, w in held.items()
    ]
    constants.append(numpy_helper.from_array(np.array([0, 0, -1]), "wide"))
    of = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "bilstm",
        [of("pieces", TensorProto.INT64, ["B", "P"]), of("lengths", TensorProto.INT32, ["B"])],
        [of("scores", TensorProto.FLOAT, ["B", "P", len(tagger.labels)])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def _gates(lstm: nn.LSTM, layer: int) -> dict[str, Tensor]:
    """torch keeps the gates in the order input, forget, cell, output; ONNX input, output, forget,
    cell, and both biases in a row."""
    hidden = lstm.hidden_size
    order = [*range(hidden), *range(3 * hidden, 4 * hidden), *range(hidden, 3 * hidden)]

    def both(name: str) -> Tensor:
        ends = ("", "_reverse")
        return torch.stack([getattr(lstm, f"{name}_l{layer}{end}")[order] for end in ends])

    biases = torch.cat([both("bias_ih"), both("bias_hh")], 1)
    return {"W": both("weight_ih"), "R": both("weight_hh"), "B": biases}


def quantize(source: Path, target: Path) -> None:
    """Weights and embeddings as 8-bit whole numbers, activations quantised as they come."""
    kinds, log = ["MatMul", "LSTM", "Gather"], logging.getLogger()
    level = log.level
    log.setLevel(logging.ERROR)  # it asks for a step that dynamic quantisation does not need
    try:
        quantize_dynamic(source, target, op_types_to_quantize=kinds, weight_type=QuantType.QInt8)
    finally:
        log.setLevel(level)
