"""Meta-structured distillation (MSD): a teacher that learns from how its student does in a quiz.
The paper's three steps:

    theta_S' = theta_S - lambda grad L_MSD(theta_S; theta_T)
    theta_T <- theta_T - mu grad_(theta_T) L_NLL(quiz; theta_S'(theta_T))
    theta_S <- AdamW(theta_S, grad L_MSD(theta_S; theta_T))

A pilot student takes the lesson (eq. 12, 13), its teacher learns from the quiz (eq. 14), and the
student itself takes the lesson of the new teacher.

Eq. 14's gradient runs through eq. 13: -lambda [d/d theta_T grad_(theta_S) L_MSD]^T v, where v is
the quiz's gradient at theta_S'. `exact` differentiates twice; `central` reads the bracket off two
lessons, at theta_S + eps v and theta_S - eps v, and differentiates once (as Liu et al. 2019 do for
architectures, eq. 8). The paper's eq. 12 prints T(x; theta_S); theta_T is meant.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from kdlib import losses
from kdlib.batches import Batch, Encoded, order
from kdlib.crf import Chain
from kdlib.methods import LESSONS, META, Lesson, msd
from kdlib.models import Tagger

Theta = dict[str, Tensor]  # a model's parameters by name
Asked = Callable[[Theta], Tensor]  # a loss of them
WAYS = ("central", "exact")
STEP = 3e-3  # of the central difference: shorter drowns in rounding, longer leaves the tangent


@dataclass(frozen=True)
class Meta:
    """How the teacher learns: the knobs of the method 'msd' beside alpha.

    distils: the lesson, of `methods.LESSONS`. rate: mu of eq. 14 at the start, falling straight to
    0, on a gradient brought to length 1, as lambda scales it arbitrarily: so it is how far the
    teacher's weights move in an update. 0 leaves them where they are. pilot_rate: lambda of eq. 13.
    every: student's updates for one of the teacher's; 0 reads the teacher anew for each batch and
    never lets it learn. anchor: weight of the gradient of the teacher's own NLL on the labelled
    sentences of the batch, brought to length 1 too. way: how eq. 14 is differentiated.
    """

    distils: str = META["distils"]
    rate: float = META["rate"]
    pilot_rate: float = META["pilot_rate"]
    every: int = META["every"]
    anchor: float = META["anchor"]
    way: str = META["way"]
    quiz_batch: int = META["quiz_batch"]

    def __post_init__(self) -> None:
        choices = {"distils": tuple(LESSONS), "way": WAYS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {known}, got {getattr(self, name)!r}")
        for name, least in {"every": 0, "quiz_batch": 1}.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name}: expected a whole number from {least}, got {value!r}")
        numbers = (self.rate, self.anchor, self.pilot_rate)
        fit = all(isinstance(n, (int, float)) and 0 <= n < math.inf for n in numbers)
        if not fit or not self.pilot_rate:
            raise ValueError(
                f"expected a rate and an anchor of 0 or more and a pilot_rate above 0, got {self}"
            )


def feedback(
    student: Tagger, batch: Batch, quiz: Batch, teacher: Chain, meta: Meta, alpha: float
) -> list[Tensor]:
    """[d L_NLL(quiz; theta_S') / d teacher, for its emissions [B, L, K] and each parameter of its
    CRF]: eq. 14 but for its encoder.

    The teacher's CRF must want gradients. Dropout is off on all sides, else the two sides of a
    central difference would be two students. The student keeps its weights, mode and gradients.
    ValueError where `exact` meets an attention kernel that cannot be differentiated twice.
    """
    emissions = teacher.emissions.detach().requires_grad_()
    given, heard = [emissions, *teacher.crf.parameters()], LESSONS[meta.distils][1]
    theta = {
        n: p.detach().requires_grad_() for n, p in student.named_parameters() if p.requires_grad
    }

    def lesson(model: Tagger) -> Tensor:
        own = model.chain(model(batch))
        taught = heard(own, teacher._replace(emissions=emissions), batch.mask)
        gold = losses.labelled_nll(own, batch.tags, batch.mask, batch.labelled)
        return losses.mix(gold, taught, alpha)

    def taught(theta: Theta) -> Tensor:
        return _ask(student, theta, lesson)

    def examined(theta: Theta) -> Tensor:
        return _ask(
            student, theta, lambda m: losses.crf_nll(m.chain(m(quiz)), quiz.tags, quiz.mask)
        )

    # a GPU's LSTM has no gradient in eval mode, nor a second one
    with _dropout_off(student), torch.backends.cudnn.flags(enabled=False):
        if meta.way == "central":
            return central(theta, given, taught, examined, meta.pilot_rate)
        with twice_differentiable(student):
            return exact(theta, given, taught, examined, meta.pilot_rate)


def exact(
    theta: Theta, given: list[Tensor], taught: Asked, examined: Asked, rate: float
) -> list[Tensor]:
    """d examined(theta - rate grad taught(theta)) / d given, by differentiating twice; `taught`
    reads `given`, which want gradients."""
    pilot = _moved(theta, _gradient(taught(theta), theta, create_graph=True), -rate)
    return list(torch.autograd.grad(examined(pilot), given, materialize_grads=True))


def central(
    theta: Theta, given: list[Tensor], taught: Asked, examined: Asked, rate: float
) -> list[Tensor]:
    """The same by -rate d/d given [taught(theta + eps v) - taught(theta - eps v)] / (2 eps), v the
    gradient of `examined` at the pilot."""
    pilot = _moved(theta, _gradient(taught(theta), theta), -rate)
    pilot = {name: p.detach().requires_grad_() for name, p in pilot.items()}
    v = _gradient(examined(pilot), pilot)
    del pilot  # as large as the student
    length = torch.nn.utils.get_total_norm(v.values()).item()
    if not length:  # a quiz without a mistake
        return [torch.zeros_like(x) for x in given]
    step = STEP / length
    still = {name: p.detach() for name, p in theta.items()}
    gap = taught(_moved(still, v, step)) - taught(_moved(still, v, -step))
    return list(torch.autograd.grad(-rate * gap / (2 * step), given, materialize_grads=True))


def _gradient(loss: Tensor, theta: Theta, create_graph: bool = False) -> Theta:
    """By name; 0 for a parameter that the loss does not read."""
    found = torch.autograd.grad(
        loss, list(theta.values()), create_graph=create_graph, materialize_grads=True
    )
    return dict(zip(theta, found, strict=True))


def _moved(theta: Theta, along: Theta, step: float) -> Theta:
    return {name: p.add(along[name], alpha=step) for name, p in theta.items()}


class _Questioned(nn.Module):
    """Lets `functional_call` put any question to a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, question: Callable[[nn.Module], Tensor]) -> Tensor:
        return question(self.model)


def _ask(model: nn.Module, theta: Theta, question: Callable[[nn.Module], Tensor]) -> Tensor:
    """The answer of the model with other parameters in place of its own."""
    return functional_call(
        _Questioned(model), {f"model.{name}": p for name, p in theta.items()}, (question,)
    )


@contextlib.contextmanager
def _dropout_off(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def twice_differentiable(student: Tagger) -> Iterator[None]:
    """Attention whose gradient has a gradient, which no fused kernel has. ValueError for a student
    that brings its own attention."""
    config = getattr(getattr(student.encoder, "model", None), "config", None)
    kernel = getattr(config, "_attn_implementation", "eager")
    if kernel not in ("eager", "sdpa"):
        raise ValueError(
            "way 'exact': expected a student with 'eager' or 'sdpa' attention, which can be "
            f"differentiated twice, got {kernel!r}; "
            "way 'central' takes any"
        )
    with sdpa_kernel(SDPBackend.MATH):
        yield


class Feedback:
    """MSD as a loss for `lab.train.fit`: before the student takes the lesson of a batch, its
    teacher learns from a quiz.

    The teacher is a copy; `quiz` are labelled sentences that no student trains on, carved out of
    train. With a rate of 0 the stored emissions of the batch stay what the teacher says: plain
    distillation, bit for bit. Checkpoints hold what `state_dict` returns. It needs one process and
    full precision. ValueError for a quiz without gold labels, or unless teacher and student read
    the same word pieces.
    """

    def __init__(
        self,
        teacher: Tagger,
        student: Tagger,
        quiz: Encoded,
        alpha: float,
        seed: int = 0,
        **meta: Any,
    ) -> None:
        without = sum(tags is None for tags in quiz.tags)
        if not len(quiz) or without:
            raise ValueError(
                f"quiz: expected labelled sentences, got {len(quiz)}, {without} of them without "
                "labels"
            )
        if teacher.tokenizer.get_vocab() != student.tokenizer.get_vocab():
            raise ValueError(
                "expected a teacher that reads its student's word pieces, "
                "got one with a vocabulary of its own"
            )
        self.teacher, self.quiz, self.alpha = copy.deepcopy(teacher), quiz, alpha
        self.meta, self.seed, self.seen = Meta(**meta), seed, 0
        self.teacher.eval().requires_grad_(True)

    def __call__(self, model: Tagger, emissions: Tensor, batch: Batch, progress: float) -> Tensor:
        """L_MSD (eq. 12), by the teacher after its update."""
        self.teacher.to(emissions.device)
        said = batch.teacher
        if self.meta.rate:
            room, width = self.teacher.encoder.max_pieces, batch.pieces.shape[1]
            if width > room:
                raise ValueError(
                    f"expected a teacher that reads its student's {width} pieces at once, got "
                    f"{room}"
                )
            if self.meta.every and self.seen % self.meta.every == 0:
                self.learn(model, batch, self.meta.rate * (1 - progress))
            with torch.no_grad():
                said = self.teacher(batch)
        self.seen += 1
        lesson = Lesson(model.chain(emissions), self.teacher.chain(said), batch, progress)
        return msd(lesson, self.alpha, self.meta.distils)

    def learn(self, student: Tagger, batch: Batch, rate: float) -> None:
        """One update of the teacher, `rate` long: eq. 14. FloatingPointError where its gradient is
        no number."""
        parameters, anchored = list(self.teacher.parameters()), self.meta.anchor > 0
        with torch.backends.cudnn.flags(enabled=False):
            own = self.teacher.chain(self.teacher(batch))
            quiz = self._next_quiz().to(own.emissions.device)
            heard = feedback(student, batch, quiz, own, self.meta, self.alpha)
            given = [own.emissions, *own.crf.parameters()]
            gradient = torch.autograd.grad(
                given, parameters, heard, retain_graph=anchored, materialize_grads=True
            )
            pulls = [(1.0, gradient)]
            if anchored and bool(batch.labelled.any()):
                nll = losses.labelled_nll(own, batch.tags, batch.mask, batch.labelled)
                gradient = torch.autograd.grad(nll, parameters, materialize_grads=True)
                pulls.append((self.meta.anchor, gradient))
        with torch.no_grad():
            for weight, gradients in pulls:
                length = torch.nn.utils.get_total_norm(gradients).item()
                if not math.isfinite(length):
                    raise FloatingPointError(
                        f"the teacher's gradient is {length} after {self.seen} updates of its "
                        "student"
                    )
                if length:  # 0 with alpha = 1: no teacher is heard
                    torch._foreach_add_(parameters, gradients, alpha=-rate * weight / length)

    def state_dict(self) -> dict:
        """All that changes."""
        return {"teacher": self.teacher.state_dict(), "seen": self.seen}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` returned."""
        self.teacher.load_state_dict(state["teacher"])
        self.seen = state["seen"]

    def _next_quiz(self) -> Batch:
        batches = math.ceil(len(self.quiz) / self.meta.quiz_batch)
        epoch, position = divmod(self.seen // self.meta.every, batches)
        return self.quiz.collate(
            order(self.quiz, self.meta.quiz_batch, self.seed + 1000 * epoch)[position]
        )
