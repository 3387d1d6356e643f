"""Each method of the four papers, declared once: where it comes from, its loss, what it needs.

A loss reads a `Lesson`, both sides of one batch, and its knobs. A variant is a method with another
knob: `METHODS["posterior"].tuned(temperature=4.0)`. What a method needs, its student must serve and
its teacher must tell; `lab.study` raises `Lacks` where one does not.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from kdlib import losses
from kdlib.batches import Batch, Layers
from kdlib.crf import Chain

WORDS = "words"  # a distribution over labels for each word
SEQUENCES = "sequences"  # a CRF: probabilities of whole label sequences
PATHS = "paths"  # surrogate labels of the k best sequences, counted once
LAYERS = "layers"  # attention scores and hidden states of a Transformer
WIDE = "layers as wide as the teacher's"
LIVE = "a living teacher"  # one whose weights can learn from its student


class Lacks(ValueError):
    """A method needs what its student or teacher does not have."""


class Lesson(NamedTuple):
    """All that a loss may read. `layers`: the student's and the teacher's, with W_h between
    them."""

    student: Chain
    teacher: Chain | None
    batch: Batch
    progress: float  # share of the updates already made, from 0 to 1
    layers: tuple[Layers, Layers] | None = None
    projection: nn.Module | None = None


@dataclass(frozen=True)
class Method:
    """reads: 'labelled' sentences alone; 'text' too, as its teacher sees it; the text with its
    teacher's one best labels, 'pseudo-labels'; or with 'gold' ones.

    knobs: all that the loss reads beside its lesson, and exactly what a run's key holds. quiz: its
    student does without the sentences that examine MSD. start: a thin student begins 'projected'
    from the pretrained encoder (or, in one experiment, from its teacher, 'taught'), and has the
    'general' stage on raw text.
    """

    name: str
    source: str
    loss: Callable[..., Tensor]
    needs: frozenset[str] = frozenset()
    knobs: Mapping[str, Any] = field(default_factory=dict)
    reads: str = "text"
    start: tuple[str, ...] = ("projected",)
    quiz: bool = False
    colour: str = "#333333"

    def tuned(self, name: str = "", **knobs: Any) -> "Method":
        """The same with other knobs, under another name if one is given; ValueError for one that it
        does not have."""
        unknown = sorted(knobs.keys() - self.knobs.keys())
        if unknown:
            raise ValueError(
                f"{self.name}: expected knobs among {sorted(self.knobs)}, got {unknown}"
            )
        no_number = sorted(k for k, v in knobs.items() if isinstance(v, float) and math.isnan(v))
        if no_number:
            raise ValueError(f"{self.name}: expected numbers, got NaN for {no_number}")
        return replace(self, name=name or self.name, knobs={**self.knobs, **knobs})

    @property
    def paths(self) -> dict[str, float]:
        """Of the surrogate labels it learns from: what `losses.surrogate_labels` is asked."""
        asked = ("k", "weight_temperature", "held", "doubted")
        return {"weight_temperature": math.inf} | {
            n: self.knobs[n] for n in asked if n in self.knobs
        }

    def content(self) -> list:
        """What makes it another method, for a digest."""
        return [self.loss.__name__, dict(self.knobs), self.reads, list(self.start)]


def gold(lesson: Lesson) -> Tensor:
    """The gold labels of the batch's labelled sentences: CRF NLL (eq. 4), mean over sentences; for
    a softmax per word the cross entropy, mean over words."""
    return gold_words(lesson) if lesson.student.softmax else gold_sequences(lesson)


def gold_sequences(lesson: Lesson) -> Tensor:
    """CRF NLL of the labelled sentences over the number of all."""
    batch = lesson.batch
    return losses.labelled_nll(lesson.student, batch.tags, batch.mask, batch.labelled)


def gold_words(lesson: Lesson) -> Tensor:
    """The same in the unit of losses over words: cross entropy a word; of a chain its NLL a
    word."""
    batch = lesson.batch
    if not lesson.student.softmax:
        return gold_sequences(lesson) * len(batch.mask) / batch.mask.sum()
    return losses.labelled_words(lesson.student.emissions, batch.tags, batch.mask, batch.labelled)


def logits(lesson: Lesson) -> tuple[Tensor, Tensor, Tensor]:
    """Both sides' logits of each word's label, and the mask.

    A chain gives illegal labels no probability, so for one its teacher must not either.
    """
    student, teacher, mask = lesson.student, lesson.teacher, lesson.batch.mask
    if not student.softmax:
        teacher = teacher._replace(softmax=False)
    return student.words(mask), teacher.words(mask), mask


# ---- a word at a time ----


def soft_targets(lesson: Lesson, alpha: float, temperature: float) -> Tensor:
    """alpha gold + (1 - alpha) T^2 KL a word: GLiNER -> LSTM (its section 5); Hinton et al.
    2015."""
    return losses.mix(gold_words(lesson), losses.soft_targets(*logits(lesson), temperature), alpha)


# ---- a CRF student of a CRF teacher: eq. 6 with one distillation term each ----


def surrogate_sequences(
    lesson: Lesson, alpha: float, k: int, weight_temperature: float = math.inf
) -> Tensor:
    """eq. 6 with the teacher's k best paths, weighted alike as in eq. 7 by default."""
    taught = losses.crf_cross_entropy(lesson.student, lesson.batch.surrogates, lesson.batch.mask)
    return losses.mix(gold_sequences(lesson), taught, alpha)


def multi_grained(
    lesson: Lesson,
    alpha: float,
    k: int,
    weight_temperature: float,
    temperature: float,
    grains: tuple[float, float, float],
    held: float = 1.0,
    doubted: float = 1.0,
) -> Tensor:
    """eq. 6 with `losses.multi_grained`; k, weight_temperature, held and doubted have made the
    batch's surrogate labels."""
    student, teacher, batch = lesson.student, lesson.teacher, lesson.batch
    taught = losses.multi_grained(
        student, teacher, batch.surrogates, batch.mask, grains, temperature
    )
    return losses.mix(gold_sequences(lesson), taught, alpha)


def _compared(by: Callable[..., Tensor], **fixed: Any) -> Callable[..., Tensor]:
    """eq. 6 with a loss that compares two chains directly."""

    def loss(lesson: Lesson, alpha: float, **knobs: Any) -> Tensor:
        taught = by(lesson.student, lesson.teacher, lesson.batch.mask, **fixed, **knobs)
        return losses.mix(gold_sequences(lesson), taught, alpha)

    loss.__name__ = by.__name__
    return loss


posterior, structural = _compared(losses.posterior), _compared(losses.structural)
path_set, decoupled = _compared(losses.path_set), _compared(losses.decoupled)

# MSD's lesson as its student takes it, and as its teacher hears it: equal gradients for the student
LESSONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "posterior": (posterior, losses.heard_posterior),
    "structural": (structural, losses.heard_structural),
    "weighted top-k": (_compared(losses.top_k, k=3, weighted=True), losses.heard_top_k),
}


def msd(lesson: Lesson, alpha: float, distils: str, **meta: Any) -> Tensor:
    """L_MSD = alpha L_NLL + (1 - alpha) L_KD (eq. 12); `teachers.msd` lets its teacher learn."""
    return LESSONS[distils][0](lesson, alpha)


# ---- layers of a Transformer, soft labels of its words ----


def layer_losses(lesson: Lesson, terms: Iterable[str] = ("attention", "hidden")) -> Tensor:
    """sum over the student's layers m = 1 to M of L_attn + L_hidn (adaptive eq. 15-16; the paper's
    sum begins at 0, a layer it does not name)."""
    own, other = lesson.layers
    mask, total = lesson.batch.piece_mask, lesson.student.emissions.new_zeros(())
    for m, g in losses.layer_map(len(own.scores), len(other.scores)).items():
        if "attention" in terms:
            total = total + losses.attention_scores(own.scores[m], other.scores[g], mask)
        if "hidden" in terms:
            hidden = own.hidden[m], other.hidden[g]
            total = total + losses.hidden_states(*hidden, mask, lesson.projection)
    return total


def imitation(lesson: Lesson) -> Tensor:
    """Embeddings and layers alone, no label: TinyBERT's first stages, the adaptive paper's stage
    1."""
    hidden = [side.hidden[0] for side in lesson.layers]
    embeddings = losses.hidden_states(*hidden, lesson.batch.piece_mask, lesson.projection)
    return embeddings + layer_losses(lesson)


def distilbert(lesson: Lesson, temperature: float) -> Tensor:
    """5 soft targets + 2 gold + cosine of the last hidden states (Sanh et al. 2019, task
    version)."""
    last = [side.hidden[max(side.hidden)] for side in lesson.layers]
    soft = losses.soft_targets(*logits(lesson), temperature)
    return 5 * soft + 2 * gold_words(lesson) + losses.cosine(*last, lesson.batch.piece_mask)


def bert_pkd(lesson: Lesson, alpha: float, temperature: float, last: bool) -> Tensor:
    """alpha gold + (1 - alpha) soft targets + patient loss over layers (Sun et al. 2019, eq. 8)."""
    own, other = lesson.layers
    mapped = losses.patient_map(len(own.scores), len(other.scores), last)
    layers = [
        losses.patient(own.hidden[m], other.hidden[g], lesson.batch.piece_mask)
        for m, g in mapped.items()
    ]
    soft = losses.soft_targets(*logits(lesson), temperature)
    return alpha * gold_words(lesson) + (1 - alpha) * soft + sum(layers)


def tinybert(lesson: Lesson, imitating: float) -> Tensor:
    """A share `imitating` of the updates on layers, then soft labels (Jiao et al. 2020)."""
    if lesson.progress < imitating:
        return imitation(lesson)
    return losses.soft_cross_entropy(*logits(lesson))


WEIGHTS: dict[str, Callable[[float, float], float]] = {
    "eq. 14": losses.adaptive_weight,
    "rescaled": lambda progress, _: losses.rescaled_weight(progress),
    "constant": lambda _, theta: theta,
}


def adaptive(
    lesson: Lesson,
    temperature: float,
    weight: tuple[str, float],
    terms: tuple[str, ...],
    softened: str,
) -> Tensor:
    """Adaptive eq. 15. weight: a name of WEIGHTS and its constant (eq. 14's b, or theta); terms:
    which of 'soft', 'attention', 'hidden' stand beside gold; softened: 'both' sides of the soft
    loss at the temperature (eq. 3), or the 'teacher' alone (eq. 12)."""
    layers, soft = layer_losses(lesson, terms), lesson.student.emissions.new_zeros(())
    if "soft" in terms:
        own = 1.0 if softened == "teacher" else None
        soft = losses.soft_cross_entropy(*logits(lesson), temperature, own)
    theta = WEIGHTS[weight[0]](lesson.progress, weight[1])
    return losses.adaptive(soft, gold_words(lesson), layers, theta)


CHAINS, K_BEST = frozenset({WORDS, SEQUENCES}), frozenset({WORDS, SEQUENCES, PATHS})
SAME_WIDTH = frozenset({WORDS, LAYERS, WIDE})
INNER, LEARNS = frozenset({WORDS, LAYERS}), frozenset({WORDS, SEQUENCES, LIVE})
EQ_6, TOP = {"alpha": 0.5}, {"alpha": 0.5, "k": 3}
GRAINS = TOP | {"weight_temperature": 1.0, "temperature": 1.0, "grains": (0.6, 0.1, 0.3)}
META = {
    "distils": "posterior",
    "rate": 0.002,
    "pilot_rate": 1e-3,
    "every": 4,
    "anchor": 0.0,
    "way": "central",
    "quiz_batch": 8,
}
ADAPTIVE = {
    "temperature": 2.0,
    "weight": ("eq. 14", 0.0),
    "terms": ("soft", "attention", "hidden"),
    "softened": "both",
}
BOTH = ("projected", "general")

# fmt: off
METHODS = {m.name: m for m in (
    Method("student alone", "eq. 4", gold, reads="labelled", colour="#1f77b4"),
    Method("gold on transfer", "the ceiling", gold, reads="gold", colour="#111111"),
    Method("pseudo-labels", "Lee 2013", gold, frozenset({WORDS}), reads="pseudo-labels",
           colour="#7f4f24"),
    Method("soft targets", "GLiNER -> LSTM 5; Hinton et al. 2015", soft_targets, frozenset({WORDS}),
           {"alpha": 0.5, "temperature": 2.0}, colour="#c2185b"),
    Method("top-k", "MSD eq. 7", surrogate_sequences, K_BEST, TOP, colour="#e8a33d"),
    Method("weighted top-k", "Wang et al. 2020", surrogate_sequences, K_BEST,
           TOP | {"weight_temperature": 1.0}, colour="#b8860b"),
    Method("posterior", "MSD eq. 9", posterior, CHAINS, EQ_6 | {"temperature": 1.0},
           colour="#d1495b"),
    Method("structural", "MSD eq. 10", structural, CHAINS, EQ_6 | {"temperature": 1.0},
           colour="#e0641c"),
    Method("path set", "Shang et al. 2018", path_set, CHAINS, TOP, colour="#7aa6a1"),
    Method("decoupled k-best", "Zhao et al. 2024", decoupled, CHAINS, TOP, colour="#4d7c8a"),
    Method("multi-grained", "Zhou et al. 2021", multi_grained, K_BEST, GRAINS, colour="#2a8c7a"),
    Method("multi-grained, 0.9 held", "Zhou et al. 2021, read again", multi_grained, K_BEST,
           GRAINS | {"k": 10, "held": 0.9}, colour="#57a898"),
    Method("multi-grained, in doubt", "Zhou et al. 2021, read again", multi_grained, K_BEST,
           GRAINS | {"doubted": 0.9}, colour="#8cc4b8"),
    Method("msd", "MSD eq. 12-14", msd, LEARNS, EQ_6 | META, quiz=True, colour="#8a4fbf"),
    Method("msd, teacher at rest", "its control", posterior, CHAINS, EQ_6 | {"temperature": 1.0},
           quiz=True, colour="#bfa0dd"),
    Method("distilbert", "Sanh et al. 2019", distilbert, SAME_WIDTH, {"temperature": 2.0},
           colour="#9c9a2e"),
    Method("bert-pkd", "Sun et al. 2019", bert_pkd, SAME_WIDTH,
           {"alpha": 0.5, "temperature": 5.0, "last": False}, colour="#a23b72"),
    Method("tinybert", "Jiao et al. 2020", tinybert, INNER, {"imitating": 0.6}, start=BOTH,
           colour="#3b7d4f"),
    Method("adaptive", "adaptive eq. 15", adaptive, INNER, ADAPTIVE, start=BOTH, colour="#f0803c"),
)}
# fmt: on


def chosen(names: Iterable[str], **knobs: Any) -> list[Method]:
    """The methods of these names, each with those of the values that are knobs of its own.

    ValueError for an unknown name.
    """
    names = list(names)
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise ValueError(f"method: expected some of {list(METHODS)}, got {unknown}")
    own = [METHODS[name] for name in names]
    return [m.tuned(**{k: v for k, v in knobs.items() if k in m.knobs}) for m in own]
