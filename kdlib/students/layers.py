"""What the layers of a Transformer hold while it reads, and a student that learns from them."""

import contextlib
import math
from collections.abc import Iterator

import transformers
from torch import Tensor, nn

from kdlib.batches import Batch, Layers
from kdlib.models import Tagger, Transformer


def stack(model: transformers.PreTrainedModel) -> nn.ModuleList:
    """The layers, in order, of a BERT-like (`encoder.layer`) or DistilBERT-like
    (`transformer.layer`) model."""
    for part in ("encoder", "transformer"):
        if hasattr(getattr(model, part, None), "layer"):
            return getattr(model, part).layer
    raise ValueError(
        f"expected a BERT-like encoder with a stack of layers, got {type(model).__name__}"
    )


@contextlib.contextmanager
def watched(encoder: nn.Module) -> Iterator[Layers]:
    """What the layers hold in the latest forward pass inside the block; ValueError for an encoder
    without attention."""
    if not isinstance(encoder, Transformer):
        raise ValueError(
            f"expected a Transformer, whose layers can be compared, got {type(encoder).__name__}"
        )
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

        hooks += [
            query.register_forward_hook(on_query),
            key.register_forward_hook(on_key),
            layer.register_forward_hook(after),
        ]
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
        raise ValueError(
            "expected an encoder with BERT's or DistilBERT's attention, got "
            f"{type(attention).__name__}"
        )
    return getattr(attention, names[0]), getattr(attention, names[1])


class Pupil(nn.Module):
    """A tagger that is watched while it learns from layers: emissions, and what the layers hold.

    `projection` is W_h of the adaptive paper's eq. 18: it takes hidden states to the teacher's
    width, is learned with the tagger and left behind.
    """

    def __init__(self, tagger: Tagger, teacher_width: int) -> None:
        super().__init__()
        self.tagger = tagger
        self.projection = nn.Linear(tagger.encoder.width, teacher_width, bias=False)

    def forward(self, batch: Batch) -> tuple[Tensor, Layers]:
        """Emissions [B, L, K] and the layers on the batch's windows."""
        with watched(self.tagger.encoder) as layers:
            return self.tagger(batch), layers

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The tagger's, W_h with its encoder."""
        groups = self.tagger.parameter_groups()
        return groups | {"encoder": groups["encoder"] + [self.projection.weight]}
