import pytest
import torch
from conftest import SENTENCES, tagger

from kdlib.lab import targets
from kdlib.models import Tagger
from kdlib.students import encoders
from kdlib.teachers.tagger import Taught
from kdlib.text.tags import to_iob2


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


def test_predictions_are_legal_and_one_a_sentence(tiny):
    predicted = tagger(tiny).predict(SENTENCES)
    assert len(predicted) == len(SENTENCES)
    for spans, sentence in zip(predicted, SENTENCES, strict=True):
        to_iob2(spans, len(sentence.tokens))


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
