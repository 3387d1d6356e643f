import pytest
import torch
from conftest import SENTENCES, tagger

from kdlib.losses import layer_map
from kdlib.models import BiLstm
from kdlib.students import encoders, pretrained
from kdlib.students.layers import stack, watched
from kdlib.students.projection import project
from kdlib.text import corpora


def text(model, sentences=SENTENCES):
    batch = model.encode(sentences).collate(range(len(sentences)))
    return [(batch.pieces, batch.piece_mask)]


@pytest.fixture
def varied(tiny):
    """The tiny encoder with layer norms, biases and activations that are not what they started
    as."""
    torch.manual_seed(3)
    for name, parameter in tiny.encoder.named_parameters():
        noise = torch.randn_like(parameter)
        parameter.data += (
            0.3 * noise if parameter.dim() == 1 or "embeddings" in name else 0.15 * noise
        )
    return tiny


def distance(student, teacher, mapped, windows, basis):
    """Share of the teacher's variance around 0 that the student's last layer misses."""
    (pieces, mask), (m, g) = windows[0], max(mapped.items())
    with torch.no_grad(), watched(teacher.eval()) as theirs, watched(student.eval()) as own:
        teacher(pieces, mask)
        student(pieces, mask)
    y = theirs.hidden[g][mask]
    return ((own.hidden[m][mask] @ basis.T - y).square().sum() / y.square().sum()).item()


@torch.no_grad()
def test_at_full_size_attention_and_feed_forward_are_the_teachers_own(varied):
    """Heads, neurons and directions all kept: given the same input, through the basis, the same
    scores and outputs come."""
    windows = text(tagger(varied))
    student, mapped = encoders.thin(varied.encoder, 2, 16, 32), layer_map(2, 4)
    basis = project(varied.encoder, student, mapped, windows)
    torch.testing.assert_close(basis.T @ basis, torch.eye(16), rtol=0, atol=1e-4)
    pieces, mask = windows[0]
    with watched(varied.encoder.eval()) as theirs:
        varied.encoder(pieces, mask)
    student.eval()
    for m, g in mapped.items():
        own, other = stack(student.model)[m - 1], stack(varied.encoder.model)[g - 1]
        x = theirs.hidden[g - 1]
        q, k, v = (
            getattr(own.attention.self, name)(x @ basis).unflatten(-1, (2, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        scores = q @ k.mT / q.shape[-1] ** 0.5
        torch.testing.assert_close(scores, theirs.scores[g], rtol=1e-2, atol=1e-3)
        out = own.attention.output.dense((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        value = other.attention.self.value(x).unflatten(-1, (2, -1)).transpose(1, 2)
        expected = other.attention.output.dense(
            (theirs.scores[g].softmax(-1) @ value).transpose(1, 2).flatten(2)
        )
        torch.testing.assert_close(out @ basis.T, expected, rtol=1e-2, atol=1e-2)
        fed = own.output.dense(own.intermediate(x @ basis)) @ basis.T
        assert (fed - other.output.dense(other.intermediate(x))).abs().mean() < 0.1 * fed.std()


@pytest.mark.parametrize("embedding", [0, 72], ids=["wide", "factorised"])
def test_a_narrower_minilm_starts_nearer_than_a_random_one(embedding):
    backbone, mapped = pretrained.load(), layer_map(3, 6)
    sentences = [s.without_labels() for s in corpora.load("demo").train[:100]]
    reader = tagger(backbone)
    windows, held_out = text(reader, sentences[:80]), text(reader, sentences[80:100])
    torch.manual_seed(0)
    student, blank = (encoders.thin(backbone.encoder, 3, 156, 600, embedding) for _ in range(2))
    basis = project(backbone.encoder, student, mapped, windows)
    near, far = (distance(s, backbone.encoder, mapped, held_out, basis) for s in (student, blank))
    assert near < 0.8 * far, (near, far)
    first = {1: 2}
    near, far = (distance(s, backbone.encoder, first, held_out, basis) for s in (student, blank))
    assert near < 0.5 * far, (near, far)


def test_the_teacher_is_left_as_it_was(varied):
    varied.encoder.train()
    before = {k: v.clone() for k, v in varied.encoder.state_dict().items()}
    project(
        varied.encoder,
        encoders.thin(varied.encoder, 2, 10, 20),
        layer_map(2, 4),
        text(tagger(varied)),
    )
    assert varied.encoder.training
    assert all(v.equal(before[k]) for k, v in varied.encoder.state_dict().items())
    assert not any(m._forward_hooks for m in varied.encoder.modules())


def test_thin_students_keep_the_heads_and_say_what_is_wrong(tiny):
    student = encoders.thin(tiny.encoder, 2, 10, 20, 6, pieces=range(30))
    config = student.model.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (2, 10, 20)
    assert (
        config.num_attention_heads == 2
        and student.model.get_input_embeddings().weight.shape == (30, 6)
    )
    with pytest.raises(ValueError, match="expected a BERT.*got BiLstm"):
        encoders.thin(BiLstm(9, 4, 4), 1, 2, 2)
    for shape, message in (
        ((0, 10, 20), "layers: expected 1 or more, got 0"),
        ((2, 11, 20), "multiple of the 2 heads"),
        ((2, 18, 20), "at most the teacher's 16"),
        ((2, 10, 33), "at most 32 feed-forward units"),
        ((2, 10, 20, 17), "embedding of at most 16"),
    ):
        with pytest.raises(ValueError, match=message):
            encoders.thin(tiny.encoder, *shape)
