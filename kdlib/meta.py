"""Meta-structured distillation (MSD): a teacher that learns from how its student does in a quiz. The paper's three steps:

    theta_S' = theta_S - lambda grad L_MSD(theta_S; theta_T)             a pilot student takes the lesson (eq. 12, 13),
    theta_T <- theta_T - mu grad_(theta_T) L_NLL(quiz; theta_S'(theta_T))  its teacher learns from the quiz (eq. 14),
    theta_S <- AdamW(theta_S, grad L_MSD(theta_S; theta_T))              the student itself takes the lesson of the new teacher.

Eq. 14's gradient runs through eq. 13: -lambda [d/d theta_T grad_(theta_S) L_MSD]^T v, where v is the quiz's gradient at theta_S'. `exact`
differentiates twice; `central` reads the bracket off two lessons, at theta_S + eps v and theta_S - eps v, and differentiates once (as
Liu et al. 2019 do for architectures, eq. 8). The paper's eq. 12 prints T(x; theta_S); theta_T is meant.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from kdlib import losses
from kdlib.batches import Batch, Encoded, order
from kdlib.crf import NEG_INF, LinearChainCRF
from kdlib.models import Tagger
from kdlib.surrogates import path_weights, teacher_paths

Theta = dict[str, Tensor]  # a model's parameters by name
Asked = Callable[[Theta], Tensor]  # a loss of them
Distils = Callable[[LinearChainCRF, Tensor, LinearChainCRF, Tensor, Tensor], Tensor]
WAYS = ("central", "exact")
K = 3  # paths of the lesson 'weighted top-k'
STEP = 3e-3  # length of the central difference's step: shorter drowns in rounding, longer leaves the tangent


def posterior(crf: LinearChainCRF, student: Tensor, teacher_crf: LinearChainCRF, teacher: Tensor, mask: Tensor) -> Tensor:
    """-sum_i sum_j q_T(y_i = j) log q_S(y_i = j) (eq. 9 as printed), mean over sentences.

    `losses.posterior` with the teacher's entropy left in, and with a gradient for the teacher; so are the other two here.
    """
    log_q = crf.log_marginals(student, mask)
    return -(teacher_crf.marginals(teacher, mask)[0] * log_q.masked_fill(log_q == NEG_INF, 0)).sum() / len(mask)


def structural(crf: LinearChainCRF, student: Tensor, teacher_crf: LinearChainCRF, teacher: Tensor, mask: Tensor) -> Tensor:
    """-sum_u P_T(u) Score_S(u) + log Z_S (eq. 10 as printed), mean over sentences."""
    own = crf.expected_score(student, *teacher_crf.marginals(teacher, mask), mask)
    return (crf.log_partition(student, mask) - own).mean()


def top_k(crf: LinearChainCRF, student: Tensor, teacher_crf: LinearChainCRF, teacher: Tensor, mask: Tensor, k: int = K) -> Tensor:
    """-sum_j w_j log p_S(y^(j)) over the teacher's k best paths, w_j its own probabilities within the list, mean over sentences.

    Eq. 7's weights 1/k do not move with the teacher, whose gradient would be 0: these do. The list itself is held fixed.
    """
    paths, scores = teacher_paths(teacher_crf, teacher, mask, k)
    there = scores > NEG_INF
    own = torch.stack([teacher_crf.score(teacher, path, mask) for path in paths.unbind(1)], 1)
    taken = torch.stack([crf.score(student, path, mask) for path in paths.unbind(1)], 1).masked_fill(~there, 0)
    weights = path_weights(own.masked_fill(~there, NEG_INF))
    return (crf.log_partition(student, mask) - (weights * taken).sum(1)).mean()


# As the teacher hears a lesson, and as its student does: the gradients for the student are equal.
LESSONS: dict[str, tuple[Distils, Distils]] = {
    "posterior": (posterior, losses.posterior),
    "structural": (structural, losses.structural),
    "weighted top-k": (top_k, partial(losses.top_k, k=K, weighted=True)),
}


@dataclass(frozen=True)
class Meta:
    """How the teacher learns. rate: mu of eq. 14 at the start, falling straight to 0, on a gradient brought to length 1, as lambda scales
    it arbitrarily: so it is how far the teacher's weights go in an update, however little there is to say. 0 leaves them where they are.

    pilot_rate: lambda of eq. 13. every: student's updates for one of the teacher's. anchor: weight of the gradient of the teacher's own
    NLL on the labelled sentences of the batch, brought to length 1 too.
    """

    rate: float = 0.002
    pilot_rate: float = 1e-3
    every: int = 4
    anchor: float = 0.0
    lesson: str = "posterior"
    way: str = "central"
    quiz_batch: int = 8

    def __post_init__(self) -> None:
        for name, value, choices in (("lesson", self.lesson, tuple(LESSONS)), ("way", self.way, WAYS)):
            if value not in choices:
                raise ValueError(f"{name}: expected one of {choices}, got {value!r}")
        for name, value in (("every", self.every), ("quiz_batch", self.quiz_batch)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: expected a whole number, 1 or more, got {value!r}")
        numbers = all(isinstance(value, (int, float)) for value in (self.rate, self.anchor, self.pilot_rate))
        if not numbers or not (0 <= self.rate < math.inf and 0 <= self.anchor < math.inf and 0 < self.pilot_rate < math.inf):
            raise ValueError(f"expected a rate and an anchor of 0 or more and a pilot_rate above 0, got {self}")


def lesson(
    crf: LinearChainCRF,
    student: Tensor,
    batch: Batch,
    teacher_crf: LinearChainCRF,
    teacher: Tensor,
    distils: Distils,
    alpha: float,
) -> Tensor:
    """L_MSD = alpha L_NLL + (1 - alpha) L_KD (eq. 12), gold over the labelled sentences of the batch; emissions [B, L, K] of both."""
    taught = distils(crf, student, teacher_crf, teacher, batch.mask)
    gold = losses.labelled_nll(crf, student, batch.tags, batch.mask, batch.labelled)
    return losses.mix(gold, taught, alpha)


def feedback(
    student: Tagger, batch: Batch, quiz: Batch, teacher_crf: LinearChainCRF, teacher: Tensor, meta: Meta, alpha: float
) -> list[Tensor]:
    """[d L_NLL(quiz; theta_S') / d teacher, for its emissions [B, L, K] and for each parameter of its CRF]: eq. 14 but for its encoder.

    `teacher_crf` must want gradients. Dropout is off on all sides, else the two sides of a central difference would be two students. The
    student keeps its weights, mode and gradients. ValueError where `exact` meets an attention kernel that cannot be differentiated twice.
    """
    given = [teacher.detach().requires_grad_(), *teacher_crf.parameters()]
    theta = {name: p.detach().requires_grad_() for name, p in student.named_parameters() if p.requires_grad}

    def taught(theta: Theta) -> Tensor:
        heard = LESSONS[meta.lesson][0]
        return _ask(student, theta, lambda model: lesson(model.crf, model(batch), batch, teacher_crf, given[0], heard, alpha))

    def examined(theta: Theta) -> Tensor:
        return _ask(student, theta, lambda model: losses.crf_nll(model.crf, model(quiz), quiz.tags, quiz.mask))

    with (
        _dropout_off(student),
        torch.backends.cudnn.flags(enabled=False),
    ):  # its LSTM has no gradient in eval mode, nor a second one
        if meta.way == "central":
            return central(theta, given, taught, examined, meta.pilot_rate)
        with twice_differentiable(student):
            return exact(theta, given, taught, examined, meta.pilot_rate)


def exact(theta: Theta, given: list[Tensor], taught: Asked, examined: Asked, rate: float) -> list[Tensor]:
    """d examined(theta - rate grad taught(theta)) / d given, by differentiating twice; `taught` reads `given`, which want gradients."""
    pilot = _moved(theta, _gradient(taught(theta), theta, create_graph=True), -rate)
    return list(torch.autograd.grad(examined(pilot), given, materialize_grads=True))


def central(theta: Theta, given: list[Tensor], taught: Asked, examined: Asked, rate: float) -> list[Tensor]:
    """The same by -rate d/d given [taught(theta + eps v) - taught(theta - eps v)] / (2 eps), v the gradient of `examined` at the pilot."""
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
    found = torch.autograd.grad(loss, list(theta.values()), create_graph=create_graph, materialize_grads=True)
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
    return functional_call(_Questioned(model), {f"model.{name}": p for name, p in theta.items()}, (question,))


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
    """Attention whose gradient has a gradient, which no fused kernel has. ValueError for a student that brings its own attention."""
    config = getattr(getattr(student.encoder, "model", None), "config", None)
    kernel = getattr(config, "_attn_implementation", "eager")
    if kernel not in ("eager", "sdpa"):
        raise ValueError(
            f"way 'exact': expected a student with 'eager' or 'sdpa' attention, which can be differentiated twice, got {kernel!r}; "
            "way 'central' takes any"
        )
    with sdpa_kernel(SDPBackend.MATH):
        yield


class Feedback:
    """MSD as a loss for `train.fit`: before the student takes the lesson of a batch, its teacher learns from a quiz.

    The teacher is a copy; `quiz` are labelled sentences that no student trains on, carved out of train. With a rate of 0 the stored
    emissions of the batch stay what the teacher says: plain distillation, bit for bit. Checkpoints hold what `state_dict` returns.
    It needs one process and full precision. ValueError for a quiz without gold labels, or unless teacher and student read the same word
    pieces.
    """

    def __init__(self, teacher: Tagger, student: Tagger, quiz: Encoded, alpha: float, meta: Meta, seed: int = 0) -> None:
        without = sum(tags is None for tags in quiz.tags)
        if not len(quiz) or without:
            raise ValueError(f"quiz: expected labelled sentences, got {len(quiz)}, {without} of them without labels")
        if teacher.tokenizer.get_vocab() != student.tokenizer.get_vocab():
            raise ValueError("expected a teacher that reads its student's word pieces, got one with a vocabulary of its own")
        self.teacher, self.quiz, self.alpha, self.meta, self.seed = copy.deepcopy(teacher), quiz, alpha, meta, seed
        self.teacher.eval().requires_grad_(True)
        self.seen = 0

    def __call__(self, model: Tagger, emissions: Tensor, batch: Batch, progress: float) -> Tensor:
        """L_MSD (eq. 12), by the teacher after its update."""
        self.teacher.to(emissions.device)
        teacher = batch.teacher
        if self.meta.rate:
            room = self.teacher.encoder.max_pieces
            if batch.pieces.shape[1] > room:
                raise ValueError(
                    f"expected a teacher that reads its student's {batch.pieces.shape[1]} pieces at once, got {room}"
                )
            if self.seen % self.meta.every == 0:
                self.learn(model, batch, self.meta.rate * (1 - progress))
            with torch.no_grad():
                teacher = self.teacher(batch)
        self.seen += 1
        return lesson(model.crf, emissions, batch, self.teacher.crf, teacher, LESSONS[self.meta.lesson][1], self.alpha)

    def learn(self, student: Tagger, batch: Batch, rate: float) -> None:
        """One update of the teacher, `rate` long: eq. 14. FloatingPointError where its gradient is no number."""
        crf, parameters = self.teacher.crf, list(self.teacher.parameters())
        with torch.backends.cudnn.flags(enabled=False):
            emissions = self.teacher(batch)
            heard = feedback(student, batch, self._next_quiz().to(emissions.device), crf, emissions, self.meta, self.alpha)
            given, anchored = [emissions, *crf.parameters()], self.meta.anchor > 0
            pulls = [(1.0, torch.autograd.grad(given, parameters, heard, retain_graph=anchored, materialize_grads=True))]
            if anchored and bool(batch.labelled.any()):
                own = losses.labelled_nll(crf, emissions, batch.tags, batch.mask, batch.labelled)
                pulls.append((self.meta.anchor, torch.autograd.grad(own, parameters, materialize_grads=True)))
        with torch.no_grad():
            for weight, gradients in pulls:
                length = torch.nn.utils.get_total_norm(gradients).item()
                if not math.isfinite(length):
                    raise FloatingPointError(f"the teacher's gradient is {length} after {self.seen} updates of its student")
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
        return self.quiz.collate(order(self.quiz, self.meta.quiz_batch, self.seed + 1000 * epoch)[position])
