from dataclasses import replace
from functools import partial

import pytest
from conftest import SENTENCES, tagger
from transformers import BertConfig, BertForTokenClassification, BertTokenizerFast
from typer.testing import CliRunner

import kdlib
from kdlib.__main__ import app
from kdlib.lab import train
from kdlib.ship import distil, runtime
from kdlib.ship.distil import Gate, Kept, pieces_of, teacher_of
from kdlib.students import Thin, Twin
from kdlib.teachers import gliner
from kdlib.text.readers import write_json_lines
from kdlib.text.tags import Sentence, Span
from kdlib.twin_tower import TwinTower

ANY = Gate(agreement=0, recall=0)


@pytest.fixture
def small(monkeypatch):
    """A student no wider than the tiny encoder's table, and no time for the clock."""
    kinds = {"bilstm": Kept(embedding=8, hidden=6), "thin": Thin(2e-3, 2, 8, 12, 6)}
    kinds["twin"] = Twin(embedding=8)
    monkeypatch.setattr(distil, "KINDS", kinds)

    def in_turns(calls, inputs, seconds):
        for call in calls.values():
            call(0)
        return {name: [1.0, 2.0] for name in calls}

    monkeypatch.setattr(distil.timing, "in_turns", in_turns)


@pytest.fixture
def own(tiny, tiny_folder, tmp_path, small):
    """A teacher's folder, a text, and what `distil` needs to know beside."""
    tagger(tiny).save_pretrained(tmp_path / "teacher")
    lines = [f"{' '.join(s.tokens)} {chr(97 + i % 26)} {i}" for i, s in enumerate(SENTENCES * 16)]
    (tmp_path / "my.txt").write_text("\n".join(lines) + "\n")
    said = []
    run = partial(
        distil.distil,
        str(tmp_path / "teacher"),
        tmp_path / "student",
        tmp_path / "my.txt",
        minutes=0.01,
        encoder=tiny_folder,
        say=said.append,
    )
    return run, tmp_path, said


def labelled(count):
    """Different labelled sentences."""
    return [Sentence((*s.tokens, str(i)), s.spans) for i, s in enumerate(SENTENCES * 16)][:count]


def test_a_student_of_ones_own_says_what_its_card_says(own):
    run, folder, said = own
    write_json_lines(folder / "gold.jsonl", labelled(30))
    card = run(gold=folder / "gold.jsonl", gate=ANY)
    assert card["passed"] and card["types"] == ["LOC", "PER"] and card["gold sentences"] == 20
    student = runtime.load(folder / "student")
    assert student.thresholds == pytest.approx(card["thresholds"])
    readme = (folder / "student" / "README.md").read_text()
    assert f"F1 {card['agreement']:.1f}" in readme and "passed its gate" in readme
    assert set(card["gold"]) == {"student", "teacher"} and "| all |" in readme
    assert not any(text in readme for text in card["disagreements"])
    assert any("held out" in line for line in said)


def test_started_again_it_goes_on_with_what_is_there(own, monkeypatch):
    run, _, _ = own
    first = run(gate=ANY)
    monkeypatch.setattr(train, "fit", lambda *a, **k: pytest.fail("trained again"))
    again = run(gate=ANY)
    assert {k: again[k] for k in ("agreement", "updates")} == {
        k: first[k] for k in ("agreement", "updates")
    }


def test_a_twin_tower_is_shipped_and_can_be_asked_for_other_labels(own):
    run, folder, _ = own
    card = run(student="twin", gate=ANY)
    student = runtime.load(folder / "student")
    assert isinstance(student, runtime.TwinTower) and student.labels == ["LOC", "PER"]
    assert student.thresholds == pytest.approx(card["thresholds"])
    assert card["method"] == "soft targets distillation"
    (found,) = student.inference(["Anna lives in Paris ."], ["a city"], threshold=0)
    assert found == [
        {"start": 0, "end": 21, "text": "Anna lives in Paris .", "label": "a city"}
        | {"score": found[0]["score"]}
    ]


@pytest.mark.parametrize(("kind", "least"), [("twin", 0.5), ("bilstm", 0.0)])
def test_a_type_that_dev_lacks_keeps_its_default_threshold(tiny, tmp_path, kind, least):
    model = TwinTower(tiny.tokenizer, 8, 6) if kind == "twin" else tagger(tiny)
    dev = [Sentence(s.tokens, ()) for s in SENTENCES]
    found = distil.choose_thresholds(model.eval(), ["LOC", "PER"], dev, tmp_path / "s")
    assert found["PER"] == pytest.approx(least)


def test_a_student_that_fails_the_gate_is_set_aside(own):
    run, folder, _ = own
    card = run(gate=Gate(agreement=100.1, recall=0))
    assert not card["passed"] and "agreement F1" in card["failed"][0]
    assert not (folder / "student").exists()
    assert "failed its gate" in (folder / "student.rejected" / "README.md").read_text()


def test_labels_alone_are_learnt_as_they_are(tiny_folder, tmp_path, small):
    write_json_lines(tmp_path / "spans.jsonl", labelled(240))
    said, out = [], tmp_path / "student"
    card = distil.distil(
        str(tmp_path / "spans.jsonl"),
        out,
        minutes=0.01,
        gate=ANY,
        encoder=tiny_folder,
        say=said.append,
    )
    assert "pseudo-labels" in card["method"] and set(card["speed"]) == {"student"}
    assert runtime.load(out).labels == ["LOC", "PER"]


def test_a_gliner_and_a_hugging_face_classifier_teach_too(own, tiny_folder, long_folder):
    _, folder, _ = own
    asked = [("person", "location")] * 16
    recipe = gliner.Recipe(steps=2, batch_size=4, hidden=16)
    sentences = [replace(s, spans=()) for s in SENTENCES]
    model = gliner.train(sentences, asked, recipe, long_folder)
    model.save_pretrained(folder / "gliner", safe_serialization=True)
    named = {"text": folder / "my.txt", "minutes": 0.01, "gate": ANY, "encoder": tiny_folder}
    card = distil.distil(
        str(folder / "gliner"), folder / "a", labels=["person", "location"], **named
    )
    assert card["types"] == ["location", "person"] and set(card["speed"]) == {"student", "teacher"}
    config = BertConfig(
        vocab_size=70,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        id2label=dict(enumerate(["O", "B-DOG", "I-DOG"])),
    )
    BertForTokenClassification(config).save_pretrained(folder / "bert")
    BertTokenizerFast.from_pretrained(tiny_folder).save_pretrained(folder / "bert")
    card = distil.distil(str(folder / "bert"), folder / "b", student="thin", **named)
    assert card["types"] == ["DOG"] and runtime.load(folder / "b").labels == ["DOG"]


def test_bad_lines_stop_it_or_are_left_out_and_named(own):
    run, folder, said = own
    lines = [
        f"{tag}\t{word}" for s in labelled(9) for word, tag in (*zip(s.tokens, s.tags), ("", ""))
    ]
    file = folder / "gold.conll"
    file.write_text("\n".join(line.strip("\t") for line in lines) + "\n\nO\n")
    with pytest.raises(ValueError, match=r"gold.conll:\d+: expected 2 columns"):
        run(gold=file, columns=["tag", "word"], gate=ANY)
    card = run(gold=file, columns=["tag", "word"], skip_bad=True, gate=ANY)
    assert card["gold sentences"] == 6
    assert next(line for line in said if line.startswith("left out")).endswith("got 'O'")


def test_a_spacy_pipeline_teaches_what_it_says(own, tiny_folder):
    spacy = pytest.importorskip("spacy")
    _, folder, _ = own
    nlp = spacy.blank("en")
    nlp.add_pipe("entity_ruler").add_patterns([{"label": "CITY", "pattern": "Paris"}])
    nlp.to_disk(folder / "spacy")
    card = distil.distil(
        str(folder / "spacy"),
        folder / "s",
        folder / "my.txt",
        minutes=0.01,
        gate=ANY,
        encoder=tiny_folder,
        say=lambda line: None,
    )
    assert card["types"] == ["CITY"] and "pseudo-labels" in card["method"]
    assert set(card["speed"]) == {"student", "teacher"}


def test_it_is_kdlibs_one_function():
    assert kdlib.distil is distil.distil
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = kdlib.other


def test_the_gate_asks_for_recall_where_there_is_enough_to_tell():
    card = {"agreement": 95.0, "recall": {"A": 50.0, "B": 50.0}, "found": {"A": 20, "B": 19}}
    assert distil.failures(card, Gate()) == ["recall of A 50.0, expected 80 or more"]


def test_a_sentence_in_words_keeps_its_entities():
    s = Sentence(("the", "U.S.", "Bank", "in", "St.-Denis"), (Span(1, 3, "ORG"), Span(4, 5, "LOC")))
    found = distil.in_words(s)
    assert found.tokens == ("the", "U", ".", "S", ".", "Bank", "in", "St", ".", "-", "Denis")
    assert found.spans == (Span(1, 6, "ORG"), Span(7, 11, "LOC"))


def test_entities_take_whole_words_and_of_two_on_one_the_longer():
    words = distil.token_places(("in", "Paris-London", "today"))
    cut = [{"start": 4, "end": 6, "label": "A"}, {"start": 9, "end": 20, "label": "B"}]
    assert distil.over_words(words, cut) == (Span(1, 3, "B"),)
    assert distil.over_words(words, cut[:1]) == (Span(1, 2, "A"),)
    assert distil.over_words(words, [{"start": 90, "end": 91, "label": "A"}]) == ()
    odd = Sentence(("in", " Paris", "\u3000"), (Span(1, 2, "LOC"),))
    assert distil.in_words(odd) == Sentence(("in", "Paris"), (Span(1, 2, "LOC"),))


def test_nothing_is_learnt_twice_or_tested_on_what_was_learnt(own):
    run, folder, _ = own
    write_json_lines(folder / "same.jsonl", labelled(1) * 300)
    with pytest.raises(ValueError, match="at least 200 different pieces, got 1"):
        distil.distil(str(folder / "same.jsonl"), folder / "s")
    both = [Sentence(s.tokens, s.spans) for s in labelled(30)]
    write_json_lines(folder / "gold.jsonl", both)
    with (folder / "my.txt").open("a") as text:
        text.write("\n".join(" ".join(s.tokens) for s in both))
    assert run(gold=folder / "gold.jsonl", gate=ANY)["pieces of text"] < 256


def test_a_place_that_is_taken_is_told_before_anything_is_trained(own, monkeypatch):
    run, folder, _ = own
    monkeypatch.setattr(train, "fit", lambda *a, **k: pytest.fail("trained"))
    (folder / "student").mkdir()
    (folder / "student" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="student: expected a new folder or an earlier"):
        run(gate=ANY)


def test_text_is_lines_folders_or_sentences_and_comes_once(tmp_path):
    (tmp_path / "a.txt").write_text("One two.\nOne two.\n\nThree\r\n")
    (tmp_path / "b.txt").write_text("word " * 100)
    found = pieces_of(tmp_path)
    assert [s.tokens for s in found[:2]] == [("One", "two", "."), ("Three",)]
    assert [len(s.tokens) for s in found[2:]] == [80, 20]
    write_json_lines(tmp_path / "c.jsonl", labelled(2))
    assert pieces_of(tmp_path / "c.jsonl")[0].spans is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected at least 200 different pieces, got 0"),
        (b"one line\n" * 500, "expected at least 200 different pieces, got 1"),
        (b"a\0b\n", "got a file with NUL bytes"),
        (b"\xff\xfe\n", "expected text in UTF-8"),
    ],
)
def test_bad_text_is_one_clear_error(own, content, message):
    run, folder, _ = own
    (folder / "my.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        run()
    assert not (folder / "student").exists()


def test_what_does_not_fit_is_told_before_anything_is_trained(own, monkeypatch):
    run, folder, _ = own
    monkeypatch.setattr(train, "fit", lambda *a, **k: pytest.fail("trained"))
    other = [Sentence(("Rex", "barks"), (Span(0, 1, "DOG"),))] * 3
    write_json_lines(folder / "gold.jsonl", other)
    with pytest.raises(ValueError, match=r"expected the teacher's types \['LOC', 'PER'\], got"):
        run(gold=folder / "gold.jsonl")
    with pytest.raises(ValueError, match=r"student: expected one of \['bilstm', 'thin', 'twin'\]"):
        run(student="huge")
    with pytest.raises(ValueError, match="minutes: expected more than 0"):
        run(minutes=0)
    with pytest.raises(ValueError, match=r"labels: expected none, or the teacher's own"):
        teacher_of(str(folder / "teacher"), ["dog"])
    (folder / "g").mkdir()
    (folder / "g" / "gliner_config.json").write_text("{}")
    for wrong in ([], [f"type {i}" for i in range(1000)]):
        with pytest.raises(ValueError, match=f"labels: expected 1 to 40 .*, got {len(wrong)}"):
            teacher_of(str(folder / "g"), wrong)
    with pytest.raises(FileNotFoundError, match="text: expected a file or a folder"):
        pieces_of(folder / "nowhere")


def test_the_command_says_what_is_wrong_and_exits_by_the_gate(own, tiny_folder):
    _, folder, _ = own

    def command(*more):
        given = ["--teacher", str(folder / "teacher"), "--out", str(folder / "s"), *more]
        given += ["--text", str(folder / "my.txt"), "--encoder", tiny_folder, "--minutes", "0.01"]
        return CliRunner().invoke(app, ["distil", *given], env={"COLUMNS": "200"})

    done = command("--at-least", "0", "0")
    assert done.exit_code == 0 and "A distilled tagger" in done.stdout
    assert command("--at-least", "100.1", "0").exit_code == 1
    wrong = command("--labels", "dog")
    assert wrong.exit_code == 2 and "labels: expected none" in wrong.stderr
