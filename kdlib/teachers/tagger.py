"""A tagger as a teacher, and any Hugging Face token classifier as a tagger."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification, AutoTokenizer

from kdlib.methods import LAYERS, LIVE, PATHS, SEQUENCES, WORDS
from kdlib.models import Tagger, Transformer
from kdlib.students.pretrained import quiet
from kdlib.text.tags import Sentence, Span, iob2_labels, split_tag


class Taught:
    """A CRF or softmax tagger as a teacher: it tells emissions and paths; one that sees no letter
    case can learn from its student too, and where it is a Transformer tell what its layers hold.

    said: emissions by the sentences asked for, as a study asks for the same again and again.
    """

    def __init__(self, tagger: Tagger) -> None:
        self.tagger = tagger.eval().requires_grad_(False)
        self.tells = tells(isinstance(tagger.encoder, Transformer), tagger.encoder.reads_shapes)
        self.labels, self.crf, self.softmax = tagger.labels, tagger.crf, tagger.softmax
        self.said: dict[tuple[tuple[str, ...], ...], list[Tensor]] = {}

    def entities(self, sentences: Sequence[Sentence]) -> list[tuple[Span, ...]]:
        """Its own output."""
        return self.tagger.predict(sentences)

    def emissions(self, sentences: Sequence[Sentence]) -> list[Tensor]:
        """Scores [L, K] of IOB2 labels, before its CRF."""
        return self.tagger.emissions(self.tagger.encode([s.without_labels() for s in sentences]))


def tells(transformer: bool, cased: bool) -> frozenset[str]:
    """What a tagger tells: one that sees letter case may read other input than its student, and is
    neither compared with it layer by layer nor taught by it."""
    inside = set() if cased else {LIVE} | ({LAYERS} if transformer else set())
    return frozenset({WORDS, SEQUENCES, PATHS} | inside)


def words_of(labels: Sequence[str], asked: Sequence[str], marginals: Tensor) -> Tensor:
    """Marginals [L, K] of IOB2 labels as a distribution [L, 1 + asked] over "none" and types: what
    a twin tower learns from. A type that is not asked for counts as none.
    """
    out = marginals.new_zeros(len(marginals), 1 + len(asked))
    column = {kind: 1 + c for c, kind in enumerate(asked)}
    for k, label in enumerate(labels):
        out[:, column.get(split_tag(label)[1], 0)] += marginals[:, k]
    return out


class Logits(Transformer):
    """A Hugging Face token classifier as an encoder: its vectors are the logits of its own
    labels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.base_model)
        self.classifier, self.width = model, model.config.num_labels

    def forward(self, pieces: Tensor, piece_mask: Tensor) -> Tensor:
        """[N, P] -> [N, P, labels]."""
        return self.classifier(input_ids=pieces, attention_mask=piece_mask.long()).logits


def from_hugging_face(name: str, types: Sequence[str]) -> Tagger:
    """The token classifier of a folder or hub name as a softmax tagger over the IOB2 labels of
    `types`, each word read off its first piece.

    ValueError unless its labels are IOB2 and just those; OSError if it cannot be had. Weights come
    from safetensors alone, and no code of a repository is run.
    """
    name = str(Path(name).expanduser()) if name.startswith("~") else name
    if not Path(name).is_dir() and name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no token classifier at {name!r}: expected a folder or a hub name")
    safe = {"trust_remote_code": False}
    with quiet():
        model = AutoModelForTokenClassification.from_pretrained(
            name, use_safetensors=True, dtype=torch.float32, **safe
        )
        tokenizer = AutoTokenizer.from_pretrained(name, **safe)
    if not tokenizer.is_fast:
        raise OSError(f"{name!r} has no fast tokenizer, which is needed to align words with pieces")
    own = [model.config.id2label[k] for k in range(model.config.num_labels)]
    wanted = iob2_labels(types)
    if sorted(own) != sorted(wanted):
        raise ValueError(f"{name}: expected a classifier with the labels {wanted}, got {own}")
    tagger = Tagger(Logits(model), tokenizer, wanted, dropout=0.0, softmax=True)
    with torch.no_grad():
        tagger.output.weight.copy_(torch.eye(len(own))[[own.index(label) for label in wanted]])
        tagger.output.bias.zero_()
    return tagger.eval()
