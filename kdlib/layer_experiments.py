"""Adaptive distillation and its baselines: methods x seeds, on tokens and layers of Transformers, without a CRF.

As in `experiments`, a few sentences have labels and many more serve as text for transfer; a method is a recipe, of a student, of what it
starts from and of its loss. Two students: 'wide', the pretrained encoder cut to fewer layers, and 'thin', narrower too and with a
smaller table of embeddings, which starts from the encoder's projected weights or at random, and has the general stage where its recipe
says so.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from kdlib import backbones, cache, experiments, labels, losses, projection, reports, teachers, train, vocabulary
from kdlib.backbones import Backbone
from kdlib.batches import Batch, in_turn
from kdlib.data import Parts
from kdlib.layers import layer_map, patient_map, watched
from kdlib.models import Pupil, Tagger, classifier
from kdlib.reports import Run
from kdlib.train import Settings

NUMBERS = 1  # raise it when a change to kdlib changes what these runs learn


@dataclass(frozen=True)
class Recipe:
    """A method: which loss teaches which student.

    thin: the narrow student, else the wide one. projected, general: what a thin one starts from.
    weight: 'eq. 14', 'rescaled' (1 to 0) or 'constant'. soft, attention, hidden: which terms of eq. 15 beside the hard labels' are there.
    softened: 'both' sides of the soft loss at the temperature (eq. 3), or 'teacher' alone (eq. 12). last: BERT-PKD's other map.
    """

    loss: str = "adaptive"
    thin: bool = True
    projected: bool = True
    general: bool = False
    weight: str = "eq. 14"
    soft: bool = True
    attention: bool = True
    hidden: bool = True
    softened: str = "both"
    last: bool = False


RECIPES = {
    "undistilled": Recipe("hard", thin=False),
    "distilbert": Recipe("distilbert", thin=False),
    "bert-pkd": Recipe("bert-pkd", thin=False),
    "bert-pkd last": Recipe("bert-pkd", thin=False, last=True),
    "tinybert": Recipe("tinybert", general=True),
    "tinybert task stage": Recipe("tinybert"),
    "adaptive": Recipe(general=True),
    "undistilled thin": Recipe("hard"),
    "undistilled thin, random start": Recipe("hard", projected=False),
    "adaptive, random start": Recipe(projected=False),
    "adaptive, random start, general stage": Recipe(projected=False, general=True),
    "adaptive, projected start": Recipe(),
    "hard + soft": Recipe(general=True, attention=False, hidden=False),
    "hard + attention": Recipe(general=True, soft=False, hidden=False),
    "hard + hidden": Recipe(general=True, soft=False, attention=False),
    "constant weight": Recipe(general=True, weight="constant"),
    "rescaled weight": Recipe(general=True, weight="rescaled"),
    "teacher softened": Recipe(general=True, softened="teacher"),
}
METHODS = ("teacher", "undistilled", "distilbert", "bert-pkd", "tinybert", "adaptive")  # the rows of the paper's table III
STAGES = (
    "undistilled thin, random start",
    "undistilled thin",
    "adaptive, random start",
    "adaptive, random start, general stage",
    "adaptive, projected start",
    "adaptive",
    "tinybert task stage",
    "tinybert",
)
ABLATION = ("hard + soft", "hard + attention", "hard + hidden", "constant weight", "rescaled weight", "teacher softened")
WEIGHTS: dict[str, Callable[[float, "LayerProtocol"], float]] = {
    "eq. 14": lambda progress, protocol: losses.adaptive_weight(progress, protocol.b),
    "rescaled": lambda progress, protocol: losses.rescaled_weight(progress),
    "constant": lambda progress, protocol: protocol.theta,
}
IMITATION = 0.6  # share of TinyBERT's updates spent on layers, before its soft labels


@dataclass(frozen=True)
class LayerProtocol:
    """What a run depends on besides its method and seed. Sizes are sentences; 0 takes all there are.

    One teacher, of seed 0, teaches every student, as in the paper. width, feed_forward, embedding (the width of a factorised table; 0: as
    wide as the rest) and vocabulary (the 'whole' table, or 'seen' word pieces alone) are the thin student's; layers are both students'.
    batch_size is the teacher's. b is eq. 14's bias, theta the constant weight it is compared with.
    """

    dataset: str = "demo"
    encoder: str = "minilm"
    labelled: int = 0
    transfer: int = 0
    dev: int = 0
    test: int = 0
    layers: int = 3
    width: int = 156
    feed_forward: int = 600
    embedding: int = 72
    vocabulary: str = "whole"
    teacher_steps: int = 300
    general_steps: int = 300
    student_steps: int = 600
    batch_size: int = 16
    student_batch: int = 32
    teacher_rate: float = 1e-4
    wide_rate: float = 3e-4
    thin_rate: float = 2e-3
    temperature: float = 2.0
    b: float = 0.0
    theta: float = 0.5

    def __post_init__(self) -> None:
        if self.vocabulary not in ("seen", "whole"):
            raise ValueError(f"vocabulary: expected 'seen' or 'whole', got {self.vocabulary!r}")
        sizes = ("layers", "width", "feed_forward", "teacher_steps", "student_steps", "batch_size", "student_batch")
        whole = dict.fromkeys(("labelled", "transfer", "dev", "test", "general_steps", "embedding"), 0) | dict.fromkeys(sizes, 1)
        experiments.check_numbers(self, whole, ("temperature", "teacher_rate", "wide_rate", "thin_rate"))
        if not 0 <= self.theta <= 1:
            raise ValueError(f"theta: expected a weight from 0 to 1, got {self.theta}")
        if not -math.inf < self.b < math.inf:
            raise ValueError(f"b: expected a number, got {self.b}")


@dataclass
class Ground:
    """What all methods of one protocol stand on: the data, the encoder before any training, and the thin student's word pieces."""

    protocol: LayerProtocol
    parts: Parts
    backbone: Backbone
    pieces: tuple = field(init=False)

    def __post_init__(self) -> None:
        texts = [s.tokens for s in self.parts.labelled + self.parts.transfer]
        whole = self.protocol.vocabulary == "whole"
        self.pieces = (self.backbone.tokenizer, None) if whole else vocabulary.prune(self.backbone.tokenizer, texts)

    @property
    def text(self) -> list:
        """Every sentence that a student may learn from: the labelled ones, and those for transfer."""
        return self.parts.labelled + self.parts.transfer

    def untrained(self) -> Tagger:
        """The pretrained encoder under a new output layer."""
        torch.manual_seed(0)
        names = labels.iob2_labels(self.parts.types)
        return classifier(Tagger(copy.deepcopy(self.backbone.encoder), self.backbone.tokenizer, names)).eval()

    def student(self, recipe: Recipe, seed: int) -> Pupil:
        """A student before its first lesson."""
        torch.manual_seed(seed)
        encoder, protocol, names = self.backbone.encoder, self.protocol, labels.iob2_labels(self.parts.types)
        if not recipe.thin:
            own = backbones.take_layers(encoder, [g - 1 for g in self.map().values()])
            return classifier(Pupil(own, self.backbone.tokenizer, names, encoder.width))
        tokenizer, kept = self.pieces
        own = backbones.thin(encoder, protocol.layers, protocol.width, protocol.feed_forward, protocol.embedding, kept)
        pupil = classifier(Pupil(own, tokenizer, names, encoder.width))
        if recipe.projected:
            start = self._projected(own, kept)
            pupil.projection.weight.data.copy_(start.pop("basis"))
            own.load_state_dict(start)
        return pupil

    def _projected(self, student: backbones.Transformer, kept: Sequence[int] | None) -> dict[str, Tensor]:
        """The weights that `projection.project` gives a student, made once: eigenvectors differ in the last digit from run to run."""
        teacher, sentences = self.untrained(), self.text[:600]
        seen = teacher.encode([s.without_labels() for s in sentences])
        key = cache.digest(NUMBERS, "projected", teacher.encoder, student.config(), seen.windows, self.map(), kept and list(kept))

        def make() -> dict[str, Tensor]:
            batches = [seen.collate(range(i, min(i + 50, len(seen)))) for i in range(0, len(seen), 50)]
            text = [(batch.pieces, batch.piece_mask) for batch in batches]
            basis = projection.project(teacher.encoder, student, self.map(), text, kept)
            return student.state_dict() | {"basis": basis}

        return cache.tensors("projected", key, make)

    def map(self) -> dict[int, int]:
        """Student layer -> teacher layer."""
        return layer_map(self.protocol.layers, len(backbones.stack(self.backbone.encoder.model)))


def ground(protocol: LayerProtocol, parts: Parts) -> Ground:
    """The encoder that `protocol` names, over these data; for 'characters' a Transformer with random weights."""
    if protocol.encoder != "characters":
        return Ground(protocol, parts, backbones.load(protocol.encoder))
    torch.manual_seed(0)
    read = backbones.characters([s.tokens for s in parts.labelled + parts.transfer])
    encoder = backbones.from_scratch(len(read.tokenizer), width=192, layers=6, heads=12, feed_forward=768)
    return Ground(protocol, parts, Backbone("characters", encoder, read.tokenizer))


def trained_teacher(on: Ground) -> tuple[Tagger, Run]:
    """The one teacher, fine-tuned on the labelled sentences by cross entropy; trained or read back."""
    teacher, protocol = on.untrained(), on.protocol
    settings, seen = (
        Settings(protocol.teacher_steps, protocol.batch_size, protocol.teacher_rate),
        teacher.encode(on.parts.labelled),
    )
    run, weights = experiments.trained(teacher, "teacher", seen, _hard, on.parts, settings, [NUMBERS, "softmax"], keep=True)
    teacher.load_state_dict(weights)
    return teacher.eval().requires_grad_(False), run


def _hard(model: Tagger, emissions: Tensor, batch: Batch, progress: float) -> Tensor:
    """Eq. 13 on the labelled sentences of the batch, weighted with their share of its words."""
    known = batch.mask & batch.labelled[:, None]
    if not known.any():
        return emissions.sum() * 0
    return losses.hard_labels(emissions, batch.tags, known) * (known.sum() / batch.mask.sum())


def transformer_loss(pupil: Pupil, batch: Batch, mapped: dict[int, int], attention: bool = True, hidden: bool = True) -> Tensor:
    """sum over the student's layers m = 1 to M of L_attn + L_hidn (eq. 15-16; the paper's sum begins at 0, a layer it does not name)."""
    own, other, mask = pupil.inside, batch.layers, batch.piece_mask
    total = mask.new_zeros((), dtype=torch.float32)
    for m, g in mapped.items():
        if attention:
            total = total + losses.attention_scores(own.scores[m], other.scores[g], mask)
        if hidden:
            total = total + losses.hidden_states(own.hidden[m], other.hidden[g], mask, pupil.projection)
    return total


def _embeddings(pupil: Pupil, batch: Batch) -> Tensor:
    return losses.hidden_states(pupil.inside.hidden[0], batch.layers.hidden[0], batch.piece_mask, pupil.projection)


def objective(recipe: Recipe, on: Ground) -> train.Loss:
    """The loss of a recipe."""
    protocol, mapped = on.protocol, on.map()

    def soft(emissions: Tensor, batch: Batch) -> Tensor:
        student_temperature = 1.0 if recipe.softened == "teacher" else None
        return losses.soft_cross_entropy(emissions, batch.teacher, batch.mask, protocol.temperature, student_temperature)

    def distilbert(pupil: Pupil, emissions: Tensor, batch: Batch, progress: float) -> Tensor:
        last = [h.hidden[max(h.hidden)] for h in (pupil.inside, batch.layers)]
        kd = losses.soft_targets(emissions, batch.teacher, batch.mask, 2.0)
        return 5 * kd + 2 * _hard(pupil, emissions, batch, progress) + losses.cosine(*last, batch.piece_mask)

    def bert_pkd(pupil: Pupil, emissions: Tensor, batch: Batch, progress: float) -> Tensor:
        to = patient_map(protocol.layers, max(mapped.values()), recipe.last)
        layers = [losses.patient(pupil.inside.hidden[m], batch.layers.hidden[g], batch.piece_mask) for m, g in to.items()]
        kd = losses.soft_targets(emissions, batch.teacher, batch.mask, 5.0)
        return 0.5 * _hard(pupil, emissions, batch, progress) + 0.5 * kd + sum(layers)

    def tinybert(pupil: Pupil, emissions: Tensor, batch: Batch, progress: float) -> Tensor:
        if progress < IMITATION:
            return _embeddings(pupil, batch) + transformer_loss(pupil, batch, mapped)
        return losses.soft_cross_entropy(emissions, batch.teacher, batch.mask)

    def adaptive(pupil: Pupil, emissions: Tensor, batch: Batch, progress: float) -> Tensor:
        layers = transformer_loss(pupil, batch, mapped, recipe.attention, recipe.hidden)
        taught = soft(emissions, batch) if recipe.soft else emissions.new_zeros(())
        theta = WEIGHTS[recipe.weight](progress, protocol)
        return losses.adaptive(taught, _hard(pupil, emissions, batch, progress), layers, theta)

    return {"hard": _hard, "distilbert": distilbert, "bert-pkd": bert_pkd, "tinybert": tinybert, "adaptive": adaptive}[
        recipe.loss
    ]


def generally_distilled(on: Ground, recipe: Recipe, seed: int) -> dict[str, Tensor]:
    """Stage 1: the weights of a thin student after it has learnt the layers of the un-fine-tuned encoder on raw text, no labels."""
    pupil, teacher, protocol = on.student(recipe, seed), on.untrained(), on.protocol
    text = [s.without_labels() for s in on.text]
    if len(text) < 2:
        raise ValueError(f"expected two sentences of text or more, one to learn from and one to choose by, got {len(text)}")
    cut = len(text) - max(1, len(text) // 50)  # a little text stays unread, to choose the best weights by
    seen, held_out = (teachers.with_layers(pupil.encode(part), part, teacher) for part in (text[:cut], text[cut:]))
    settings = Settings(protocol.general_steps, protocol.student_batch, protocol.thin_rate, seed=seed)

    def loss(pupil: Pupil, emissions: Tensor, batch: Batch, progress: float) -> Tensor:
        return _embeddings(pupil, batch) + transformer_loss(pupil, batch, on.map())

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        pupil.eval()
        total, device = 0.0, next(pupil.parameters()).device
        for rows, batch in in_turn(held_out):
            batch = batch.to(device)
            with watched(pupil.encoder) as pupil.inside:
                emissions = pupil(batch)
            total += len(rows) * loss(pupil, emissions, batch, 1.0).item()
        pupil.train()
        return {"minus_held_out_loss": -total / len(held_out)}

    windows = teacher.encode(text).windows  # a student with fewer pieces numbers them in its own way
    key = cache.digest(NUMBERS, "general", asdict(settings), pupil, teacher, seen.content(), held_out.content(), windows)

    def make() -> dict[str, Tensor]:
        checkpoint = cache.path("checkpoints", f"{key}.pt")
        train.fit(pupil, seen, loss, evaluate, settings, checkpoint)
        checkpoint.unlink(missing_ok=True)
        return {name: w.cpu() for name, w in pupil.state_dict().items()}

    return cache.tensors("weights", key, make)


def run(method: str, seed: int, on: Ground) -> Run:
    """Train the method with one seed, or read back what the same code made of the same data and settings before."""
    if method == "teacher":
        return trained_teacher(on)[1]
    if method not in RECIPES:
        raise ValueError(f"method: expected one of {('teacher', *RECIPES)}, got {method!r}")
    return _taught(method, seed, on)[1]


def trained_student(method: str, seed: int, on: Ground) -> tuple[Tagger, Run]:
    """A thin student and its results, trained or read back. ValueError for a wide one, whose weights are not kept."""
    thin = [name for name, recipe in RECIPES.items() if recipe.thin]
    if method not in thin:
        raise ValueError(f"method: expected one of {thin}, got {method!r}")
    pupil, found = _taught(method, seed, on)
    return pupil.eval().graduate(), found


def _taught(method: str, seed: int, on: Ground) -> tuple[Pupil, Run]:
    """The pupil of a method, as it was best on dev if it is thin, and its results."""
    recipe, protocol = RECIPES[method], on.protocol
    pupil = on.student(recipe, seed)
    if recipe.general and protocol.general_steps:
        pupil.load_state_dict(generally_distilled(on, recipe, seed))
    rate = protocol.thin_rate if recipe.thin else protocol.wide_rate
    settings = Settings(protocol.student_steps, protocol.student_batch, rate, seed=seed)
    more, seen, loss = [NUMBERS], pupil.encode(on.parts.labelled), _hard
    if recipe.loss != "hard":
        teacher, _ = trained_teacher(on)
        seen = teachers.with_teacher(pupil.encode(on.text), on.text, teacher)
        seen, loss = teachers.with_layers(seen, on.text, teacher), objective(recipe, on)
        knobs = {"eq. 14": protocol.b, "constant": protocol.theta, "rescaled": 0.0}[recipe.weight]
        more += [teacher, asdict(recipe), knobs, protocol.temperature]
    found, weights = experiments.trained(pupil, method, seen, loss, on.parts, settings, more, keep=recipe.thin)
    if weights:
        pupil.load_state_dict(weights)
    return pupil, found


def runs(methods: Iterable[str], seeds: Sequence[int], on: Ground, show: bool = True) -> list[Run]:
    """Every method with every seed, one line printed for each, the one teacher once."""
    done, methods = [], list(methods)
    for seed in seeds:
        for method in methods:
            if method != "teacher" or seed == seeds[0]:
                done.append(run(method, seed, on))
                if show:
                    print(reports.line(done[-1], on.parts), flush=True)
    return done
