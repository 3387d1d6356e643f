import copy
import functools
from dataclasses import replace

import pytest
import torch
from conftest import CORPUS, SENTENCES, tiny_study

from kdlib import losses
from kdlib.lab import cache, train
from kdlib.methods import LESSONS, METHODS
from kdlib.models import Tagger
from kdlib.students import encoders, pretrained
from kdlib.teachers import msd as meta
from kdlib.teachers.msd import Feedback, Meta
from kdlib.text.tags import Sentence, iob2_labels

PLAIN = {
    "posterior": losses.posterior,
    "structural": losses.structural,
    "weighted top-k": functools.partial(losses.top_k, k=3, weighted=True),
}


@pytest.fixture(params=["transformer", "bilstm"])
def pair(request, tiny_folder):
    """A student and a teacher in double precision."""
    torch.manual_seed(0)
    backbone = pretrained.load(tiny_folder)
    encoder = encoders.take_layers(backbone.encoder)
    if request.param == "bilstm":
        encoder = encoders.lstm(backbone.encoder, 8, 6, pca=encoders.reduce_by_pca)
    labels = iob2_labels(CORPUS.types)
    student, teacher = (
        Tagger(e, backbone.tokenizer, labels).double() for e in (encoder, backbone.encoder)
    )
    return student.train(), teacher.eval()


@pytest.fixture
def batches(pair):
    """A lesson, of which two sentences have no labels, and a quiz."""
    student, _ = pair
    text = [*SENTENCES[:4], *(s.without_labels() for s in SENTENCES[4:6])]
    return student.encode(text).collate(range(6)), student.encode(SENTENCES[6:9]).collate(range(3))


def after_one_step(student, teacher, emissions, batch, quiz, lesson, alpha, rate):
    """The quiz's loss of a pilot that torch's own SGD has moved: eq. 12, 13 word by word."""
    pilot = copy.deepcopy(student).eval()
    scores = pilot(batch)
    taught = PLAIN[lesson](pilot.chain(scores), teacher.chain(emissions), batch.mask)
    own = batch.labelled
    known = pilot.chain(scores[own])
    gold = losses.crf_nll(known, batch.tags[own], batch.mask[own]) * own.double().mean()
    (alpha * gold + (1 - alpha) * taught).backward()
    torch.optim.SGD(pilot.parameters(), rate).step()
    with torch.no_grad():
        return losses.crf_nll(pilot.chain(pilot(quiz)), quiz.tags, quiz.mask)


@pytest.mark.parametrize("lesson", LESSONS)
def test_both_ways_are_the_slope_of_the_quiz_along_the_teacher(pair, batches, lesson):
    """Against finite differences through a real step of a real optimizer, and against each
    other."""
    (student, teacher), (batch, quiz) = pair, batches
    rate, alpha = 0.05, 0.3
    emissions = teacher(batch).detach()
    found = {
        w: meta.feedback(
            student,
            batch,
            quiz,
            teacher.chain(emissions),
            Meta(pilot_rate=rate, distils=lesson, way=w),
            alpha,
        )
        for w in meta.WAYS
    }
    size = torch.nn.utils.get_total_norm(found["exact"])
    gap = torch.nn.utils.get_total_norm(
        [a - b for a, b in zip(found["exact"], found["central"], strict=True)]
    )
    assert size > 1e-6 and gap < 1e-3 * size
    torch.manual_seed(1)
    direction = torch.randn_like(emissions) * batch.mask[..., None]
    moved = [
        after_one_step(
            student, teacher, emissions + h * direction, batch, quiz, lesson, alpha, rate
        )
        for h in (1e-4, -1e-4)
    ]
    assert ((moved[0] - moved[1]) / 2e-4).item() == pytest.approx(
        (found["exact"][0] * direction).sum().item(), rel=1e-4
    )
    step = torch.randn_like(teacher.crf.transitions)
    slopes = []
    for h in (1e-4, -1e-4):
        other = copy.deepcopy(teacher)
        other.crf.transitions.data += h * step
        slopes.append(after_one_step(student, other, emissions, batch, quiz, lesson, alpha, rate))
    own = dict(zip(dict(teacher.crf.named_parameters()), found["exact"][1:], strict=True))[
        "transitions"
    ]
    assert ((slopes[0] - slopes[1]) / 2e-4).item() == pytest.approx(
        (own * step).sum().item(), rel=1e-4
    )


@pytest.mark.parametrize("way", meta.WAYS)
def test_the_student_is_left_as_it_was(pair, batches, way):
    (student, teacher), (batch, quiz) = pair, batches
    before = copy.deepcopy(student.state_dict())
    state = torch.get_rng_state()
    meta.feedback(student, batch, quiz, teacher.chain(teacher(batch)), Meta(way=way), 0.5)
    assert all(torch.equal(before[k], v) for k, v in student.state_dict().items())
    assert student.training and all(p.grad is None for p in student.parameters())
    assert torch.equal(state, torch.get_rng_state())  # a pilot draws no dropout


def test_exact_works_in_single_precision_with_the_students_own_kernels(pair, batches):
    """Fused attention and LSTM have no second derivative: `exact` goes round them, `central` does
    not need to."""
    (student, teacher), (batch, quiz) = pair, batches
    student.float(), teacher.float()
    one, two = (
        meta.feedback(
            student, batch, quiz, teacher.chain(teacher(batch)), Meta(pilot_rate=0.05, way=w), 0.5
        )
        for w in meta.WAYS
    )
    size = torch.nn.utils.get_total_norm(one)
    assert (
        torch.nn.utils.get_total_norm([a - b for a, b in zip(one, two, strict=True)]) < 2e-2 * size
    )


def test_an_attention_of_its_own_is_refused(tiny_folder):
    backbone = pretrained.load(tiny_folder)
    student = Tagger(backbone.encoder, backbone.tokenizer, iob2_labels(CORPUS.types))
    student.encoder.model.config._attn_implementation = "flash_attention_2"
    with (
        pytest.raises(ValueError, match="expected a student with 'eager' or 'sdpa' attention"),
        meta.twice_differentiable(student),
    ):
        pass


def test_the_quiz_gets_easier_along_the_teachers_update(pair, batches):
    """One update of eq. 14 lowers what eq. 13's pilot loses in the same quiz."""
    (student, teacher), (batch, quiz) = pair, batches
    quizzed = student.encode(SENTENCES[6:9])
    loss = Feedback(teacher, student, quizzed, 0.0, rate=1e-2, pilot_rate=0.05, quiz_batch=3)
    before = after_one_step(
        student, teacher, teacher(batch).detach(), batch, quiz, "posterior", 0.0, 0.05
    )
    for _ in range(5):
        loss.learn(student, batch, 1e-2)
    after = after_one_step(
        student, loss.teacher, loss.teacher(batch).detach(), batch, quiz, "posterior", 0.0, 0.05
    )
    assert after < before
    assert all(
        p.grad is None for p in teacher.parameters()
    )  # the copy learns, not the teacher itself


def test_an_anchor_pulls_the_teacher_to_its_own_labels(pair, batches):
    (student, teacher), (batch, _) = pair, batches
    own = []
    for anchor in (0.0, 10.0):
        loss = Feedback(
            teacher, student, student.encode(SENTENCES[6:9]), 0.5, rate=1e-2, anchor=anchor
        )
        for _ in range(5):
            loss.learn(student, batch, 1e-2)
        own.append(
            losses.labelled_nll(
                loss.teacher.chain(loss.teacher(batch)), batch.tags, batch.mask, batch.labelled
            )
        )
    assert own[1] < own[0]


def test_with_gold_alone_no_teacher_is_heard(pair, batches):
    (student, teacher), (batch, _) = pair, batches
    loss = Feedback(teacher, student, student.encode(SENTENCES[6:9]), 1.0, rate=1e-2)
    loss.learn(student, batch, 1e-2)
    assert all(
        torch.equal(a, b)
        for a, b in zip(teacher.parameters(), loss.teacher.parameters(), strict=True)
    )


def test_what_cannot_be_is_refused(pair):
    student, teacher = pair
    for wrong in ({"distils": "top-k"}, {"way": "first order"}, {"every": -1}, {"quiz_batch": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
            Meta(**wrong)
    for wrong in ({"rate": -1.0}, {"rate": None}, {"pilot_rate": 0.0}, {"anchor": float("nan")}):
        with pytest.raises(ValueError, match="expected a rate and an anchor of 0 or more"):
            Meta(**wrong)
    for quiz in ([], [SENTENCES[0].without_labels()]):
        with pytest.raises(ValueError, match="quiz: expected labelled sentences"):
            Feedback(teacher, student, student.encode(quiz), 0.5)
    stranger = copy.copy(teacher)
    stranger.tokenizer = copy.deepcopy(teacher.tokenizer)
    stranger.tokenizer.add_tokens(["zzz"])
    with pytest.raises(ValueError, match="with a vocabulary of its own"):
        Feedback(stranger, student, student.encode(SENTENCES[:2]), 0.5)


@pytest.fixture(params=["transformer", "bilstm"])
def student(request):
    return request.param


def without_time(run):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in run.history]


def test_a_frozen_teacher_is_plain_distillation_bit_for_bit(tiny_folder, student):
    study = tiny_study(tiny_folder, 8, 6, quiz=3)
    frozen = study.run(METHODS["msd"].tuned(rate=0.0), student, 0)
    plain = study.run("msd, teacher at rest", student, 0)
    assert [h["loss"] for h in frozen.history] == [h["loss"] for h in plain.history]
    assert frozen.predicted == plain.predicted
    without_quiz = replace(METHODS["posterior"], quiz=True)
    assert without_time(study.run(without_quiz, student, 0)) == without_time(plain)
    moving = study.run(METHODS["msd"].tuned(rate=0.5), student, 0)
    assert [h["loss"] for h in moving.history] != [h["loss"] for h in plain.history]
    assert all("teacher_dev_f1" in h for h in moving.history)


def test_a_teacher_read_anew_that_never_learns_says_the_same(tiny_folder, student):
    study = tiny_study(tiny_folder, 8, 6, quiz=3)
    anew = study.run(METHODS["msd"].tuned(every=0), student, 0)
    plain = study.run("msd, teacher at rest", student, 0)
    losses = [[h["loss"] for h in run.history] for run in (anew, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_killed_run_ends_with_the_same_numbers(tiny_folder, student, monkeypatch):
    """The teacher's updates are in the checkpoint too."""
    study, learning = tiny_study(tiny_folder, 8, 6, quiz=3), METHODS["msd"].tuned(rate=0.5, every=2)
    whole = study.run(learning, student, 0)
    monkeypatch.setenv("KDLIB_CACHE", str(cache.folder()) + "2")
    learn, calls = Feedback.learn, []

    def dies(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        learn(self, *arguments)

    monkeypatch.setattr(Feedback, "learn", dies)
    with pytest.raises(KeyboardInterrupt):
        study.run(learning, student, 0)
    again = study.run(learning, student, 0)
    assert len(calls) == 4  # two, the one that died, and that one again
    assert without_time(again) == without_time(whole) and again.predicted == whole.predicted


@pytest.mark.parametrize("way", [meta.exact, meta.central])
def test_a_quiz_that_asks_nothing_says_nothing(way):
    s, t = torch.tensor([0.5, -1.0], requires_grad=True).unbind()
    (found,) = way(
        {"s": s}, [t], lambda theta: (theta["s"] - t) ** 2, lambda theta: theta["s"] * 0, 0.1
    )
    assert found == 0


def test_a_teacher_that_cannot_read_as_much_is_refused(pair):
    student, teacher = pair
    student.encoder.max_pieces = 100
    long = [Sentence(("anna", *("paris",) * 40), ())]
    loss = Feedback(teacher, student, student.encode(SENTENCES[:2]), 0.5)
    batch = student.encode(long).collate([0])
    with pytest.raises(
        ValueError, match="expected a teacher that reads its student's 43 pieces at once, got 24"
    ):
        loss(student, teacher(student.encode(SENTENCES[:1]).collate([0])), batch, 0.0)


def test_a_loss_that_learns_needs_full_precision(pair):
    student, teacher = pair
    loss = Feedback(teacher, student, student.encode(SENTENCES[:2]), 0.5)
    with pytest.raises(ValueError, match="precision: expected 'no' for a loss"):
        train.fit(student, student.encode(SENTENCES[:4]), loss, train.Settings(2, precision="bf16"))
