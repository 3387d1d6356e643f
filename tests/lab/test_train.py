import math
from dataclasses import replace

import pytest
import torch
from accelerate import debug_launcher
from conftest import SENTENCES, tagger

from kdlib import losses
from kdlib.lab import scores, targets, train
from kdlib.lab.train import Settings, fit
from kdlib.students import encoders, pretrained
from kdlib.teachers.tagger import Taught

SETTINGS = Settings(steps=12, batch_size=3, evaluations=4, encoder_rate=1e-2)
GOLD = [s.spans for s in SENTENCES]


def nll(model, emissions, batch, progress=0.0):
    return losses.crf_nll(model.chain(emissions), batch.tags, batch.mask)


def on_dev(model, data, gold):
    return lambda: {"dev_f1": float(scores.f1(scores.counts(gold, model.predict(data))))}


def trained(tiny, loss=nll, settings=SETTINGS, checkpoint=None):
    model = tagger(pretrained.load(tiny))
    data = model.encode(SENTENCES)
    return model, fit(model, data, loss, settings, on_dev(model, data, GOLD), "dev_f1", checkpoint)


def without_time(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


def same(a, b):
    return all(
        x.equal(y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_a_tiny_model_learns_and_is_left_as_it_was_best_on_dev(tiny_folder):
    model, history = trained(tiny_folder, settings=replace(SETTINGS, steps=80))
    assert [row["step"] for row in history] == [20, 40, 60, 80]
    assert history[-1]["loss"] < history[0]["loss"]
    best = max(row["dev_f1"] for row in history)
    assert best == 100.0 and model.predict(SENTENCES) == GOLD and not model.training
    assert all(
        row["seconds"] > 0 and math.isclose(row["epoch"], row["step"] / 6) for row in history
    )


def test_a_seeded_run_repeats_exactly(tiny_folder):
    (a, first), (b, again) = trained(tiny_folder), trained(tiny_folder)
    assert same(a, b) and without_time(first) == without_time(again)
    other, _ = trained(tiny_folder, settings=replace(SETTINGS, seed=1))
    assert not same(a, other)


class Killed(BaseException):
    """What a kill looks like from within: nothing catches it."""


@pytest.mark.parametrize("at", [2, 3, 7, 11])
def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(tiny_folder, tmp_path, at):
    whole, history = trained(tiny_folder)
    calls = []

    def killing(model, emissions, batch, progress):
        calls.append(1)
        if len(calls) > at:
            raise Killed
        return nll(model, emissions, batch)

    checkpoint = tmp_path / "run.pt"
    with pytest.raises(Killed):
        trained(tiny_folder, killing, checkpoint=checkpoint)
    assert checkpoint.exists() is (at >= 3)
    again, resumed = trained(tiny_folder, checkpoint=checkpoint)
    assert same(whole, again) and without_time(resumed) == without_time(history)


def test_a_damaged_checkpoint_is_set_aside_and_the_run_starts_again(tiny_folder, tmp_path):
    whole, _ = trained(tiny_folder)
    checkpoint = tmp_path / "run.pt"
    checkpoint.write_bytes(b"half a checkpoint")
    with pytest.warns(UserWarning, match="run.pt: damaged, set aside"):
        again, _ = trained(tiny_folder, checkpoint=checkpoint)
    assert same(whole, again)


def test_a_loss_that_is_not_finite_stops_with_its_place(tiny_folder):
    calls = []

    def diverging(model, emissions, batch, progress):
        calls.append(1)
        return nll(model, emissions, batch) * (float("nan") if len(calls) == 5 else 1)

    with pytest.raises(FloatingPointError, match="loss is nan at step 4"):
        trained(tiny_folder, diverging)


def test_rates_rise_and_fall_and_differ_by_part(tiny_folder, monkeypatch):
    seen = []
    set_rate = train._set_rate

    def watched(optimizer, step, settings):
        set_rate(optimizer, step, settings)
        seen.append([g["lr"] for g in optimizer.param_groups])

    monkeypatch.setattr(train, "_set_rate", watched)
    trained(tiny_folder, settings=replace(SETTINGS, steps=20, warmup=0.25))
    encoder, head, crf = zip(*seen, strict=True)
    assert (
        max(encoder) == SETTINGS.encoder_rate
        and max(head) == SETTINGS.head_rate
        and max(crf) == SETTINGS.crf_rate
    )
    top = encoder.index(max(encoder))
    assert (
        top == 4
        and list(encoder[:5]) == sorted(encoder[:5])
        and list(encoder[4:]) == sorted(encoder[4:], reverse=True)
    )


@pytest.mark.parametrize("distil", [losses.top_k, losses.posterior, losses.structural])
def test_a_student_comes_to_agree_with_its_teacher_without_gold(tiny_folder, distil):
    teacher, _ = trained(tiny_folder, settings=replace(SETTINGS, steps=80))
    teacher.requires_grad_(False)
    backbone = pretrained.load(tiny_folder)
    student = tagger(
        backbone, seed=3, encoder=encoders.lstm(backbone.encoder, 8, 8, pca=encoders.reduce_by_pca)
    )
    text = [s.without_labels() for s in SENTENCES]
    data = targets.with_teacher(student.encode(text), text, Taught(teacher))

    def loss(model, emissions, batch, progress):
        return distil(model.chain(emissions), teacher.chain(batch.teacher), batch.mask)

    dev = student.encode(SENTENCES)
    settings = Settings(steps=120, batch_size=4, encoder_rate=3e-2, head_rate=3e-2)
    fit(student, data, loss, settings, on_dev(student, dev, GOLD), "dev_f1")
    assert student.predict(SENTENCES) == teacher.predict(SENTENCES)


def test_two_processes_share_a_batch_and_agree_with_one(tiny_folder, tmp_path):
    """Under `accelerate launch`, here two CPU processes. Dropout differs between processes, so the
    model has none."""
    out = tmp_path / "two.pt"
    debug_launcher(_without_dropout, (tiny_folder, str(out)), num_processes=2)
    one = _without_dropout_model(tiny_folder)
    two = torch.load(out, weights_only=True)["weights"]
    for name, weight in one.state_dict().items():
        torch.testing.assert_close(two[name], weight, atol=1e-4, rtol=0)


def _without_dropout_model(folder):
    backbone = pretrained.load(folder)
    model = tagger(backbone)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for layer in model.encoder.model.encoder.layer:
        layer.attention.self.dropout_prob = 0.0
    data = model.encode(
        SENTENCES[:4]
    )  # one batch of four different sentences: each process reads two of them
    settings = replace(SETTINGS, batch_size=4, steps=8, encoder_rate=1e-3)
    fit(model, data, nll, settings, on_dev(model, data, GOLD[:4]), "dev_f1")
    return model


def _without_dropout(folder, out):
    torch.set_num_threads(1)
    model = _without_dropout_model(folder)
    if torch.distributed.get_rank() == 0:
        torch.save({"weights": model.state_dict()}, out)
