import functools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import SENTENCES

from kdlib import backbones, cache, data, experiments, losses, reports, train
from kdlib.data import Dataset, Sentence
from kdlib.experiments import METHODS, Protocol
from kdlib.labels import Span
from kdlib.surrogates import surrogate_labels

CORPUS = Dataset("tiny", list(SENTENCES), list(SENTENCES[:8]), list(SENTENCES[:8]))


@pytest.fixture
def protocol(tiny_folder, monkeypatch):
    monkeypatch.setattr(backbones, "lstm", functools.partial(backbones.lstm, embedding=8, hidden=6))  # the table is 16 wide
    return Protocol("tiny", tiny_folder, labelled=6, transfer=8, teacher_steps=5, student_steps=5, batch_size=4)


@pytest.fixture
def parts(protocol):
    return experiments.divide(CORPUS, protocol)


def test_the_parts_do_not_overlap_and_transfer_has_no_labels(protocol, parts):
    assert len(parts.labelled) == 6 and len(parts.transfer) == 8
    assert all(s.spans is None for s in parts.transfer) and all(s.spans is not None for s in parts.labelled)
    taken, there = (Counter(s.tokens for s in sentences) for sentences in (parts.labelled + parts.transfer_gold, CORPUS.train))
    assert taken <= there  # no sentence is in both parts
    assert experiments.divide(CORPUS, protocol) == parts
    for wrong in ({"labelled": 17}, {"transfer": 11}):
        with pytest.raises(ValueError, match="expected at most 16 labelled"):
            experiments.divide(CORPUS, replace(protocol, **wrong))


def test_noise_spoils_the_share_it_claims_of_training_alone():
    gold = Sentence(("a", "b", "c"), (Span(0, 1, "X"), Span(1, 3, "Y")))
    parts = data.Parts(["X", "Y"], [gold] * 1000, [gold] * 1000, [gold], [gold])
    noisy = experiments.with_noise(parts, 0.3, clean=100)
    assert noisy.labelled[900:] == [gold] * 100 and (noisy.dev, noisy.test) == (parts.dev, parts.test)
    spans = [s for sentences in (noisy.labelled[:900], noisy.transfer_gold) for x in sentences for s in x.spans]
    kept = sum(s in gold.spans for s in spans) / 3800
    assert abs(kept - 0.7) < 0.02 and abs(len(spans) / 3800 - 0.85) < 0.02  # half of the mislabelled are missed
    assert experiments.with_noise(parts, 0.3, clean=100) == noisy and experiments.with_noise(parts, 0.0) == parts
    only = replace(parts, types=["Y"], transfer_gold=[], labelled=[Sentence(("a",), (Span(0, 1, "Y"),))] * 9)
    assert {s.spans for s in experiments.with_noise(only, 1.0).labelled} == {()}  # where there is no other type, missed
    with pytest.raises(ValueError, match="noise: expected a share"):
        experiments.with_noise(parts, 1.5)


def test_unknown_choices_are_refused(protocol, parts):
    with pytest.raises(ValueError, match="teacher_sees: expected one of"):
        replace(protocol, teacher_sees="everything")
    with pytest.raises(ValueError, match="student: expected one of"):
        replace(protocol, student="gru")
    for wrong in (
        {"k": 0},
        {"k": 2.5},
        {"temperature": torch.inf},
        {"labelled": -1},
        {"student_steps": 0},
        {"weight_temperature": 0.0},
        {"alpha": 1.5},
        {"temperature": -1.0},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
            replace(protocol, **wrong)
    with pytest.raises(ValueError, match="method: expected one of"):
        experiments.run("magic", 0, protocol, parts)


# What NUMBERS = 1 means: the first loss and the last of a few steps. If a change to kdlib moves these, raise NUMBERS and renew them,
# for then every committed table was made by other code.
GOLDEN = {
    "transformer": {
        "teacher": [15.712, 13.6331],
        "student alone": [10.6864, 9.3111],
        "top-k": [9.2599, 4.3635],
        "posterior": [3.533, 1.4316],
        "structural": [3.387, 1.3559],
        "multi-grained": [7.476, 3.3856],
        "decoupled k-best": [2.5616, 0.9057],
        "msd": [5.8457, 2.1744],
    },
    "bilstm": {
        "teacher": [15.712, 13.6331],
        "student alone": [11.171, 10.4349],
        "top-k": [8.7125, 3.7633],
        "posterior": [3.0897, 1.3402],
        "structural": [3.0365, 1.3296],
        "multi-grained": [6.9688, 2.9606],
        "path set": [8.1498, 3.2058],
        "msd": [4.6596, 2.9106],
    },
}


@pytest.mark.parametrize("student", GOLDEN)
def test_numbers_are_those_of_this_version(protocol, parts, student):
    assert experiments.NUMBERS == 1
    protocol = replace(protocol, student=student, quiz=2, meta=experiments.Meta(rate=0.5, every=2))
    found = {m: [round(r["loss"], 4) for r in experiments.run(m, 0, protocol, parts).history[::4]] for m in GOLDEN[student]}
    for method, expected in GOLDEN[student].items():
        assert found[method] == pytest.approx(expected, rel=2e-3), (method, found[method])
    assert found.keys() >= set(METHODS)


def test_a_run_is_remembered_and_a_change_is_another_run(protocol, parts, monkeypatch):
    first = experiments.run("posterior", 0, protocol, parts)
    fits = []
    fit = train.fit
    monkeypatch.setattr(train, "fit", lambda *a, **k: fits.append(1) or fit(*a, **k))
    assert experiments.run("posterior", 0, protocol, parts) == first and not fits
    for other in (replace(protocol, alpha=0.2), replace(protocol, temperature=2.0), replace(protocol, student_steps=4)):
        experiments.run("posterior", 0, other, parts)
    experiments.run("posterior", 1, replace(protocol, one_teacher=True), parts)
    assert len(fits) == 4
    monkeypatch.setattr(experiments, "NUMBERS", 2)
    experiments.run("student alone", 0, protocol, parts)
    assert len(fits) == 5
    assert not list((cache.folder() / "checkpoints").glob("*.pt"))


def test_a_teacher_whose_weights_were_lost_is_trained_again(protocol, parts):
    weights = experiments.trained_teacher(protocol, parts, 0)[0].state_dict()
    for file in (cache.folder() / "weights").glob("*.pt"):
        file.unlink()
    again = experiments.trained_teacher(protocol, parts, 0)[0].state_dict()
    assert all(weights[name].equal(again[name]) for name in weights)


def test_text_without_labels_teaches_no_teacher(protocol, parts):
    text = replace(parts, transfer_gold=parts.transfer)
    sees_all = experiments.trained_teacher(replace(protocol, teacher_sees="all"), text, 0)[0]
    assert sees_all.output.weight.equal(experiments.trained_teacher(protocol, text, 0)[0].output.weight)


def test_one_teacher_serves_every_seed(protocol, parts):
    shared = replace(protocol, one_teacher=True)
    weights = [experiments.trained_teacher(shared, parts, seed)[0].output.weight for seed in (0, 1)]
    assert weights[0].equal(weights[1])
    assert not experiments.trained_teacher(protocol, parts, 1)[0].output.weight.equal(weights[0])
    rows = reports.table(experiments.runs(["teacher", "student alone"], [0, 1], shared, parts), parts)
    assert list(zip(rows["method"], rows["seed"], strict=True)) == [("teacher", 0), ("student alone", 0), ("student alone", 1)]


def test_transfer_sentences_add_no_gold_term(protocol, parts):
    """Eq. 6 on a batch without labels is (1 - alpha) times the distillation loss; with alpha = 0, gold labels do not matter."""
    teacher, _ = experiments.trained_teacher(protocol, parts, 0)
    student = experiments.new_student(protocol, parts, 0).eval()
    text = parts.labelled + parts.transfer
    seen = experiments.teachers.with_teacher(student.encode(text), text, teacher)
    batch = seen.collate([0, 7, 8])
    assert batch.labelled.tolist() == [True, False, False]
    emissions = student(batch)
    distilled = losses.posterior(student.crf, emissions, teacher.crf, batch.teacher, batch.mask)
    gold = losses.crf_nll(student.crf, emissions[:1], batch.tags[:1], batch.mask[:1]) / 3
    for alpha in (0.0, 0.3):
        found = experiments.objective("posterior", teacher, replace(protocol, alpha=alpha))(student, emissions, batch, 0.0)
        torch.testing.assert_close(found, alpha * gold + (1 - alpha) * distilled)
    batch = seen.collate([7, 8])
    only = experiments.objective("posterior", teacher, protocol)(student, student(batch), batch, 0.0)
    expected = losses.posterior(student.crf, student(batch), teacher.crf, batch.teacher, batch.mask) / 2
    torch.testing.assert_close(only, expected)


@pytest.mark.parametrize(("grain", "neighbour"), [("sequence", "weighted top-k"), ("token", "posterior")])
def test_one_grain_alone_is_a_known_method(protocol, parts, grain, neighbour):
    losses_of = [[r["loss"] for r in experiments.run(m, 0, protocol, parts).history] for m in (grain, neighbour)]
    assert losses_of[0] == pytest.approx(losses_of[1], rel=1e-5)


def test_surrogates_are_those_of_the_teachers_paths_and_are_kept(protocol, parts, monkeypatch):
    teacher, _ = experiments.trained_teacher(protocol, parts, 0)
    text = parts.labelled + parts.transfer
    seen = experiments.teachers.with_teacher(teacher.encode(text), text, teacher)
    found = experiments.teachers.with_surrogates(seen, teacher, 3, 2.0)
    batch = found.collate([0, 1, 9])
    expected = surrogate_labels(teacher.crf, batch.teacher, batch.mask, 3, 2.0)
    for name, value in batch.surrogates._asdict().items():
        torch.testing.assert_close(value, getattr(expected, name))
    assert batch.to("cpu").surrogates.allowed.dtype == torch.bool
    monkeypatch.setattr(experiments.teachers, "surrogate_labels", None)
    again = experiments.teachers.with_surrogates(seen, teacher, 3, 2.0)
    assert all(a.unary.equal(b.unary) for a, b in zip(again.surrogates, found.surrogates, strict=True))
    with pytest.raises(TypeError):
        experiments.teachers.with_surrogates(seen, teacher, 4, 2.0)  # other surrogates are made anew


def test_only_the_knobs_a_loss_reads_make_another_run(protocol, parts, monkeypatch):
    experiments.run("posterior", 0, protocol, parts)
    experiments.run("multi-grained", 0, protocol, parts)
    monkeypatch.setattr(train, "fit", None)
    experiments.run("posterior", 0, replace(protocol, k=7, weight_temperature=2.0), parts)
    experiments.GRAINS["multi-grained"], kept = (0.5, 0.2, 0.3), experiments.GRAINS["multi-grained"]
    with pytest.raises(TypeError):
        experiments.run("multi-grained", 0, protocol, parts)
    experiments.GRAINS["multi-grained"] = kept
    for other in ({"k": 2}, {"weight_temperature": 2.0}, {"temperature": 2.0}, {"alpha": 0.1}):
        with pytest.raises(TypeError):
            experiments.run("multi-grained", 0, replace(protocol, **other), parts)


def test_a_sentence_longer_than_the_teachers_window_is_read_by_both(protocol, parts):
    long = Sentence(("anna", "lives", "in", "paris") * 10)
    longer = replace(parts, transfer_gold=[*parts.transfer_gold, long])
    teacher, _ = experiments.trained_teacher(protocol, longer, 0)
    student = experiments.new_student(replace(protocol, student="bilstm"), longer, 0)
    seen = experiments.teachers.with_teacher(student.encode([long]), [long], teacher)
    assert seen.teacher[0].equal(teacher.emissions(teacher.encode([long]))[0]) and len(seen.teacher[0]) == 40
    assert len(seen.windows[0]) == 1 < len(teacher.encode([long]).windows[0])
    with pytest.raises(ValueError, match="expected the data's own 1 sentences, got 1 of other lengths"):
        experiments.teachers.with_teacher(student.encode([long]), parts.labelled[:1], teacher)


def test_surrogates_belong_to_their_teacher(protocol, parts):
    teacher, _ = experiments.trained_teacher(protocol, parts, 0)
    data = teacher.encode(parts.labelled)
    with pytest.raises(ValueError, match="expected sentences with their teacher's emissions"):
        experiments.teachers.with_surrogates(data, teacher, 2)
    seen = experiments.teachers.with_surrogates(experiments.teachers.with_teacher(data, parts.labelled, teacher), teacher, 2)
    assert experiments.teachers.with_teacher(seen, parts.labelled, teacher).surrogates is None


def test_characters_need_no_pretrained_encoder(protocol, parts):
    characters = replace(protocol, encoder="characters", student="bilstm")
    teacher = experiments.trained_teacher(characters, parts, 0)[0]
    student = experiments.new_student(characters, parts, 0)
    assert student.parameters_in_all < teacher.parameters_in_all / 5
    assert teacher.tokenizer.get_vocab() == student.tokenizer.get_vocab()
    assert experiments.run("multi-grained", 0, characters, parts).history[-1]["step"] == 5
    with pytest.raises(ValueError, match="student: expected 'bilstm' over characters"):
        replace(characters, student="transformer")


def test_the_deep_student_sees_upper_case_and_its_teacher_need_not(protocol, parts):
    deep = replace(protocol, student="deep bilstm", student_batch=6)
    student = experiments.new_student(deep, parts, 0).eval()
    upper, lower = ([Sentence((word,))] for word in ("PARIS", "paris"))
    assert not student.emissions(student.encode(upper))[0].equal(student.emissions(student.encode(lower))[0])
    run = experiments.run("multi-grained", 0, deep, parts)
    assert run.history[-1]["epoch"] == pytest.approx(5 / 3)  # 14 sentences are 3 batches of 6 at most


def test_tables(protocol, parts, capsys):
    results = experiments.runs(["teacher", "student alone", "top-k", "weighted top-k"], [0, 1], protocol, parts)
    assert capsys.readouterr().out.count("test F1") == 8
    rows = reports.table(results, parts)
    assert list(rows) == ["method", "seed", "precision", "recall", "f1", "parameters", "train_seconds"] and len(rows) == 8
    summary = reports.summary(rows)
    assert summary.loc["top-k", "f1"] == pytest.approx(rows[rows["method"] == "top-k"]["f1"].mean())
    compared = reports.compare(results, parts)
    assert list(compared["method"]) == ["teacher", "top-k", "weighted top-k"]
    expected = summary.loc["top-k", "f1"] - summary.loc["student alone", "f1"]
    assert compared.set_index("method").loc["top-k", "difference"] == pytest.approx(expected, abs=1e-2)
    closer = reports.closer_look(results, parts).set_index("method")
    assert closer.loc["teacher", "agreement with teacher"] in (0.0, 100.0)  # 0 if it found no entity at all
    assert closer["f1"].tolist() == pytest.approx(closer["strict f1"].tolist())
    assert closer["f1"].tolist() == pytest.approx(summary["f1"].tolist(), abs=1e-3)
    assert {"LOC", "PER"} <= set(closer)
    mass = experiments.mass_of_k_best(experiments.trained_teacher(protocol, parts, 0)[0], parts.test, [1, 3, 200])
    assert list(mass["k"]) == [1, 3, 200]
    assert (mass[mass.columns[1:]].diff().dropna() >= -1e-6).all().all() and mass.iloc[-1, 1:].max() <= 1 + 1e-5
