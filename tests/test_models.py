import contextlib
import json
import time

import pytest
import torch
from conftest import SENTENCES, tagger
from safetensors.torch import load_file, save

from kdlib.lab import targets
from kdlib.models import Tagger, Transformer
from kdlib.ship.export import export
from kdlib.students import encoders
from kdlib.teachers.tagger import Taught
from kdlib.text.tags import Sentence, to_iob2


@pytest.mark.parametrize("student", ["transformer", "bilstm"])
def test_saved_models_predict_the_same(tiny, tmp_path, student):
    model = tagger(tiny, encoder=encoders.lstm(tiny.encoder, 8, 6) if student == "bilstm" else None)
    before = model.predict(SENTENCES)
    model.save_pretrained(tmp_path / "saved")
    read = Tagger.from_pretrained(tmp_path / "saved")
    assert read.predict(SENTENCES) == before and read.labels == model.labels
    assert {p.name for p in (tmp_path / "saved").iterdir()} >= {
        "tagger.json",
        "model.safetensors",
        "tokenizer.json",
    }
    with pytest.raises(FileNotFoundError, match=r"tagger\.json"):
        Tagger.from_pretrained(tmp_path)


def test_a_transformer_that_sees_letter_case_tells_words_apart_and_is_read_back(tiny, tmp_path):
    words = [Sentence(("Paris",)), Sentence(("paris",)), *SENTENCES[:3]]
    torch.manual_seed(0)
    cased = tagger(tiny, encoder=Transformer(tiny.encoder.model, shapes=True)).eval()
    blind = tagger(tiny).eval()
    for model, alike in ((cased, False), (blind, True)):
        capital, small, *_ = model.emissions(model.encode(words))
        assert torch.equal(capital, small) is alike
    cased.save_pretrained(tmp_path / "cased")
    read = Tagger.from_pretrained(tmp_path / "cased")
    pairs = zip(
        cased.emissions(cased.encode(words)), read.emissions(read.encode(words)), strict=True
    )
    assert all(torch.equal(a, b) for a, b in pairs)
    batch = cased.encode(words).collate([0])
    with pytest.raises(ValueError, match="expected the shapes of the words"):
        cased.encoder(batch.pieces, batch.piece_mask)
    with pytest.raises(ValueError, match="expected a BiLSTM .*, got Transformer"):
        export(cased, tmp_path / "s", {})


def saved(backbone, folder, encoder=None):
    """A saved tagger, its files and what its tagger.json says."""
    tagger(backbone, encoder=encoder).save_pretrained(folder)
    return json.loads((folder / "tagger.json").read_text())


def test_the_home_folder_is_found_when_reading_too(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tagger(tiny).save_pretrained("~/mine")
    assert (tmp_path / "mine" / "tagger.json").exists()
    assert Tagger.from_pretrained("~/mine").labels == tagger(tiny).labels


def test_a_damaged_folder_is_one_clear_error(tiny, tmp_path):
    saved(tiny, tmp_path / "m")
    whole = {f.name: f.read_bytes() for f in (tmp_path / "m").iterdir()}
    nan = load_file(tmp_path / "m" / "model.safetensors")
    nan["output.bias"][0] = float("nan")
    damages = {
        "model.safetensors": [b"", whole["model.safetensors"][:500], None, save(nan)],
        "tagger.json": [b"{", b"{}", b"[]", b'{"kind": "lstm", "encoder": {}}'],
        "tokenizer.json": [b"{}", b"null"],
    }
    for name, contents in damages.items():
        file = tmp_path / "m" / name
        for content in contents:
            file.unlink() if content is None else file.write_bytes(content)
            with pytest.raises(ValueError, match="m: expected the files of a whole Tagger"):
                Tagger.from_pretrained(tmp_path / "m")
            file.write_bytes(whole[name])
    assert Tagger.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    "claimed",
    [
        {"labels": ["O", *(f"B-{i}" for i in range(100_000))]},
        {"encoder": {"layers": 100_000}},
        {"encoder": {"vocabulary": 10**11}},
        {"encoder": {"hidden": 10**7}},
    ],
)
def test_a_folder_that_claims_to_be_huge_is_refused_before_it_is_made(tiny, tmp_path, claimed):
    shape = saved(tiny, tmp_path / "m", encoders.lstm(tiny.encoder, 8, 6))
    for name, value in claimed.items():
        shape[name] = shape[name] | value if isinstance(value, dict) else value
    (tmp_path / "m" / "tagger.json").write_text(json.dumps(shape))
    began = time.perf_counter()
    with pytest.raises(ValueError, match="expected the files of a whole Tagger"):
        Tagger.from_pretrained(tmp_path / "m")
    assert time.perf_counter() - began < 20  # not the hours and gigabytes it asked for


def test_a_model_folder_is_data_never_code(tiny, tmp_path, monkeypatch):
    """Neither run nor asked about: a prompt would be answered by whatever feeds the input."""
    saved(tiny, tmp_path / "m")
    mark = tmp_path / "ran"
    (tmp_path / "m" / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    file = tmp_path / "m" / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"tokenizer_class": "Evil"}
    file.write_text(
        json.dumps(config | {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}})
    )
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked"))
    with contextlib.suppress(ValueError):
        Tagger.from_pretrained(tmp_path / "m")
    assert not mark.exists()


def test_predictions_are_legal_and_one_a_sentence(tiny):
    predicted = tagger(tiny).predict(SENTENCES)
    assert len(predicted) == len(SENTENCES)
    for spans, sentence in zip(predicted, SENTENCES, strict=True):
        to_iob2(spans, len(sentence.tokens))


def test_what_is_no_sentence_is_one_clear_error_and_no_words_no_entities(tiny):
    model = tagger(tiny)
    alone = model.predict(SENTENCES[:1])
    assert model.predict([Sentence(()), SENTENCES[0], Sentence(())]) == [(), *alone, ()]
    assert model.predict([]) == [] and model.predict([Sentence(())]) == [()]
    for wrong, error, got in (
        ("Anna lives here", TypeError, "got one str"),
        (SENTENCES[0], TypeError, "got one Sentence"),
        ([["Anna", "lives"]], TypeError, "got list"),
        ([None], TypeError, "got NoneType"),
        ([Sentence(("Anna\ud800",))], ValueError, "whole characters, got .*Anna"),
    ):
        with pytest.raises(error, match=rf"sentences: expected .*{got}"):
            model.predict(wrong)


def test_predicting_leaves_the_mode_alone_and_batches_do_not_matter(tiny):
    model = tagger(tiny).train()
    together = model.emissions(model.encode(SENTENCES))
    assert model.training
    for sentence, expected in zip(SENTENCES, together, strict=True):
        torch.testing.assert_close(model.emissions(model.encode([sentence]))[0], expected)


def test_a_teachers_emissions_are_computed_once(tiny, monkeypatch):
    teacher = tagger(tiny)
    data = teacher.encode(SENTENCES)
    first = targets.with_teacher(data, SENTENCES, Taught(teacher))
    for own, expected in zip(first.teacher, teacher.emissions(data), strict=True):
        assert own.equal(expected)
    monkeypatch.setattr(Tagger, "emissions", lambda *_: pytest.fail("computed again"))
    again = targets.with_teacher(data, SENTENCES, Taught(teacher))
    assert all(a.equal(b) for a, b in zip(first.teacher, again.teacher, strict=True))
    batch = again.collate([2, 1])
    assert batch.teacher.shape == (2, 9, 5) and (batch.teacher[1, 1:] == 0).all()
    monkeypatch.undo()
    other = tagger(tiny, seed=1)
    assert (
        not targets.with_teacher(data, SENTENCES, Taught(other)).teacher[0].equal(first.teacher[0])
    )


def test_a_teacher_with_other_labels_is_refused(tiny):
    torch.manual_seed(0)
    teacher = Tagger(tiny.encoder, tiny.tokenizer, ["O", "B-X", "I-X"])
    with pytest.raises(ValueError, match="expected a teacher with the labels"):
        targets.with_teacher(tagger(tiny).encode(SENTENCES), SENTENCES, Taught(teacher))
