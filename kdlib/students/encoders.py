"""Students made from a teacher's encoder: fewer layers, narrower ones, a BiLSTM."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kdlib.models import BiLstm, Transformer, build
from kdlib.students.layers import stack


def take_layers(teacher: Transformer, keep: list[int] | None = None) -> Transformer:
    """A student with the teacher's embeddings and some of its layers, weights copied; by default
    every second one, the last among them."""
    total = len(stack(teacher.model))
    keep = list(range(1, total, 2)) if keep is None else keep
    if not keep or any(not 0 <= i < total for i in keep):
        raise ValueError(f"keep: expected layers among 0 to {total - 1}, got {keep}")
    config = teacher.config()
    config["n_layers" if "n_layers" in config else "num_hidden_layers"] = len(keep)
    config.pop("layer_types", None)
    student = build("transformer", config)
    weights = {name: w for name, w in teacher.model.state_dict().items() if ".layer." not in name}
    student.model.load_state_dict(weights, strict=False)
    for own, i in zip(stack(student.model), keep, strict=True):
        own.load_state_dict(stack(teacher.model)[i].state_dict())
    return student


def thin(
    teacher: Transformer,
    layers: int,
    width: int,
    feed_forward: int,
    embedding: int = 0,
    pieces: Sequence[int] | None = None,
) -> Transformer:
    """A shallower and narrower student with as many heads and random weights; `projection.project`
    gives it the teacher's.

    `embedding`, if not 0, is the width of a factorised table of embeddings [V, embedding], as in
    ELECTRA. `pieces`: the teacher's numbers of the word pieces that the student keeps (see
    `vocabulary.prune`), all by default. ValueError unless the heads divide the width, for more
    feed-forward units than the teacher has, or for an encoder other than BERT.
    """
    config = teacher.config()
    if config.get("model_type") != "bert":
        kind = config.get("model_type", type(teacher).__name__)
        raise ValueError(
            f"expected a BERT, whose parts can be made narrower one by one, got {kind}"
        )
    if layers < 1:
        raise ValueError(f"layers: expected 1 or more, got {layers}")
    heads, units = config["num_attention_heads"], config["intermediate_size"]
    if not 0 < width <= teacher.width or width % heads:
        raise ValueError(
            f"width: expected a multiple of the {heads} heads, at most the teacher's "
            f"{teacher.width}, got {width}"
        )
    if not 0 < feed_forward <= units or not 0 <= embedding <= teacher.width:
        raise ValueError(
            f"expected at most {units} feed-forward units and an embedding of at most "
            f"{teacher.width}, got {feed_forward} and {embedding}"
        )
    config |= {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": feed_forward}
    config |= {"model_type": "electra", "embedding_size": embedding} if embedding else {}
    if pieces is not None:
        pad = config["pad_token_id"]
        config |= {
            "vocab_size": len(pieces),
            "pad_token_id": list(pieces).index(pad) if pad in pieces else None,
        }
    config.pop("layer_types", None)
    return build("transformer", config)


def lstm(
    teacher: Transformer | BiLstm,
    embedding: int = 128,
    hidden: int = 200,
    layers: int = 1,
    shapes: bool = False,
    pca: Callable[[Tensor, int], Tensor] | None = None,
) -> BiLstm:
    """A BiLSTM over the teacher's word pieces; with `pca`, such as `reduce_by_pca`, its embeddings
    begin as the teacher's, reduced."""
    if isinstance(teacher, BiLstm):
        return BiLstm(teacher.embedding.num_embeddings, embedding, hidden, layers)
    table = teacher.model.get_input_embeddings().weight.detach()
    student = BiLstm(len(table), embedding, hidden, layers, shapes=shapes)
    if pca:
        student.embedding.weight.data.copy_(pca(table, embedding))
    return student


def reduce_by_pca(table: Tensor, width: int) -> Tensor:
    """Rows [V, D] projected on their `width` directions of largest variance, scaled to unit
    variance overall."""
    if not 0 < width <= table.shape[1]:
        raise ValueError(f"width: expected 1 to {table.shape[1]}, got {width}")
    centred = table.double() - table.double().mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    vectors = vectors.flip(1)[:, :width]
    largest = vectors[vectors.abs().argmax(0), torch.arange(width)]
    vectors = vectors * largest.sign()  # an eigenvector's sign is arbitrary: fix it
    reduced = centred @ vectors
    return (reduced / reduced.std()).to(table.dtype)
