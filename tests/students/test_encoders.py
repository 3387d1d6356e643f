import json
from pathlib import Path

import pytest
import torch

from kdlib.models import BiLstm, Tagger
from kdlib.students import encoders, pretrained
from kdlib.text.tags import Sentence

PCA = encoders.reduce_by_pca


def test_minilm_is_the_published_model():
    backbone = pretrained.load("minilm")
    config = backbone.encoder.model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (
        6,
        384,
        12,
    )
    assert 22.4e6 < sum(p.numel() for p in backbone.encoder.parameters()) < 22.8e6
    assert backbone.tokenizer.tokenize("New York") == ["new", "york"]


def test_minilm_with_other_bytes_is_refused(monkeypatch):
    pretrained.minilm.cache_clear()
    monkeypatch.setattr(pretrained, "MINILM_SHA256", "0" * 64)
    with pytest.raises(OSError, match="expected SHA-256 0000.*got 53aa51172d14"):
        pretrained.load("minilm")
    pretrained.minilm.cache_clear()


@pytest.mark.parametrize("name", ["no-such/model", "./nowhere", "bert-base-uncased"])
def test_what_cannot_be_loaded_names_the_alternatives(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="minilm"):
        pretrained.load(name)


def test_a_pickle_is_never_read(tiny_folder, tmp_path):
    for file in Path(tiny_folder).iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        pretrained.load(str(tmp_path))


def test_a_repositorys_code_is_never_run(tiny_folder, tmp_path):
    for file in Path(tiny_folder).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | {
        "model_type": "evil",
        "auto_map": {"AutoModel": "evil.Evil"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(OSError, match="cannot load the encoder"):
        pretrained.load(str(tmp_path))


def test_students_take_every_second_layer_with_its_weights(tiny):
    student = encoders.take_layers(tiny.encoder)
    assert student.model.config.num_hidden_layers == 2
    for own, i in zip(student.model.encoder.layer, (1, 3), strict=True):
        for a, b in zip(
            own.parameters(), tiny.encoder.model.encoder.layer[i].parameters(), strict=True
        ):
            assert a.equal(b) and a is not b
    assert student.model.embeddings.word_embeddings.weight.equal(
        tiny.encoder.model.embeddings.word_embeddings.weight
    )
    everything = encoders.take_layers(tiny.encoder, [0, 1, 2, 3]).eval()
    pieces, mask = torch.tensor([[2, 5, 6, 3]]), torch.ones(1, 4, dtype=torch.bool)
    torch.testing.assert_close(everything(pieces, mask), tiny.encoder.eval()(pieces, mask))
    with pytest.raises(ValueError, match="keep: expected layers among 0 to 3"):
        encoders.take_layers(tiny.encoder, [4])


def test_lstm_students_start_from_the_teachers_table(tiny):
    table = tiny.encoder.model.get_input_embeddings().weight
    student = encoders.lstm(tiny.encoder, 8, 6, pca=PCA)
    centred = table - table.mean(0)
    kept = student.embedding.weight.detach()
    distances = torch.pdist(kept), torch.pdist(encoders.reduce_by_pca(table.detach(), 16))
    assert torch.corrcoef(torch.stack(distances))[0, 1] > 0.8
    full = encoders.reduce_by_pca(table.detach(), 16)
    ratio = torch.pdist(full) / torch.pdist(centred.detach())
    torch.testing.assert_close(
        ratio, ratio.mean().expand_as(ratio)
    )  # all directions kept: a rotation and one scale
    assert not encoders.lstm(tiny.encoder, 8, 6).embedding.weight.equal(student.embedding.weight)
    with pytest.raises(ValueError, match="width: expected 1 to 16"):
        encoders.lstm(tiny.encoder, embedding=17, pca=PCA)


def test_the_lstm_does_not_see_padding(tiny):
    student = encoders.lstm(tiny.encoder, 8, 6).eval()
    pieces, mask = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.bool)
    padded = (
        torch.cat([pieces, torch.tensor([[9, 9]])], 1),
        torch.cat([mask, torch.zeros(1, 2, dtype=torch.bool)], 1),
    )
    torch.testing.assert_close(student(*padded)[:, :3], student(pieces, mask))


def test_characters_are_read_one_by_one_and_rare_ones_as_unknown(tmp_path):
    texts = [list("今天在北京"), list("北京今天下")]
    torch.manual_seed(0)
    backbone = pretrained.characters(texts, embedding=8, hidden=6)
    vocabulary = backbone.tokenizer.get_vocab()
    assert set(vocabulary) == {"[PAD]", "[UNK]", "[CLS]", "[SEP]", *"今天北京"}
    model = Tagger(backbone.encoder, backbone.tokenizer, ["O", "B-LOC", "I-LOC"]).eval()
    [window] = model.encode([Sentence(("北", "京", "雪", "http://x.y"))]).windows[0]
    assert window == [vocabulary[p] for p in ("[CLS]", "北", "京", "[UNK]", "[UNK]", "[SEP]")]
    model.save_pretrained(tmp_path / "saved")
    again = Tagger.from_pretrained(tmp_path / "saved")
    text = [Sentence(tuple(texts[0]))]
    assert again.encode(text).windows == model.encode(text).windows
    torch.testing.assert_close(
        again.emissions(again.encode(text)), model.emissions(model.encode(text))
    )
    assert encoders.lstm(backbone.encoder, 4, 3).embedding.weight.shape == (8, 4)


def test_the_bilstm_is_torchs_on_packed_sentences():
    torch.manual_seed(0)
    model = BiLstm(20, 5, 4, layers=2, dropout=0.0)
    pieces, lengths = torch.randint(20, (3, 6)), torch.tensor([4, 6, 1])
    mask = torch.arange(6) < lengths[:, None]
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        model.embedding(pieces), lengths, batch_first=True, enforce_sorted=False
    )
    expected, _ = torch.nn.utils.rnn.pad_packed_sequence(model.lstm(packed)[0], batch_first=True)
    torch.testing.assert_close(model(pieces, mask)[mask], expected[mask])
    weights = [
        torch.autograd.grad(out[mask].square().sum(), list(model.parameters()))
        for out in (model(pieces, mask), expected)
    ]
    for ours, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_characters_that_never_repeat_are_no_vocabulary():
    with pytest.raises(
        ValueError, match="expected tokens that come twice or more, got 2 different ones in 1 texts"
    ):
        pretrained.characters([["a", "b", "[PAD]", "[PAD]"]])
    assert pretrained.characters([["a", "a", "[SEP]", "[SEP]"]]).tokenizer.get_vocab()["[SEP]"] == 3
