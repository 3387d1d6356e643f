import pytest

from kdlib.ship import peers


@pytest.mark.long
def test_teacher_student_and_spacy_stand_in_one_table(monkeypatch):
    monkeypatch.setattr(peers, "CORPORA", {"demo": (60, 300, 20, 4)})
    table = peers.shipped("demo", minutes=0.02, steps=20, seconds=0.1)
    assert list(table["model"]) == [
        "MiniLM-CRF, the teacher, torch",
        "the teacher, ONNX",
        "the teacher, ONNX int8",
        "BiLSTM-CRF student, ONNX int8",
        "spaCy CNN",
        "spaCy CNN",
    ]
    assert table["f1"].between(0, 100).all() and (table["p50_ms, batch 1"] > 0).all()
    assert table["ratio"].iloc[0] == 1 and (table["disk_mb"] > 1).all()


def test_spacys_answers_are_spans_over_the_words_given():
    import spacy

    from kdlib.text.tags import Sentence, Span

    nlp = spacy.blank("en")
    nlp.add_pipe("entity_ruler").add_patterns([{"label": "LOC", "pattern": "New York"}])
    sentences = [Sentence(("in", "New", "York", "."), ()), Sentence(("no", "one"), ())]
    assert peers._of_spacy(nlp, sentences) == [(Span(1, 3, "LOC"),), ()]
