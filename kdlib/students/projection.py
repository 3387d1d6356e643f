"""A narrower student from a wider teacher's own weights, without training: our addition to the
paper's stage 1.

Hidden states of width D mostly lie in fewer directions. With an orthonormal basis B [D, d] of the d
strongest ones on some raw text, every weight that reads or writes hidden states is carried over
through B. What does not fit is fitted by least squares on the same text: attention heads to their
best low-rank form under the inputs they really get, feed-forward layers to the neurons kept, layer
norms per direction. What it leaves to learn is what the general stage then learns.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kdlib.models import Transformer
from kdlib.students.layers import stack


@torch.no_grad()
def project(
    teacher: Transformer,
    student: Transformer,
    mapped: Mapping[int, int],
    text: Sequence[tuple[Tensor, Tensor]],
    pieces: Sequence[int] | None = None,
) -> Tensor:
    """Give the student (see `encoders.thin`) the teacher's weights, its layer m those of teacher
    layer `mapped`[m]; returns B [D, d].

    `text`: word pieces [N, P] and their masks, as the teacher reads them, a few hundred sentences.
    `pieces`: the word pieces kept.
    """
    held = _held(teacher, mapped, text)
    outputs = [x for (layer, name), x in held.items() if name == "after norm"]
    basis = _strongest(outputs, student.width)
    # a layer norm subtracts the mean over directions, which must not be one of the strong ones:
    # turn the basis at random
    turn = torch.linalg.qr(
        torch.randn(
            student.width, student.width, generator=torch.Generator().manual_seed(0)
        ).double()
    )[0]
    basis = (basis.double() @ turn).float()
    _embeddings(teacher.model, student.model, basis, held, pieces)
    for m, g in mapped.items():
        own, other = stack(student.model)[m - 1], stack(teacher.model)[g - 1]
        _attention(other.attention, own.attention, basis, held[g, "input"])
        _norm(
            own.attention.output.LayerNorm,
            basis,
            held[g, "before middle norm"],
            held[g, "after middle norm"],
        )
        _feed_forward(other, own, basis, held[g, "activations"])
        _norm(own.output.LayerNorm, basis, held[g, "before norm"], held[g, "after norm"])
    return basis


def _held(
    teacher: Transformer, mapped: Mapping[int, int], text: Sequence[tuple[Tensor, Tensor]]
) -> dict[tuple[int, str], Tensor]:
    """What flows through the mapped layers (0: the embeddings) on the text, [words pieces, .]
    each."""
    held: dict[tuple[int, str], list[Tensor]] = {}
    hooks = []

    def keep(module: nn.Module, layer: int, before: str = "", after: str = "") -> None:
        def hook(module, inputs, out):
            for name, x in ((before, inputs[0]), (after, out)):
                if name:
                    held.setdefault((layer, name), []).append(x[mask])

        hooks.append(module.register_forward_hook(hook))

    keep(teacher.model.embeddings.LayerNorm, 0, "before norm", "after norm")
    for g in mapped.values():
        layer = stack(teacher.model)[g - 1]
        keep(layer.attention.self.query, g, "input")
        keep(layer.attention.output.LayerNorm, g, "before middle norm", "after middle norm")
        keep(layer.output.dense, g, "activations")
        keep(layer.output.LayerNorm, g, "before norm", "after norm")
    was_training = teacher.training
    teacher.eval()
    try:
        for windows, mask in text:  # the hooks read this mask
            teacher(windows, mask)
    finally:
        teacher.train(was_training)
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts) for name, parts in held.items()}


def _strongest(states: Sequence[Tensor], width: int) -> Tensor:
    """Orthonormal columns [D, width]: the directions with the largest second moments, the mean's
    among them."""
    moments = sum(x.double().T @ x.double() / len(x) for x in states)
    return torch.linalg.eigh(moments).eigenvectors.flip(1)[:, :width].float()


def _least_squares(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [out, in] and bias [out] with x W^T + b close to y, a little ridge against directions
    that x hardly has."""
    x = torch.cat([x, x.new_ones(len(x), 1)], 1).double()
    gram = x.T @ x
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solved = torch.linalg.solve(gram, x.T @ y.double()).float()
    return solved[:-1].T, solved[-1]


def _embeddings(
    teacher: nn.Module, student: nn.Module, basis: Tensor, held: dict, pieces: Sequence[int] | None
) -> None:
    """Word, position and type embeddings; a factorised student has them in fewer directions of
    their own, and a linear map out."""
    theirs, own = teacher.embeddings, student.embeddings
    before, after = held[0, "before norm"], held[0, "after norm"]
    factorised = own.word_embeddings.embedding_dim != student.config.hidden_size
    into = _strongest([before], own.word_embeddings.embedding_dim) if factorised else basis
    words = theirs.word_embeddings.weight
    own.word_embeddings.weight.copy_((words if pieces is None else words[list(pieces)]) @ into)
    for name in ("position_embeddings", "token_type_embeddings"):
        getattr(own, name).weight.copy_(getattr(theirs, name).weight @ into)
    if not factorised:
        return _norm(own.LayerNorm, basis, before, after)
    weight, bias = _least_squares(own.LayerNorm(before @ into), after @ basis)
    student.embeddings_project.weight.copy_(weight)
    student.embeddings_project.bias.copy_(bias)


def _norm(own: nn.LayerNorm, basis: Tensor, before: Tensor, after: Tensor) -> None:
    """Gain and offset of each direction, by least squares between the student's normalised input
    and the teacher's output."""
    x = nn.functional.layer_norm(before @ basis, own.normalized_shape, eps=own.eps)
    y = after @ basis
    x_mean, y_mean = x.mean(0), y.mean(0)
    gain = ((x - x_mean) * (y - y_mean)).sum(0) / (x - x_mean).square().sum(0)
    own.weight.copy_(gain)
    own.bias.copy_(y_mean - gain * x_mean)


def _attention(theirs: nn.Module, own: nn.Module, basis: Tensor, inputs: Tensor) -> None:
    """Each head's score matrix Q^T K and value map O V, cut to the student's head size where the
    inputs are strong."""
    heads = theirs.self.num_attention_heads
    wide, narrow = theirs.self.attention_head_size, own.self.attention_head_size
    x = torch.cat(
        [inputs @ basis, inputs.new_ones(len(inputs), 1)], 1
    ).double()  # the 1 carries the biases along
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    values = values.clamp_min(1e-8)
    half, inverse = (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T
    query, key, value = (
        torch.cat([part.weight @ basis, part.bias[:, None]], 1).double().unflatten(0, (heads, wide))
        for part in (theirs.self.query, theirs.self.key, theirs.self.value)
    )
    out = (basis.T @ theirs.output.dense.weight).double().unflatten(1, (heads, wide))
    u, s, v = torch.linalg.svd(half @ query.transpose(1, 2) @ key @ half)
    size = math.sqrt(narrow / wide)  # scores are divided by the root of the head size
    root = (size * s[:, :narrow]).sqrt()
    made = {
        "query": (u[:, :, :narrow] * root[:, None]).transpose(1, 2) @ inverse,
        "key": root[:, :, None] * v[:, :narrow] @ inverse,
    }
    u, s, v = torch.linalg.svd(torch.einsum("dhw,hwx->hdx", out, value) @ half, full_matrices=False)
    root = s[:, :narrow].sqrt()
    made["value"] = root[:, :, None] * v[:, :narrow] @ inverse
    for name, weights in made.items():
        weights = weights.flatten(0, 1).float()
        getattr(own.self, name).weight.copy_(weights[:, :-1])
        getattr(own.self, name).bias.copy_(weights[:, -1])
    own.output.dense.weight.copy_(
        (u[:, :, :narrow] * root[:, None]).transpose(0, 1).flatten(1).float()
    )
    own.output.dense.bias.copy_(theirs.output.dense.bias @ basis)


def _feed_forward(theirs: nn.Module, own: nn.Module, basis: Tensor, activations: Tensor) -> None:
    """The neurons that move the output most, and the output's weights fitted anew to make up for
    the others."""
    written = theirs.output.dense.weight.T @ basis
    kept = (
        (activations.std(0) * written.norm(dim=1))
        .topk(own.intermediate.dense.out_features)
        .indices.sort()
        .values
    )
    own.intermediate.dense.weight.copy_(theirs.intermediate.dense.weight[kept] @ basis)
    own.intermediate.dense.bias.copy_(theirs.intermediate.dense.bias[kept])
    weight, bias = _least_squares(activations[:, kept], activations @ written)
    own.output.dense.weight.copy_(weight)
    own.output.dense.bias.copy_(bias + theirs.output.dense.bias @ basis)
