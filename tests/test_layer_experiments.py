from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SENTENCES

from kdlib import cache, experiments, layer_experiments, losses, speed, train
from kdlib.data import Dataset, Sentence
from kdlib.labels import Span
from kdlib.layer_experiments import RECIPES, LayerProtocol
from kdlib.models import Tagger

METHODS = ("teacher", *RECIPES)


@pytest.fixture
def protocol(tiny_folder):
    return LayerProtocol(
        encoder=tiny_folder, labelled=4, transfer=6, layers=2, width=10, feed_forward=20, embedding=6, teacher_steps=3,
        general_steps=2, student_steps=5, batch_size=2, student_batch=2,
    )  # fmt: skip


@pytest.fixture
def on(protocol):
    corpus = Dataset("own", SENTENCES, SENTENCES[:4], SENTENCES[:4])
    return layer_experiments.ground(protocol, experiments.divide(corpus, protocol))


def losses_of(method, on, monkeypatch):
    """What each update of the method's own training cost."""
    found, fit = [], train.fit

    def kept(model, seen, loss, *rest, **more):
        def noted(*arguments):
            value = loss(*arguments)
            found.append(value.item())
            return value

        return fit(model, seen, noted, *rest, **more)

    layer_experiments.trained_teacher(on)
    if RECIPES[method].general:
        layer_experiments.generally_distilled(on, RECIPES[method], 0)
    monkeypatch.setattr(train, "fit", kept)
    layer_experiments.run(method, 0, on)
    return found


@pytest.mark.parametrize("method", RECIPES)
def test_every_method_trains_a_student_and_repeats_exactly(method, on, monkeypatch, tmp_path):
    found = losses_of(method, on, monkeypatch)
    assert len(found) == 5 and all(np.isfinite(found)) and found[0] > 0
    run = layer_experiments.run(method, 0, on)
    assert run.parameters < on.untrained().parameters_in_all
    if not RECIPES[method].thin:
        with pytest.raises(ValueError, match=f"method: expected one of .*got '{method}'"):
            layer_experiments.trained_student(method, 0, on)
        return
    student, _ = layer_experiments.trained_student(method, 0, on)
    assert student.predict(on.parts.test) == [tuple(spans) for spans in run.predicted]
    start = on.student(RECIPES[method], 0)
    assert any(not a.equal(b) for a, b in zip(student.encoder.parameters(), start.encoder.parameters(), strict=True))
    monkeypatch.setenv("KDLIB_CACHE", str(tmp_path / "again"))
    again, _ = layer_experiments.trained_student(method, 0, on)
    assert all(a.equal(b) for a, b in zip(student.state_dict().values(), again.state_dict().values(), strict=True))


PINNED = {  # the first and the fifth update's loss: if they move, layer_experiments.NUMBERS must
    "undistilled": (1.4124, 1.4852),
    "distilbert": (4.3067, 2.379),
    "bert-pkd": (0.99298, 0.46656),
    "undistilled thin, random start": (2.2686, 1.3351),
    "adaptive, random start": (3.307, 1.0011),
    "adaptive, random start, general stage": (2.9323, 0.92476),
}


@pytest.mark.parametrize("method", PINNED)
def test_numbers_have_not_moved(method, on, monkeypatch):
    found = losses_of(method, on, monkeypatch)
    assert [found[0], found[4]] == pytest.approx(PINNED[method], rel=2e-3), [found[0], found[4]]


def test_training_the_teacher_leaves_the_encoder_that_students_start_from(on):
    before = {k: v.clone() for k, v in on.backbone.encoder.state_dict().items()}
    layer_experiments.trained_teacher(on)
    layer_experiments.run("undistilled", 0, on)
    assert all(v.equal(before[k]) for k, v in on.backbone.encoder.state_dict().items())


def test_a_classifier_predicts_the_best_legal_sequence_of_independent_words(on):
    teacher, _ = layer_experiments.trained_teacher(on)
    assert all(p.abs().max() == 0 for p in teacher.crf.parameters())
    path = teacher.crf.viterbi(10 * torch.eye(5)[None, [2, 0, 1, 2]], torch.ones(1, 4, dtype=torch.bool))[0].tolist()
    assert path[1:] == [0, 1, 2] and path[0] != 2  # I- cannot begin a sentence


def test_eq_15_with_every_weight(on, monkeypatch):
    teacher, _ = layer_experiments.trained_teacher(on)
    pupil = on.student(RECIPES["adaptive"], 0).train()
    pupil.encoder.eval()
    seen = layer_experiments.teachers.with_teacher(pupil.encode(on.text), on.text, teacher)
    batch = layer_experiments.teachers.with_layers(seen, on.text, teacher).collate(range(6))
    pupil.dropout.p = 0.0
    emissions = pupil(batch)
    hard = layer_experiments._hard(pupil, emissions, batch, 0.0)
    soft = losses.soft_cross_entropy(emissions, batch.teacher, batch.mask, 2.0)
    layers = layer_experiments.transformer_loss(pupil, batch, {1: 2, 2: 4})
    for method, theta in (
        ("adaptive", losses.adaptive_weight(0.3)),
        ("constant weight", 0.5),
        ("rescaled weight", losses.rescaled_weight(0.3)),
    ):
        found = layer_experiments.objective(RECIPES[method], on)(pupil, emissions, batch, 0.3)
        torch.testing.assert_close(found, theta * (soft + layers) + (1 - theta) * hard)
    only = layer_experiments.objective(RECIPES["hard + attention"], on)(pupil, emissions, batch, 0.0)
    attention = layer_experiments.transformer_loss(pupil, batch, {1: 2, 2: 4}, hidden=False)
    theta = losses.adaptive_weight(0.0)
    torch.testing.assert_close(only, theta * attention + (1 - theta) * hard)
    assert batch.labelled.sum() == 4
    own = batch.mask[:4]
    share = own.sum() / batch.mask.sum()
    torch.testing.assert_close(hard, losses.hard_labels(emissions[:4], batch.tags[:4], own) * share)


def test_runs_are_remembered_by_what_they_read(protocol, on, monkeypatch):
    fits, fit = [], train.fit
    monkeypatch.setattr(train, "fit", lambda *a, **k: fits.append(1) or fit(*a, **k))

    def trained(method, **changed):
        before = len(fits)
        layer_experiments.run(method, 0, layer_experiments.Ground(replace(protocol, **changed), on.parts, on.backbone))
        return len(fits) - before

    assert trained("adaptive") == 3  # teacher, general stage, student
    assert trained("adaptive") == 0
    assert trained("adaptive", b=-1.0) == trained("adaptive", temperature=3.0) == 1
    assert trained("adaptive", theta=0.9) == 0 and trained("constant weight") == 1 and trained("constant weight", theta=0.9) == 1
    assert trained("adaptive", general_steps=0) == 1 and trained("adaptive, projected start", general_steps=0) == 1
    assert trained("adaptive", layers=1) == 2
    assert not list((cache.folder() / "checkpoints").glob("*.pt"))


def test_the_papers_own_setting_runs_from_a_folder(tiny_folder):
    """4 to 2 layers, narrower, whole table: bert-base-chinese's 12 to 6 and 312 / 1200 in small."""
    protocol = LayerProtocol(
        encoder=tiny_folder, labelled=6, transfer=0, layers=2, width=8, feed_forward=12, embedding=0, teacher_steps=2,
        general_steps=2, student_steps=2, student_batch=64, teacher_rate=1e-5, thin_rate=1e-5, wide_rate=1e-5,
    )  # fmt: skip
    parts = experiments.divide(Dataset("own", SENTENCES[:8], SENTENCES[:4], SENTENCES[:4]), protocol)
    found = layer_experiments.runs([*layer_experiments.METHODS], [2021], layer_experiments.ground(protocol, parts))
    assert [r.method for r in found] == list(layer_experiments.METHODS)
    assert found[-1].parameters < found[1].parameters < found[0].parameters


def test_characters_from_scratch():
    sentence = Sentence(tuple("我在北京北京我在"), ())
    protocol = LayerProtocol(
        encoder="characters", labelled=3, transfer=0, width=24, feed_forward=48, embedding=12, teacher_steps=1, general_steps=0,
        student_steps=1, student_batch=2,
    )  # fmt: skip
    gold = Sentence(sentence.tokens, (Span(2, 4, "LOC"),))
    parts = experiments.divide(Dataset("own", [gold] * 3, [gold], [gold]), protocol)
    run = layer_experiments.run("adaptive", 0, layer_experiments.ground(protocol, parts))
    assert len(run.predicted) == 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("vocabulary", "some", "expected 'seen' or 'whole', got 'some'"),
        ("layers", 0, "expected a whole number, 1 or more, got 0"),
        ("embedding", -1, "0 or more"),
        ("student_steps", 2.5, "whole number"),
        ("temperature", 0.0, "above 0"),
        ("thin_rate", float("nan"), "above 0"),
        ("theta", 1.1, "from 0 to 1"),
        ("b", float("inf"), "expected a number"),
    ],
)
def test_bad_settings(protocol, name, value, message):
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        replace(protocol, **{name: value})


def test_unknown_methods_and_shapes_that_do_not_fit(on, protocol):
    with pytest.raises(ValueError, match="method: expected one of .*got 'tiny'"):
        layer_experiments.run("tiny", 0, on)
    with pytest.raises(ValueError, match="divides the teacher's 4, got 3"):
        layer_experiments.run("undistilled", 0, layer_experiments.Ground(replace(protocol, layers=3), on.parts, on.backbone))


def test_speeds_are_ratios_to_the_first(on):
    small = on.student(RECIPES["adaptive"], 0)
    table = speed.of_taggers({"teacher": on.untrained(), "small": small}, SENTENCES, 0.1, (1, 4)).set_index(["model", "batch"])
    assert (table.loc["teacher", ["speedup", "speedup_without_tokenisation"]] == 1).all(axis=None)
    assert (table["without_tokenisation"] > 0).all() and len(table) == 4
    with pytest.raises(ValueError, match="at least a batch of 99, got 16"):
        speed.of_taggers({"teacher": on.untrained()}, SENTENCES, 0.1, (99,))


def test_a_graduate_is_a_tagger_that_can_be_shipped(on, tmp_path):
    student, run = layer_experiments.trained_student("adaptive", 0, on)
    assert type(student) is Tagger and not student.training and run.parameters == student.parameters_in_all
    student.save_pretrained(tmp_path / "student")
    again = Tagger.from_pretrained(tmp_path / "student")
    assert again.predict(on.parts.test) == [tuple(spans) for spans in run.predicted]
    pupil = on.student(RECIPES["adaptive"], 0).double().eval()
    graduate = pupil.graduate()
    first = pupil.emissions(pupil.encode(SENTENCES))
    graduate.predict(SENTENCES)
    assert all(a.equal(b) for a, b in zip(first, pupil.emissions(pupil.encode(SENTENCES)), strict=True))
    pupil.save_pretrained(tmp_path / "pupil")
    assert Tagger.from_pretrained(tmp_path / "pupil").parameters_in_all == pupil.parameters_in_all


def test_the_general_stage_lowers_the_distance_between_layers(protocol, on):
    recipe = RECIPES["adaptive, random start, general stage"]
    longer = layer_experiments.Ground(replace(protocol, general_steps=60, thin_rate=5e-3), on.parts, on.backbone)
    text = [s.without_labels() for s in on.text]
    teacher, distances = on.untrained(), []
    for weights in (None, layer_experiments.generally_distilled(longer, recipe, 0)):
        pupil = longer.student(recipe, 0)
        if weights:
            pupil.load_state_dict(weights)
        batch = layer_experiments.teachers.with_layers(pupil.encode(text), text, teacher).collate(range(len(text)))
        with torch.no_grad(), layer_experiments.watched(pupil.eval().encoder) as pupil.inside:
            pupil(batch)
        distances.append(layer_experiments.transformer_loss(pupil, batch, on.map()).item())
    assert distances[1] < 0.8 * distances[0], distances


def test_students_that_number_pieces_alike_but_read_other_text_do_not_share_a_start(tiny_folder):
    """With 'seen' pieces two texts can look the same to the student and different to the teacher."""
    made = []
    for name in ("paris", "anna"):
        text = [Sentence((name, "in", name), ())] * 4
        protocol = LayerProtocol(
            encoder=tiny_folder, layers=2, width=10, feed_forward=20, embedding=0, vocabulary="seen", general_steps=2
        )
        ground = layer_experiments.ground(protocol, experiments.divide(Dataset("own", text, text, text), protocol))
        made.append(layer_experiments.generally_distilled(ground, RECIPES["adaptive, random start, general stage"], 0))
    assert any(not a.equal(b) for a, b in zip(made[0].values(), made[1].values(), strict=True))


def test_too_little_text_is_an_error(protocol, on):
    few = replace(on.parts, labelled=on.parts.labelled[:1], transfer_gold=[])
    with pytest.raises(ValueError, match="two sentences of text or more.*got 1"):
        layer_experiments.run("adaptive", 0, layer_experiments.Ground(protocol, few, on.backbone))
    with pytest.raises(ValueError, match="at least one sentence to learn from, got none"):
        layer_experiments.run("undistilled", 0, layer_experiments.Ground(protocol, replace(few, labelled=[]), on.backbone))
