"""GLiNER as a teacher: load one or train one, and turn its scores into soft labels.

GLiNER scores a span for a label with a sigmoid (span modes), or a word for a label as start, end
and inside of an entity (token mode). The student wants a distribution per word over the labels and
"none". The paper does not say how one becomes the other; here:

    word t, label c      s_tc = max over the spans that cover t of the score of (span, c)
    or, in token mode    s_tc = sigmoid(inside score of t for c)
    "none"               1 - max_c s_tc; the labels share max_c s_tc in proportion to their s_tc

which is `by_covering_span`, `Answer.inside` and `soft_labels`.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor

from kdlib.crf import LinearChainCRF, legal_iob2
from kdlib.methods import PATHS, SEQUENCES, WORDS
from kdlib.students.pretrained import minilm, quiet
from kdlib.text.tags import Sentence, Span, iob2_labels

if TYPE_CHECKING:  # it is slow to import, and most runs need none: done where one is made
    from gliner import GLiNER

READINGS = ("spans", "tokens")
BATCH = 32  # sentences asked at once
WIDEST = 12  # words of the widest span scored in token mode, as in GLiNER's configurations


# what gliner raises for folders that are none of its own, or damaged
FAULTS = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, EOFError)
FAULTS += (SafetensorError, UnpicklingError)


@dataclass(frozen=True)
class Recipe:
    """How to train a GLiNER on a pretrained encoder with gliner's own trainer.

    mode: 'token_level', or one of gliner's span modes such as 'markerV0'. asked: how many labels a
    training sentence is asked for (0: all). The label's own first piece stands for it (gliner's
    `embed_ent_token=False`): a new marker would have to learn to look at it first, which takes most
    of a short training.
    """

    steps: int = 400
    batch_size: int = 16
    encoder_rate: float = 2e-4
    rate: float = 1e-3
    hidden: int = 384
    asked: int = 10
    mode: str = "token_level"
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """What a GLiNER says of one sentence, `asked` for C labels: its entities, and scores [L, C]
    between 0 and 1.

    covering: the best span over each word; inside: the word's own score, None but in token mode;
    before: the best span over it that began before it.
    """

    asked: tuple[str, ...]
    entities: tuple[Span, ...]
    covering: Tensor
    inside: Tensor | None
    before: Tensor


def load(name: str) -> GLiNER:
    """A GLiNER from a folder or the hub, such as 'urchade/gliner_small-v2.1'; OSError, naming what
    would work, if it cannot be had."""
    from gliner import GLiNER

    name = str(Path(name).expanduser()) if name.startswith("~") else name
    if not Path(name).is_dir() and name.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"no GLiNER at {name!r}: expected a folder with gliner_config.json, or a hub name"
        )
    try:
        folder = (
            Path(name) if Path(name).is_dir() else Path(huggingface_hub.snapshot_download(name))
        )
        _refuse_code(folder)
        with quiet():
            return GLiNER.from_pretrained(str(folder)).eval()
    except FAULTS as error:
        reason = (str(error).splitlines() or [""])[0]
        raise OSError(
            f"cannot load the GLiNER {name!r} ({type(error).__name__}: {reason}). Expected a "
            "folder "
            "with gliner_config.json and weights, a hub name while the hub can be reached, or "
            "'train' to train one here"
        ) from error


def _refuse_code(folder: Path) -> None:
    """OSError where a JSON file of the folder names code to run: gliner would run it unasked, as it
    trusts remote code on behalf of its encoder."""

    def names_code(value: object) -> bool:
        if isinstance(value, dict):
            named = isinstance(value.get("auto_map"), (dict, list, str))
            return named or any(map(names_code, value.values()))
        return isinstance(value, list) and any(map(names_code, value))

    for file in sorted(folder.rglob("*.json")):
        if names_code(json.loads(file.read_text(encoding="utf8"))):
            raise OSError(f"{file}: expected a model of data alone, got code to run (auto_map)")


def train(
    sentences: Sequence[Sentence],
    asked: Sequence[Sequence[str]],
    recipe: Recipe,
    encoder: str = "minilm",
) -> GLiNER:
    """A GLiNER trained on labelled sentences by gliner's own `train_model`; entities of types not
    asked for are left out."""
    unlabelled = next((s for s in sentences if s.spans is None), None)
    if unlabelled is not None or not sentences:
        raise ValueError(
            f"expected labelled sentences to train a GLiNER on, got {unlabelled or 'none'}"
        )
    source = str(minilm()) if encoder == "minilm" else encoder
    model = _new(source, recipe)
    pairs = enumerate(zip(sentences, asked, strict=True))
    examples = [_example(s, labels, recipe, i) for i, (s, labels) in pairs]
    report = io.StringIO()  # the trainer prints its own summary
    with tempfile.TemporaryDirectory() as scratch, quiet(), contextlib.redirect_stdout(report):
        model.train_model(
            examples,
            None,
            output_dir=scratch,
            max_steps=recipe.steps,
            per_device_train_batch_size=recipe.batch_size,
            learning_rate=recipe.encoder_rate,
            others_lr=recipe.rate,
            focal_loss_alpha=0.75,
            focal_loss_gamma=2,
            loss_reduction="mean",
            optim="adamw_torch_fused",
            seed=recipe.seed,
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
    return model.cpu().eval()


def _new(source: str, recipe: Recipe) -> GLiNER:
    from gliner import GLiNER

    kind = "token" if recipe.mode == "token_level" else "span"
    config = {
        "model_type": f"gliner_uni_encoder_{kind}",
        "model_name": source,
        "hidden_size": recipe.hidden,
        "span_mode": recipe.mode,
        "max_width": WIDEST,
        "dropout": 0.1,
        "embed_ent_token": False,
        "num_rnn_layers": 0,
        "max_types": 100,
        "max_len": 512,
    }
    transformers.set_seed(recipe.seed)
    with quiet():
        return GLiNER.from_config(config)


def _example(
    sentence: Sentence, labels: Sequence[str], recipe: Recipe, number: int
) -> dict[str, Any]:
    """A sentence as gliner's trainer reads it: last word inclusive; its own labels and as many
    others as make `recipe.asked`."""
    rng = random.Random(f"{recipe.seed} {number}")
    own = sorted({s.type for s in sentence.spans} & set(labels))
    others = sorted(set(labels) - set(own))
    more = max(0, recipe.asked - len(own)) if recipe.asked else len(others)
    chosen = own + rng.sample(others, min(more, len(others)))
    rng.shuffle(chosen)
    spans = [[s.start, s.end - 1, s.type] for s in sentence.spans if s.type in labels]
    return {"tokenized_text": list(sentence.tokens), "ner": spans, "ner_labels": chosen}


def ask(
    model: GLiNER, sentences: Sequence[Sentence], asked: Sequence[Sequence[str]]
) -> list[Answer]:
    """What the model says of every sentence, in order, through its public batch API.

    Asked in batches of like length; half precision is kept, ample for a score. ValueError for a
    sentence that the model would cut: more words than its `max_len`, or more pieces than its
    encoder reads.
    """
    repeated = next((labels for labels in asked if len(set(labels)) < len(labels)), None)
    if len(sentences) != len(asked) or repeated is not None:
        raise ValueError(
            f"expected distinct labels for each of {len(sentences)} sentences, "
            f"got {repeated or len(asked)}"
        )
    found: dict[int, Answer] = {}
    rows = sorted(range(len(sentences)), key=lambda i: (len(asked[i]), len(sentences[i].tokens)))
    for at in range(0, len(rows), BATCH):
        part = rows[at : at + BATCH]
        said = _ask(model, [sentences[i] for i in part], [asked[i] for i in part])
        found |= dict(zip(part, said, strict=True))
    return [found[i] for i in range(len(sentences))]


def _ask(
    model: GLiNER, sentences: Sequence[Sentence], asked: Sequence[Sequence[str]]
) -> Iterator[Answer]:
    """One batch through gliner's own steps."""
    words = [list(s.tokens) for s in sentences]
    batch = model.collate_batch(model.prepare_base_input(words), [list(labels) for labels in asked])
    _check_whole(batch, words, model.data_processor.transformer_tokenizer.model_max_length)
    out = model.run_batch(batch, threshold=0.5)
    decoded = model.decode_batch(out, batch, threshold=0.5)
    by_token = model.config.span_mode == "token_level"
    for own, labels, logits, found in zip(words, asked, out.logits, decoded, strict=True):
        place = {label: c for c, label in enumerate(labels)}
        entities = sorted([e.start, e.end + 1, place[e.entity_type]] for e in found if labels)
        scores = logits[: len(own)].sigmoid().cpu()  # token mode [L, C, 3], span modes [L, W, C]
        scores = scores[:, : len(labels)] if by_token else scores[..., : len(labels)]
        spans = span_scores(scores) if by_token else scores
        covering, before = by_covering_span(spans), by_covering_span(spans, first=1)
        for e in found if labels else ():  # a token mode may decode one wider than any scored span
            covering[e.start : e.end + 1, place[e.entity_type]].clamp_(min=e.score)
        inside = scores[..., 2].half().float() if by_token else None
        yield Answer(
            tuple(labels),
            tuple(Span(start, end, labels[c]) for start, end, c in entities),
            covering.half().float(),
            inside,
            before.half().float(),
        )


def _check_whole(batch: dict[str, Any], words: Sequence[Sequence[str]], most_pieces: int) -> None:
    """ValueError if gliner has cut a sentence: it does so without a word."""
    for row, own in enumerate(words):
        full = int(batch["attention_mask"][row].sum()) >= most_pieces
        seen = int(batch["words_mask"][row].max()) if full else len(batch["tokens"][row])
        if seen < len(own):
            begins = " ".join(own)[:40]
            raise ValueError(
                f"{begins!r}...: this GLiNER reads {seen} of its {len(own)} words with these "
                "labels; expected shorter text"
            )


def span_scores(scores: Tensor, widest: int = WIDEST) -> Tensor:
    """Token mode's score of every span [L, W, C], as gliner decodes it: the least of its start, its
    end and all its insides.

    Of start, end and inside scores [L, C, 3]; span (t, w) covers the words t to t + w; 0 for one
    that leaves the sentence.
    """
    start, end, inside = scores.unbind(-1)
    length = len(start)
    out = scores.new_zeros(length, min(widest, length), start.shape[1])
    least = inside
    for width in range(out.shape[1]):
        if width:
            least = torch.minimum(least[:-1], inside[width:])
        out[: length - width, width] = torch.minimum(
            least, torch.minimum(start[: length - width], end[width:])
        )
    return out


def by_covering_span(spans: Tensor, first: int = 0) -> Tensor:
    """[L, C]: for each word the best score among the spans [L, W, C] that cover it; with `first` 1,
    among those that began before it."""
    length, widest, _ = spans.shape
    best = torch.zeros_like(spans[:, 0])
    for width in range(min(widest, length)):
        inside = spans[: length - width, width]
        for offset in range(first, width + 1):
            own = best[offset : offset + length - width]
            torch.maximum(own, inside, out=own)
    return best


def soft_labels(scores: Tensor) -> Tensor:
    """Distribution [L, 1 + C] over "none" and the labels: p_none = 1 - max_c s_c, p_c = max_c s_c *
    s_c / sum_c s_c.

    Of scores [L, C] between 0 and 1. A word is then more than `threshold` likely to be part of an
    entity exactly where GLiNER scores some label above `threshold`, and the likeliest label is
    GLiNER's: its decisions survive. Dividing (1 - max, s_1, ..., s_C) by its sum instead would not
    do that: with many labels at 0.2 each, "none" drowns.
    """
    if scores.numel() and not (scores.min() >= 0 and scores.max() <= 1):
        raise ValueError(
            f"scores: expected numbers from 0 to 1, got {scores.min():.3g} to {scores.max():.3g}"
        )
    if not scores.shape[-1]:
        return scores.new_ones(len(scores), 1)
    best, together = scores.amax(-1, keepdim=True), scores.sum(-1, keepdim=True)
    return torch.cat(
        [1 - best, best * scores / together.clamp(min=torch.finfo(scores.dtype).tiny)], -1
    )


class Told:
    """A GLiNER as a teacher: what it said of every sentence of a study, by the sentence's words.

    types: what a tagger learns to find; reading: which scores become soft labels, 'spans' or, in
    token mode, 'tokens'. It tells taggers IOB2 emissions under a CRF held at 0.
    """

    tells, softmax = frozenset({WORDS, SEQUENCES, PATHS}), True

    def __init__(
        self,
        answers: dict[tuple[str, ...], Answer],
        types: Sequence[str],
        reading: str = "spans",
        parameters: int = 0,
    ) -> None:
        if reading not in READINGS:
            raise ValueError(f"reading: expected one of {READINGS}, got {reading!r}")
        if reading == "tokens" and any(a.inside is None for a in answers.values()):
            raise ValueError(
                "reading: expected 'spans' for a teacher that scores no words, got 'tokens'"
            )
        self.answers, self.reading, self.parameters = answers, reading, parameters
        self.labels = iob2_labels(types)
        self.crf = LinearChainCRF(len(self.labels), legal_iob2(self.labels)).requires_grad_(False)
        for parameter in self.crf.parameters():
            parameter.zero_()

    def entities(self, sentences: Iterable[Sentence]) -> list[tuple[Span, ...]]:
        """Its own output."""
        return [self.answers[s.tokens].entities for s in sentences]

    def words(self, sentences: Iterable[Sentence]) -> list[Tensor]:
        """Distributions [L, 1 + labels] over "none" and the labels each sentence is asked for."""
        found = [self.answers[s.tokens] for s in sentences]
        return [soft_labels(a.covering if self.reading == "spans" else a.inside) for a in found]

    def emissions(self, sentences: Iterable[Sentence]) -> list[Tensor]:
        """Log probabilities [L, K] over IOB2 labels that decode to its own entities.

        Our choice: a type's probability is all B's where no scored span over the word began before
        it, half of it I's where the best one did; then the label that the decoded entities give the
        word changes places with the likeliest, where it is not that itself.
        """
        sentences = list(sentences)
        return [
            self._iob2(s, words) for s, words in zip(sentences, self.words(sentences), strict=True)
        ]

    def _iob2(self, sentence: Sentence, words: Tensor) -> Tensor:
        answer, number = self.answers[sentence.tokens], {x: k for k, x in enumerate(self.labels)}
        p = words.new_zeros(len(words), len(self.labels))
        p[:, 0] = words[:, 0]
        goes_on = answer.before / answer.covering.clamp_min(1e-9)
        for c, kind in enumerate(answer.asked):
            p[:, number[f"B-{kind}"]] = words[:, 1 + c] * (1 - goes_on[:, c] / 2)
            p[:, number[f"I-{kind}"]] = words[:, 1 + c] * goes_on[:, c] / 2
        rows = torch.arange(len(p))
        decoded = torch.tensor([number[t] for t in replace(sentence, spans=answer.entities).tags])
        best, swapped = p.argmax(1), p.clone()
        swapped[rows, decoded], swapped[rows, best] = p[rows, best], p[rows, decoded]
        return swapped.log()
