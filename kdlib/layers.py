"""What the layers of a Transformer hold while it reads: attention scores before the softmax, and hidden states.

Hooks on the query and key projections see what every attention kernel starts from, so the scores are there under eager, SDPA and flash
attention alike; `output_attentions` gives nothing under SDPA, and after the softmax elsewhere.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kdlib.backbones import Transformer, stack


class Layers(NamedTuple):
    """scores[m] [N, H, P, P]: Q K^T / sqrt(d) of layer m = 1 to M, padding not masked; hidden[m] [N, P, D]: its output, m = 0 its input."""

    scores: dict[int, Tensor]
    hidden: dict[int, Tensor]

    def to(self, device: torch.device | str) -> "Layers":
        """The same on another device."""
        return Layers(*({m: x.to(device) for m, x in part.items()} for part in self))


@contextlib.contextmanager
def watched(encoder: nn.Module) -> Iterator[Layers]:
    """What the layers hold in the latest forward pass inside the block; ValueError for an encoder without attention."""
    if not isinstance(encoder, Transformer):
        raise ValueError(f"expected a Transformer, whose layers can be compared, got {type(encoder).__name__}")
    heads, found = encoder.model.config.num_attention_heads, Layers({}, {})
    hooks = []
    for m, layer in enumerate(stack(encoder.model), 1):
        query, key = _projections(layer)
        held: dict[str, Tensor] = {}

        def on_query(module, inputs, out, held=held):
            held["query"] = out

        def on_key(module, inputs, out, held=held, m=m):
            q, k = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (held.pop("query"), out))
            found.scores[m] = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])

        def before(module, inputs, named, m=m):
            found.hidden[m - 1] = inputs[0] if inputs else named["hidden_states"]

        def after(module, inputs, out, m=m):
            found.hidden[m] = out[0] if isinstance(out, tuple) else out

        hooks += [query.register_forward_hook(on_query), key.register_forward_hook(on_key), layer.register_forward_hook(after)]
        hooks += [layer.register_forward_pre_hook(before, with_kwargs=True)] if m == 1 else []
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _projections(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Query and key of a BERT-like (`attention.self`) or DistilBERT-like (`attention`) layer."""
    attention = layer.attention
    if hasattr(attention, "self"):
        attention, names = attention.self, ("query", "key")
    else:
        names = ("q_lin", "k_lin")
    if not all(hasattr(attention, name) for name in names):
        raise ValueError(f"expected an encoder with BERT's or DistilBERT's attention, got {type(attention).__name__}")
    return getattr(attention, names[0]), getattr(attention, names[1])


def layer_map(student: int, teacher: int) -> dict[int, int]:
    """Student layer m learns from teacher layer m N / M (the paper's fig. 5); ValueError unless M layers divide N."""
    if not 0 < student <= teacher or teacher % student:
        raise ValueError(f"expected a number of student layers that divides the teacher's {teacher}, got {student}")
    return {m: m * teacher // student for m in range(1, student + 1)}


def patient_map(student: int, teacher: int, last: bool = False) -> dict[int, int]:
    """BERT-PKD's map: every N/M-th layer ('skip') or the layers below the top ('last'); the top layer itself is left to the labels."""
    skip = layer_map(student, teacher)
    return {m: teacher - student + m if last else skip[m] for m in range(1, student)}
