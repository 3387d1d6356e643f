"""A student as a folder that needs no torch: tokenizer and config.json at its root, ONNX graphs in
fp32 and int8 under onnx/, and the weights for those who want to train on.

The graphs are written by hand, node by node: ONNX's LSTM takes the length of each row, so a padded
batch gives exactly what each sentence gives alone, which an exported packed sequence does not; and
a BERT needs neither an exporter nor its versions.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from safetensors.torch import save_file
from torch import Tensor, nn

from kdlib.models import BiLstm, Tagger, Transformer
from kdlib.ship import runtime
from kdlib.students.layers import stack
from kdlib.text import calls
from kdlib.text.files import saving
from kdlib.text.pieces import special_pieces
from kdlib.text.tags import split_tag
from kdlib.twin_tower import TwinTower

OPSET = 20
FLOAT, INT32, INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64
BERTS = ("bert", "electra")


def export(
    model: Tagger | TwinTower,
    folder: str | Path,
    thresholds: Mapping[str, float],
    card: str = "",
    labels: Sequence[str] = (),
) -> None:
    """Write a student's folder, whole or not at all. thresholds: a label's least score, for those
    that are not named 0, of a twin tower's 0.5. card: its README. labels: of a twin tower, what it
    looks for where nothing is asked.

    ValueError for an encoder without a graph here, or a threshold that is no probability.
    """
    named = not isinstance(model, TwinTower)
    known = {split_tag(tag)[1] for tag in model.labels} - {""} if named else calls.labels_of(labels)
    types = sorted(known)
    strange = sorted(thresholds.keys() - set(types))
    if strange:
        raise ValueError(f"thresholds: expected labels among {types}, got {strange}")
    if not all(0 <= score <= 1 for score in thresholds.values()):
        raise ValueError(f"thresholds: expected numbers from 0 to 1, got {dict(thresholds)}")
    least = {kind: round(thresholds.get(kind, 0.0 if named else 0.5), 4) for kind in types}
    graph, own = (graph_of(model), _tags(model)) if named else (twin_graph(model), _open(model))
    config = {"format": runtime.FORMAT, "labels": types, "thresholds": least, **own}
    with saving(folder) as aside:
        model.tokenizer.save_pretrained(aside)
        model.tokenizer.backend_tokenizer.save(str(aside / "tokenizer.json"), pretty=False)
        weights = {k: v.contiguous() for k, v in model.state_dict().items()}
        save_file(weights, aside / "model.safetensors")
        (aside / "onnx").mkdir()
        onnx.save(graph, aside / "onnx" / "model.onnx")
        quantize(aside / "onnx" / "model.onnx", aside / "onnx" / "model_int8.onnx")
        (aside / runtime.CONFIG).write_text(json.dumps(config, indent=1), encoding="utf8")
        (aside / "README.md").write_text(card, encoding="utf8")


def _tags(tagger: Tagger) -> dict[str, Any]:
    """What `runtime.Tagger` needs beside the graph."""
    return {
        "model_type": f"kdlib-{tagger.encoder.kind}",
        "tags": tagger.labels,
        "id2label": dict(enumerate(tagger.labels)),
        "crf": crf_of(tagger),
        "special_pieces": special_pieces(tagger.tokenizer),
        "unknown_piece": tagger.tokenizer.unk_token_id,
        "most_pieces": tagger.encoder.max_pieces,
        "encoder": tagger.encoder.config(),
    }


def _open(model: TwinTower) -> dict[str, Any]:
    """What `runtime.TwinTower` needs."""
    return {
        "model_type": runtime.TWIN,
        "unknown_piece": model.tokenizer.unk_token_id,
        "buckets": model.config["buckets"],
        "encoder": model.config,
    }


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
    elif isinstance(encoder, Transformer) and _is_bert(encoder):
        nodes, held, last = _bert(encoder)
    else:
        raise ValueError(
            "expected a BiLSTM or a BERT, over word pieces alone, the encoders with a graph here, "
            f"got {type(encoder).__name__}"
        )
    held |= {"output.weight": tagger.output.weight.T, "output.bias": tagger.output.bias}
    nodes += _linear(last, "output", "scores")
    inputs = {"pieces": (INT64, ["B", "P"]), "lengths": (INT32, ["B"])}
    return _model(nodes, held, inputs, ["B", "P", len(tagger.labels)])


def twin_graph(model: TwinTower) -> onnx.ModelProto:
    """Words [B, L] and U labels as bags of word pieces -> scores [B, L, 1 + U], "none" first.

    Bags: `pieces` of all of them in a row, which bag each of these is `of`, and the `sizes` of the
    bags, [B, L], 1 where there is no word.
    """
    node = helper.make_node
    held: dict[str, Tensor] = {
        "embedding": model.embedding.weight,
        "width": torch.tensor([model.embedding.embedding_dim]),
        "flat": torch.tensor([-1]),
        "second": torch.tensor([1]),
        "label.weight": model.label.weight.T,
        "label.bias": model.label.bias,
        "none": model.none[None],
    }
    nodes = [
        *_means(""),
        node("Shape", ["sizes"], ["shape"]),
        node("Concat", ["shape", "width"], ["of words"], axis=0),
        node("Reshape", ["means", "of words"], ["read"]),
    ]
    ends = [
        [(ahead, "_l0"), (back, "_l0")]
        for ahead, back in zip(model.forwards, model.backwards, strict=True)
    ]
    nodes += _recurrent("read", [_gates(pair) for pair in ends], model.config["hidden"], held)
    nodes += [
        *_means("label_"),
        *_linear("label_means", "label", "named"),
        node("Concat", ["none", "named"], ["towers"], axis=0),
        node("Transpose", ["towers"], ["across"], perm=[1, 0]),
        node("MatMul", ["encoded", "across"], ["scores"]),
    ]
    inputs = {"lengths": (INT32, ["B"])}
    inputs |= {name: (INT64, ["N"]) for name in ("pieces", "of")}
    inputs |= {name: (INT64, ["M"]) for name in ("label_pieces", "label_of")}
    inputs |= {"sizes": (FLOAT, ["B", "L"]), "label_sizes": (FLOAT, ["U"])}
    return _model(nodes, held, inputs, ["B", "L", "1 + U"])


def _means(prefix: str) -> list[onnx.NodeProto]:
    """The mean of each bag's embeddings [bags, width], `prefix` + "means"."""
    node, p = helper.make_node, prefix
    return [
        node("Gather", ["embedding", f"{p}pieces"], [f"{p}rows"]),
        node("Reshape", [f"{p}sizes", "flat"], [f"{p}many"]),
        node("Shape", [f"{p}many"], [f"{p}bags"]),
        node("Concat", [f"{p}bags", "width"], [f"{p}table"], axis=0),
        node("ConstantOfShape", [f"{p}table"], [f"{p}zeros"]),
        node("Unsqueeze", [f"{p}of", "second"], [f"{p}place"]),
        node("ScatterND", [f"{p}zeros", f"{p}place", f"{p}rows"], [f"{p}sums"], reduction="add"),
        node("Unsqueeze", [f"{p}many", "second"], [f"{p}size"]),
        node("Div", [f"{p}sums", f"{p}size"], [f"{p}means"]),
    ]


def _model(
    nodes: list[onnx.NodeProto],
    held: Mapping[str, Tensor],
    inputs: Mapping[str, tuple[int, list]],
    scores: list,
) -> onnx.ModelProto:
    """A checked model with one output, `scores`."""
    of = helper.make_tensor_value_info
    arrays = {name: w.detach().cpu().contiguous().numpy() for name, w in held.items()}
    graph = helper.make_graph(
        nodes,
        "student",
        [of(name, *own) for name, own in inputs.items()],
        [of("scores", FLOAT, scores)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def _is_bert(encoder: Transformer) -> bool:
    config = encoder.model.config
    return config.model_type in BERTS and config.hidden_act == "gelu" and not encoder.reads_shapes


def _linear(source: str, name: str, out: str) -> list[onnx.NodeProto]:
    """source @ weight + bias; the weight is kept transposed."""
    product = helper.make_node("MatMul", [source, f"{name}.weight"], [f"{out} product"])
    return [product, helper.make_node("Add", [f"{out} product", f"{name}.bias"], [out])]


def _bilstm(encoder: BiLstm) -> tuple[list[onnx.NodeProto], dict[str, Tensor], str]:
    """Nodes, weights by name, and the name of what comes out [B, P, 2 hidden]."""
    lstm, held = encoder.lstm, {"embedding": encoder.embedding.weight}
    read = helper.make_node("Gather", ["embedding", "pieces"], ["read"])
    ends = [
        [(lstm, f"_l{layer}{end}") for end in ("", "_reverse")] for layer in range(lstm.num_layers)
    ]
    nodes = _recurrent("read", [_gates(pair) for pair in ends], lstm.hidden_size, held)
    return [read, *nodes], held, "encoded"


def _recurrent(
    source: str, layers: Sequence[dict[str, Tensor]], hidden: int, held: dict[str, Tensor]
) -> list[onnx.NodeProto]:
    """Bidirectional LSTMs over `source` [B, P, width] -> "encoded" [B, P, 2 hidden]; their weights
    go to `held`."""
    node, recurrent = helper.make_node, {"hidden_size": hidden, "direction": "bidirectional"}
    held["wide"] = torch.tensor([0, 0, -1])
    nodes = [node("Transpose", [source], ["layer 0"], perm=[1, 0, 2])]  # [P, B, width]
    for layer, gates in enumerate(layers):
        own = {f"{name} {layer}": w for name, w in gates.items()}
        held |= own
        inputs = [f"layer {layer}", *own, "lengths"]
        nodes.append(node("LSTM", inputs, [f"both {layer}"], **recurrent))  # [P, 2, B, hidden]
        nodes.append(node("Transpose", [f"both {layer}"], [f"side {layer}"], perm=[0, 2, 1, 3]))
        nodes.append(node("Reshape", [f"side {layer}", "wide"], [f"layer {layer + 1}"]))
    return [*nodes, node("Transpose", [f"layer {len(layers)}"], ["encoded"], perm=[1, 0, 2])]


def _bert(encoder: Transformer) -> tuple[list[onnx.NodeProto], dict[str, Tensor], str]:
    """The same of a BERT, or of an ELECTRA, whose table is narrower than its layers: pieces in rows
    [B P, width] where they do not meet, so that each product takes its bias along."""
    model, node = encoder.model, helper.make_node
    heads, table = model.config.num_attention_heads, model.embeddings
    width = encoder.width // heads
    held = {
        "words": table.word_embeddings.weight,
        "places": table.position_embeddings.weight + table.token_type_embeddings.weight[0],
        "zero": torch.tensor(0),
        "one": torch.tensor(1),
        "second": torch.tensor([1]),
        "any": torch.tensor([-1]),
        "rows": torch.tensor([-1, table.word_embeddings.embedding_dim]),
        "parts": torch.tensor([heads, width]),
        "joined": torch.tensor([-1, heads * width]),
        "wide": torch.tensor([encoder.width]),
        "scale": torch.tensor(width**-0.5),
        "seen": torch.tensor(0.0),
        "hidden": torch.tensor(-1e9),
    }

    def norm(source: str, module: nn.LayerNorm, out: str) -> onnx.NodeProto:
        held.update({f"{out} gain": module.weight, f"{out} shift": module.bias})
        inputs = [source, f"{out} gain", f"{out} shift"]
        return node("LayerNormalization", inputs, [out], axis=-1, epsilon=module.eps)

    def linear(source: str, modules: Sequence[nn.Linear], out: str) -> onnx.NodeProto:
        held[f"{out}.weight"] = torch.cat([module.weight for module in modules]).T
        held[f"{out}.bias"] = torch.cat([module.bias for module in modules])
        return node("Gemm", [source, f"{out}.weight", f"{out}.bias"], [out])

    nodes = [
        node("Shape", ["pieces"], ["long"], start=1),
        node("Squeeze", ["long"], ["length"]),
        node("Range", ["zero", "length", "one"], ["at"]),
        node("Gather", ["words", "pieces"], ["word"]),
        node("Gather", ["places", "at"], ["place"]),
        node("Add", ["word", "place"], ["embedded"]),
        node("Reshape", ["embedded", "rows"], ["embedded rows"]),
        norm("embedded rows", table.LayerNorm, "layer 0"),
        node("Concat", ["any", "long", "parts"], ["heads"], axis=0),
        node("Concat", ["any", "long", "wide"], ["texts"], axis=0),
        node("Cast", ["lengths"], ["whole"], to=INT64),
        node("Unsqueeze", ["whole", "second"], ["end"]),
        node("Less", ["at", "end"], ["inside"]),
        node("Unsqueeze", ["inside", "second"], ["of heads"]),
        node("Unsqueeze", ["of heads", "second"], ["of queries"]),
        node("Where", ["of queries", "seen", "hidden"], ["mask"]),  # [B, 1, 1, P]
    ]
    turns = {"query": [0, 2, 1, 3], "key": [0, 2, 3, 1], "value": [0, 2, 1, 3]}
    last = "layer 0"
    if hasattr(model, "embeddings_project"):
        nodes.append(linear(last, [model.embeddings_project], "projected"))
        last = "projected"
    for m, layer in enumerate(stack(model), 1):
        parts = layer.attention.self
        nodes += [
            linear(last, [getattr(parts, name) for name in turns], f"asked {m}"),
            node("Split", [f"asked {m}"], [f"{name} {m}" for name in turns], axis=1, num_outputs=3),
        ]
        for name, turn in turns.items():
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
            linear(f"mixed {m} joined", [layer.attention.output.dense], f"attended {m}"),
            node("Add", [f"attended {m}", last], [f"attended {m} added"]),
            norm(f"attended {m} added", layer.attention.output.LayerNorm, f"middle {m}"),
            linear(f"middle {m}", [layer.intermediate.dense], f"wide {m}"),
            node("Gelu", [f"wide {m}"], [f"bent {m}"]),
            linear(f"bent {m}", [layer.output.dense], f"narrow {m}"),
            node("Add", [f"narrow {m}", f"middle {m}"], [f"narrow {m} added"]),
            norm(f"narrow {m} added", layer.output.LayerNorm, f"layer {m}"),
        ]
        last = f"layer {m}"
    return [*nodes, node("Reshape", [last, "texts"], ["encoded"])], held, "encoded"


def _gates(ends: Sequence[tuple[nn.LSTM, str]]) -> dict[str, Tensor]:
    """Of the two directions, each a torch LSTM and the ending of its weights' names: torch keeps
    the gates in the order input, forget, cell, output; ONNX input, output, forget, cell, and both
    biases in a row."""
    hidden = ends[0][0].hidden_size
    order = [*range(hidden), *range(3 * hidden, 4 * hidden), *range(hidden, 3 * hidden)]

    def both(name: str) -> Tensor:
        return torch.stack([getattr(lstm, f"{name}{end}")[order] for lstm, end in ends])

    biases = torch.cat([both("bias_ih"), both("bias_hh")], 1)
    return {"W": both("weight_ih"), "R": both("weight_hh"), "B": biases}


def quantize(source: Path, target: Path) -> None:
    """Weights as whole numbers, a scale a column, embeddings in 8 bits; activations quantised as
    they come.

    Weights keep to 7 bits: a CPU without VNNI adds two products of 8 bits in 16, which overflow.
    """
    kinds, log = ["MatMul", "LSTM", "Gather"], logging.getLogger()
    how = {"weight_type": QuantType.QInt8, "reduce_range": True, "per_channel": True}
    level = log.level
    log.setLevel(logging.ERROR)  # it asks for a step that dynamic quantisation does not need
    try:
        quantize_dynamic(source, target, op_types_to_quantize=kinds, **how)
    finally:
        log.setLevel(level)
