import pytest
import torch
from conftest import SENTENCES, tagger
from transformers import DebertaV2Config, DebertaV2Model, DistilBertConfig, DistilBertModel

from kdlib import losses
from kdlib.lab import targets
from kdlib.losses import layer_map, patient_map
from kdlib.models import BiLstm, Transformer
from kdlib.students import pretrained
from kdlib.students.layers import watched


def seen(encoder, batch):
    with torch.no_grad(), watched(encoder) as found:
        encoder.eval()(batch.pieces, batch.piece_mask)
    return found


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_scores_are_what_the_softmax_gets_under_any_kernel(tiny_folder, kernel):
    model = tagger(pretrained.load(tiny_folder))
    batch = model.encode(SENTENCES[:4]).collate(range(4))
    bert = model.encoder.model
    bert.set_attn_implementation(kernel)
    found = seen(model.encoder, batch)
    assert sorted(found.scores) == [1, 2, 3, 4] and sorted(found.hidden) == [0, 1, 2, 3, 4]
    bert.set_attn_implementation("eager")
    told = bert(
        input_ids=batch.pieces,
        attention_mask=batch.piece_mask.long(),
        output_attentions=True,
        output_hidden_states=True,
    )
    hide = ~batch.piece_mask[:, None, None, :]
    for m in range(1, 5):
        softened = found.scores[m].masked_fill(hide, -torch.inf).softmax(-1)
        torch.testing.assert_close(softened, told.attentions[m - 1], rtol=1e-4, atol=1e-6)
    for m in range(5):
        torch.testing.assert_close(
            found.hidden[m][batch.piece_mask],
            told.hidden_states[m][batch.piece_mask],
            rtol=1e-4,
            atol=1e-5,
        )


def test_a_distilbert_is_watched_too():
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=60, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=20
    )
    encoder = Transformer(DistilBertModel(config))
    pieces = torch.randint(5, 60, (2, 7))
    with watched(encoder) as found:
        out = encoder(pieces, torch.ones_like(pieces).bool())
    assert found.scores[2].shape == (2, 2, 7, 7)
    assert found.hidden[2].equal(out)


def test_hooks_go_when_the_block_ends(tiny):
    def hooks():
        return sum(
            len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny.encoder.modules()
        )

    before = hooks()
    with pytest.raises(RuntimeError), watched(tiny.encoder):
        assert hooks() > before
        raise RuntimeError
    assert hooks() == before


def test_attention_of_another_make_is_refused():
    config = DebertaV2Config(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        pos_att_type=["p2c"],
    )
    with (
        pytest.raises(ValueError, match="got DisentangledSelfAttention"),
        watched(Transformer(DebertaV2Model(config))),
    ):
        pass


def test_an_encoder_without_attention_is_refused():
    with (
        pytest.raises(ValueError, match="expected a Transformer.*got BiLstm"),
        watched(BiLstm(9, 4, 4)),
    ):
        pass


def test_layer_maps():
    assert layer_map(6, 12) == {1: 2, 2: 4, 3: 6, 4: 8, 5: 10, 6: 12}
    assert patient_map(6, 12) == {1: 2, 2: 4, 3: 6, 4: 8, 5: 10}  # Sun et al.'s skip
    assert patient_map(6, 12, last=True) == {1: 7, 2: 8, 3: 9, 4: 10, 5: 11}  # and last
    for student in (0, 5, 13):
        with pytest.raises(ValueError, match=f"divides the teacher's 12, got {student}"):
            layer_map(student, 12)
        with pytest.raises(ValueError, match="divides"):
            patient_map(student, 12, last=True)


def test_a_teachers_layers_come_with_the_batch_padded_and_in_order(tiny):
    teacher = tagger(tiny)
    data = targets.with_layers(teacher.encode(SENTENCES), SENTENCES, teacher)
    rows = [2, 0, 3]
    batch = data.collate(rows)
    direct = seen(teacher.encoder, batch)
    where = batch.piece_mask
    for m in range(5):
        torch.testing.assert_close(
            batch.layers.hidden[m][where].float(), direct.hidden[m][where], rtol=2e-3, atol=2e-3
        )
    pairs = (where[:, None] & where[:, :, None])[:, None].expand_as(direct.scores[1])
    for m in range(1, 5):
        torch.testing.assert_close(
            batch.layers.scores[m][pairs].float(), direct.scores[m][pairs], rtol=2e-3, atol=2e-3
        )
        assert losses.attention_scores(direct.scores[m], batch.layers.scores[m], where) < 1e-6


def test_windows_of_a_long_sentence_are_all_there(tiny):
    teacher, long = tagger(tiny), [type(SENTENCES[0])(("anna",) * 40, ()), SENTENCES[0]]
    data = targets.with_layers(teacher.encode(long), long, teacher)
    batch = data.collate([0, 1])
    assert len(batch.pieces) > 2
    assert batch.layers.hidden[1].shape[:2] == batch.pieces.shape


def test_students_that_cut_words_otherwise_are_refused(tiny):
    teacher = tagger(tiny)
    other = teacher.encode(
        [type(SENTENCES[0])(("Anna", "lives", "in", "Berlin", "."), ()), *SENTENCES[1:]]
    )
    with pytest.raises(ValueError, match=r"as many word pieces; sentences \[0\]"):
        targets.with_layers(other, SENTENCES, teacher)
