from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import SENTENCES

from kdlib import gliner_teacher, train
from kdlib import open_experiments as oe
from kdlib.data import Dataset, Sentence
from kdlib.gliner_teacher import Answer
from kdlib.labels import Span

WORDS = [Sentence((*s.tokens, str(i)), s.spans) for i, s in enumerate(SENTENCES)]  # no sentence twice
SET = Dataset("toy", WORDS[:12], WORDS[12:13], WORDS[13:])


@pytest.fixture
def protocol(tiny_folder):
    return oe.OpenProtocol(encoder=tiny_folder, labelled=6, teaching=2, student_steps=6, epochs=2, batch_size=4)


@pytest.fixture
def parts(protocol):
    return oe.divide(SET, protocol)


def wise(parts, sure=0.9):
    """A teacher that knows gold."""
    answers = {}
    for s in (*parts.labelled, *parts.transfer, *parts.dev, *parts.test):
        asked = parts.asked(s)
        scores = torch.full((len(s.tokens), len(asked)), 0.01)
        for start, end, kind in s.spans:
            scores[start:end, asked.index(kind)] = sure
        answers[s.tokens] = Answer(asked, s.spans, scores, None)
    return oe.Answers(answers)


def test_types_become_words_and_parts_keep_the_order_of_the_file(parts):
    assert parts.types == ["location", "person"]
    assert [len(p) for p in (parts.labelled, parts.teaching, parts.transfer, parts.dev, parts.test)] == [6, 2, 4, 1, 3]
    assert [s.tokens for s in parts.labelled] == [s.tokens for s in WORDS[:6]]
    assert [s.tokens for s in parts.transfer] == [s.tokens for s in WORDS[8:12]]
    assert parts.labelled[0].spans == (Span(0, 1, "person"), Span(3, 4, "location"))
    assert oe.divide(SET, oe.OpenProtocol(labelled=3, transfer=2, test=1)).test == parts.test[-1:]
    for broken in (
        Dataset("x", WORDS, [], WORDS),
        Dataset("x", WORDS, WORDS, []),
        Dataset("x", [Sentence(("a",), ())], WORDS[3:4], WORDS[3:4]),
    ):
        with pytest.raises(ValueError, match="x: expected entities, dev and test sentences"):
            oe.divide(broken, oe.OpenProtocol(labelled=1))
    with pytest.raises(ValueError, match="sizes of 0 or more"):
        oe.divide(SET, oe.OpenProtocol(labelled=1, test=-1))
    assert oe.divide(SET, oe.OpenProtocol(labelled=8, teaching=4)).transfer == []
    for labelled, teaching, transfer in ((13, 0, 0), (0, 1, 0), (8, 1, 4), (8, -1, 1)):
        with pytest.raises(ValueError, match="expected labelled, teaching and transfer sentences out of 12"):
            oe.divide(SET, oe.OpenProtocol(labelled=labelled, teaching=teaching, transfer=transfer))


def test_with_many_types_a_sentence_is_asked_for_its_own_and_as_many_others(parts):
    assert {parts.asked(s) for s in parts.test} == {("location", "person")}
    types = [f"type {i}" for i in range(50)]
    many = replace(parts, types=types, mentions=types)
    sentence = Sentence(("a", "b", "c"), (Span(0, 1, "type 3"), Span(1, 2, "type 9")))
    asked = many.asked(sentence)
    assert {"type 3", "type 9"} <= set(asked) and len(asked) == len(set(asked)) == 6
    assert many.asked(sentence) == asked and asked != many.asked(replace(sentence, tokens=("x", "y", "z")))
    assert len(many.asked(sentence.without_labels())) == 8
    few = replace(many, mentions=["type 1", "type 1"])
    assert sorted(few.asked(sentence)) == ["type 1", "type 3", "type 9"] and few.asked(sentence.without_labels()) == ("type 1",)
    assert replace(many, mentions=[]).asked(sentence.without_labels()) == ()


def test_both_students_learn_and_a_second_call_reads_them_back(parts, protocol, monkeypatch):
    answers = wise(parts)
    longer = replace(protocol, student_steps=60)
    runs = [oe.run(model, 0, longer, parts, answers, size) for model, size in (("hard student", 6), ("distilled student", 10))]
    for found, model in runs:
        assert found.history[-1]["loss"] < found.history[0]["loss"] and len(found.history) == 2
        assert found.history[-1]["last_gold_recall"] == found.history[-1]["last_teacher_recall"] >= 80
        assert not model.training and found.parameters == model.parameters_in_all
    monkeypatch.setattr(train, "fit", lambda *a, **k: pytest.fail("trained again"))
    again, model = oe.run("distilled student", 0, longer, parts, answers, 10)
    assert again == runs[1][0]
    assert all(a.equal(b) for a, b in zip(model.state_dict().values(), runs[1][1].state_dict().values(), strict=True))


def test_gold_labels_of_the_transfer_part_reach_no_student(parts, protocol):
    spoilt = replace(parts, transfer=[replace(s, spans=()) for s in parts.transfer])
    answers = wise(parts)
    first, again = (oe.run("distilled student", 0, protocol, p, answers, 10)[1] for p in (parts, spoilt))
    assert all(a.equal(b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))


def test_the_question_to_the_teacher_does_not_show_the_gold_labels_of_the_transfer_part(parts, monkeypatch):
    types = [f"type {i}" for i in range(60)]
    renamed = [Sentence((*"abc", str(i)), (Span(0, 1, types[i]),)) for i in range(60)]
    many = replace(
        parts, labelled=renamed[:30], transfer=renamed[30:50], dev=renamed[50:55], test=renamed[55:], types=types, mentions=types
    )
    spoilt = replace(many, transfer=[replace(s, spans=()) for s in many.transfer])
    asked = []
    monkeypatch.setattr(gliner_teacher, "answers", lambda model, sentences, labels: asked.append(labels) or [None] * len(labels))
    oe.ask(None, many)
    oe.ask(None, spoilt)
    assert asked[0] == asked[1] and all(types[55 + i] in asked[0][55 + i] for i in range(5))


def test_with_alpha_0_a_distilled_student_sees_no_gold_label_at_all(parts, protocol):
    answers, none = wise(parts), replace(protocol, alpha=0.0)
    spoilt = replace(parts, labelled=[replace(s, spans=()) for s in parts.labelled])
    first, again = (oe.run("distilled student", 0, none, p, answers, 6)[0].history for p in (parts, spoilt))
    assert [h["loss"] for h in first] == [h["loss"] for h in again]


def test_a_teacher_that_knows_nothing_teaches_nothing(parts, protocol):
    blank = oe.Answers({t: replace(a, entities=(), covering=torch.zeros_like(a.covering)) for t, a in wise(parts).of.items()})
    found, _ = oe.run("distilled student", 0, replace(protocol, alpha=0.0, student_steps=60), parts, blank, 10)
    assert not any(found.predicted)


def test_what_cannot_be_run_is_an_error(parts, protocol):
    for model, size in (("hard student", 7), ("distilled student", 11), ("distilled student", 0), ("soft student", 3)):
        with pytest.raises(ValueError, match="expected a model and at most so many sentences"):
            oe.run(model, 0, protocol, parts, wise(parts), size)
    with pytest.raises(ValueError, match="reading: expected one of"):
        replace(protocol, reading="words")
    with pytest.raises(ValueError, match="expected 'spans' for a teacher that scores no words"):
        oe.run("distilled student", 0, replace(protocol, reading="tokens"), parts, wise(parts), 6)


def test_the_tables_hold_both_references(parts, protocol):
    answers = wise(parts)
    answers.of[parts.test[0].tokens] = replace(answers.of[parts.test[0].tokens], entities=())  # a mistake of the teacher's
    runs = [oe.run("hard student", seed, protocol, parts, answers, 6)[0] for seed in (0, 1)]
    runs += [oe.run("distilled student", seed, protocol, parts, answers, 6)[0] for seed in (0, 1)]
    for table in (oe.table(runs, parts, answers, 99), oe.paper_table(runs, parts, answers, 99)):
        assert list(table.columns[:8]) == [
            "model",
            "seed",
            "reference",
            "accuracy",
            "precision",
            "recall",
            "f1",
            "span_precision",
        ]
        assert len(table) == 2 * 5 and set(table["model"]) == {"teacher", "hard student", "distilled student"}
        own = table[(table["model"] == "teacher") & (table["reference"] == "teacher")].iloc[0]
        assert own["accuracy"] == own["recall"] == own["span_f1"] == 100 and own["parameters"] == 99
        gold = table[(table["model"] == "teacher") & (table["reference"] == "gold")].iloc[0]
        assert gold["recall"] < 100 and gold["precision"] == 100
    compared = oe.compare(runs, parts, answers)
    assert set(compared["reference"]) == {"gold", "teacher"} and set(compared["method"]) == {"distilled student"}
    assert len(oe.histories(runs)) == 8 and isinstance(oe.histories(runs), pd.DataFrame)


def test_unseen_types_are_those_of_another_set_alone():
    other = Dataset("x", [], [], [Sentence(("a", "b"), (Span(0, 1, "person"), Span(1, 2, "Dog Breed"))), Sentence(("c",), ())])
    sentences, types = oe.unseen_types(other, ["person"])
    assert types == ["dog breed"] and sentences == [Sentence(("a", "b"), (Span(1, 2, "dog breed"),))]


def test_a_real_gliner_teaches_from_a_folder(parts, protocol, long_folder, tmp_path):
    tiny = gliner_teacher.Recipe(steps=1, batch_size=2, hidden=16)
    trained = oe.teacher_of(replace(protocol, recipe=tiny, encoder=long_folder), parts)
    trained.save_pretrained(tmp_path / "gliner")
    loaded = oe.teacher_of(replace(protocol, teacher=str(tmp_path / "gliner")), parts)
    answers = oe.ask(loaded, parts)
    assert set(answers.of) == {s.tokens for s in (*parts.labelled, *parts.transfer, *parts.dev, *parts.test)}
    for reading in gliner_teacher.READINGS:
        found, _ = oe.run("distilled student", 0, replace(protocol, reading=reading), parts, answers, 10)
        assert len(found.predicted) == len(parts.test)
