"""A tagger as a folder that needs no torch: tokenizer and config.json at its root, ONNX graphs in
fp32 and int8 under onnx/, and the weights for those who want to train on.

The graphs are written by hand, node by node: ONNX's LSTM takes the length of each row, so a padded
batch gives exactly what each sentence gives alone, which an exported packed sequence does not; and
a BERT needs neither an exporter nor its versions.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PretrainedConfig

from kdlib.batches import special_pieces
from kdlib.models import BiLstm, Tagger, Transformer, stack
from kdlib.ship import runtime
from kdlib.text.files import saving
from kdlib.text.tags import split_tag

OPSET = 20
BERTS = ("bert", "electra")


def export(
    tagger: Tagger, folder: str | Path, thresholds: Mapping[str, float], card: str = ""
) -> None:
    """Write a student's folder, whole or not at all. thresholds: a label's least score, 0 for those
    that are not named. card: its README.

    ValueError for an encoder without a graph here.
    """
    types = sorted({kind for _, kind in map(split_tag, tagger.labels) if kind})
    strange = sorted(thresholds.keys() - set(types))
    if strange:
        raise ValueError(f"thresholds: expected labels among {types}, got {strange}")
    graph = graph_of(tagger)
    with saving(folder) as aside:
        tagger.tokenizer.save_pretrained(aside)
        tagger.tokenizer.backend_tokenizer.save(str(aside / "tokenizer.json"), pretty=False)
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


def graph_of(tagger: Tagger) -> onnx.ModelProto:
    """pieces [B, P] int64 and lengths [B] int32 -> each piece's label scores [B, P, K]."""
    encoder = tagger.encoder
    if isinstance(encoder, BiLstm) and not encoder.reads_shapes:
        nodes, held, last = _bilstm(encoder)
    elif isinstance(encoder, Transformer) and _is_bert(encoder.model.config):
        nodes, held, last = _bert(encoder)
    else:
        raise ValueError(
            "expected a BiLSTM over word pieces alone or a BERT, the encoders with a graph here, "
            f"got {type(encoder).__name__}"
        )
    held |= {"output.weight": tagger.output.weight.T, "output.bias": tagger.output.bias}
    nodes += _linear(last, "output", "scores")
    arrays = {name: w.detach().cpu().contiguous().numpy() for name, w in held.items()}
    constants = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    of = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "tagger",
        [of("pieces", TensorProto.INT64, ["B", "P"]), of("lengths", TensorProto.INT32, ["B"])],
        [of("scores", TensorProto.FLOAT, ["B", "P", len(tagger.labels)])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def _is_bert(config: PretrainedConfig) -> bool:
    return config.model_type in BERTS and config.hidden_act == "gelu"


def _linear(source: str, name: str, out: str) -> list[onnx.NodeProto]:
    """source @ weight + bias; the weight is kept transposed."""
    product = helper.make_node("MatMul", [source, f"{name}.weight"], [f"{out} product"])
    return [product, helper.make_node("Add", [f"{out} product", f"{name}.bias"], [out])]


def _bilstm(encoder: BiLstm) -> tuple[list[onnx.NodeProto], dict[str, Tensor], str]:
    """Nodes, weights by name, and the name of what comes out [B, P, 2 hidden]."""
    node, depth = helper.make_node, encoder.lstm.num_layers
    held = {"embedding": encoder.embedding.weight, "wide": torch.tensor([0, 0, -1])}
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
    nodes.append(node("Transpose", [f"layer {depth}"], ["encoded"], perm=[1, 0, 2]))
    return nodes, held, "encoded"


def _bert(encoder: Transformer) -> tuple[list[onnx.NodeProto], dict[str, Tensor], str]:
    """The same of a BERT, or of an ELECTRA, whose table is narrower than its layers."""
    model, node = encoder.model, helper.make_node
    heads, table = model.config.num_attention_heads, model.embeddings
    width = encoder.width // heads
    held = {
        "words": table.word_embeddings.weight,
        "places": table.position_embeddings.weight + table.token_type_embeddings.weight[0],
        "zero": torch.tensor(0),
        "one": torch.tensor(1),
        "second": torch.tensor([1]),
        "heads": torch.tensor([0, 0, heads, width]),
        "joined": torch.tensor([0, 0, heads * width]),
        "scale": torch.tensor(width**-0.5),
        "seen": torch.tensor(0.0),
        "hidden": torch.tensor(-1e9),
    }

    def norm(source: str, module: nn.LayerNorm, out: str) -> onnx.NodeProto:
        held.update({f"{out} gain": module.weight, f"{out} shift": module.bias})
        inputs = [source, f"{out} gain", f"{out} shift"]
        return node("LayerNormalization", inputs, [out], axis=-1, epsilon=module.eps)

    def linear(source: str, module: nn.Linear, out: str) -> list[onnx.NodeProto]:
        held.update({f"{out}.weight": module.weight.T, f"{out}.bias": module.bias})
        return _linear(source, out, out)

    nodes = [
        node("Shape", ["pieces"], ["long"], start=1),
        node("Squeeze", ["long"], ["length"]),
        node("Range", ["zero", "length", "one"], ["at"]),
        node("Gather", ["words", "pieces"], ["word"]),
        node("Gather", ["places", "at"], ["place"]),
        node("Add", ["word", "place"], ["embedded"]),
        norm("embedded", table.LayerNorm, "layer 0"),
        node("Cast", ["lengths"], ["whole"], to=TensorProto.INT64),
        node("Unsqueeze", ["whole", "second"], ["end"]),
        node("Less", ["at", "end"], ["inside"]),
        node("Unsqueeze", ["inside", "second"], ["of heads"]),
        node("Unsqueeze", ["of heads", "second"], ["of queries"]),
        node("Where", ["of queries", "seen", "hidden"], ["mask"]),  # [B, 1, 1, P]
    ]
    last = "layer 0"
    if hasattr(model, "embeddings_project"):
        nodes += linear(last, model.embeddings_project, "projected")
        last = "projected"
    for m, layer in enumerate(stack(model), 1):
        parts = layer.attention.self
        turns = {"query": [0, 2, 1, 3], "key": [0, 2, 3, 1], "value": [0, 2, 1, 3]}
        for name, turn in turns.items():
            nodes += linear(last, getattr(parts, name), f"{name} {m}")
            nodes.append(node("Reshape", [f"{name} {m}", "heads"], [f"{name} {m} cut"]))
            nodes.append(node("Transpose", [f"{name} {m} cut"], [f"{name} {m} turned"], perm=turn))
        nodes += [
            node("MatMul", [f"query {m} turned", f"key {m} turned"], [f"raw {m}"]),
            node("Mul", [f"raw {m}", "scale"], [f"scaled {m}"]),
            node("Add", [f"scaled {m}", "mask"], [f"masked {m}"]),
            node("Softmax", [f"masked {m}"], [f"share {m}"], axis=-1),
            node("MatMul", [f"share {m}", f"value {m} turned"], [f"mixed {m}"]),
            node("Transpose", [f"mixed {m}"], [f"mixed {m} turned"], perm=[0, 2, 1, 3]),
            node("Reshape", [f"mixed {m} turned", "joined"], [f"mixed {m} joined"]),
            *linear(f"mixed {m} joined", layer.attention.output.dense, f"attended {m}"),
            node("Add", [f"attended {m}", last], [f"attended {m} added"]),
            norm(f"attended {m} added", layer.attention.output.LayerNorm, f"middle {m}"),
            *linear(f"middle {m}", layer.intermediate.dense, f"wide {m}"),
            node("Gelu", [f"wide {m}"], [f"bent {m}"]),
            *linear(f"bent {m}", layer.output.dense, f"narrow {m}"),
            node("Add", [f"narrow {m}", f"middle {m}"], [f"narrow {m} added"]),
            norm(f"narrow {m} added", layer.output.LayerNorm, f"layer {m}"),
        ]
        last = f"layer {m}"
    return nodes, held, last


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
