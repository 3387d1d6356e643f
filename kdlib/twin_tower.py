"""The student of the GLiNER -> LSTM paper (its section 5): words and labels meet in a dot product.

    word tower     word pieces -> mean of their embeddings -> BiLSTM         one vector a word
    label tower    the same means -> linear map     one vector a label, and a learnt one for "none"
    score          dot product of the two; softmax over the sentence's labels and "none"

The paper softmaxes over "all its labels"; as most words have none, "none" is a class here, number
0. Labels are words, so any label can be asked for, one never seen in training too: it is encoded
from its pieces.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kdlib.batches import in_turn
from kdlib.crf import Chain, reversed_rows
from kdlib.models import filled
from kdlib.text import calls
from kdlib.text.files import fits, saving, shapes_of, whole
from kdlib.text.pieces import Pieces
from kdlib.text.tags import WORD, Sentence, Span, word_runs

CONFIG = "twin_tower.json"


@dataclass
class Bags:
    """Texts as bags of word pieces: `pieces` of all of them in a row, and where each text
    `starts`."""

    pieces: Tensor
    starts: Tensor

    def to(self, device: torch.device | str) -> "Bags":
        """The same on another device."""
        return Bags(self.pieces.to(device), self.starts.to(device))


@dataclass
class OpenBatch:
    """B sentences, each asked for some of the batch's U labels.

    words: bags of the words that `mask` [B, L] marks, row by row; labels: bags of the U labels;
    columns: for each sentence those of "none" (0) and of its own labels, in its order; asked [B, 1
    + U], True at these; tags [B, L], 0 for "none"; labelled [B]; teacher [B, L, 1 + U] log
    probabilities, where one was asked.
    """

    words: Bags
    labels: Bags
    columns: list[Tensor]
    mask: Tensor
    asked: Tensor
    tags: Tensor
    labelled: Tensor
    teacher: Tensor | None = None

    def to(self, device: torch.device | str) -> "OpenBatch":
        """The same batch on another device."""
        names = ("words", "labels", "mask", "asked", "tags", "labelled", "teacher")
        parts = {k: getattr(self, k) for k in names if getattr(self, k) is not None}
        return replace(self, **{k: part.to(device) for k, part in parts.items()})


@dataclass
class OpenRows:
    """Sentences as numbers, with the labels each is asked for; one list entry a sentence."""

    words: list[list[tuple[int, ...]]]  # pieces of every word
    asked: list[tuple[str, ...]]
    tags: list[list[int] | None]  # per word 0, or 1 + the label's place in `asked`
    label_pieces: dict[str, tuple[int, ...]]
    teacher: list[Tensor] | None = None  # [L, 1 + labels] probabilities

    @property
    def lengths(self) -> list[int]:
        """Words of each sentence."""
        return [len(words) for words in self.words]

    def content(self) -> list[Any]:
        """What a digest needs to know these sentences."""
        return [self.words, self.asked, self.tags, self.label_pieces, self.teacher]

    def collate(self, rows: Sequence[int]) -> OpenBatch:
        """The given sentences as one padded batch."""
        labels = list(dict.fromkeys(label for r in rows for label in self.asked[r]))
        column = {label: 1 + i for i, label in enumerate(labels)}
        lengths = torch.tensor([len(self.words[r]) for r in rows])
        shape = len(rows), int(lengths.max())
        asked = torch.zeros(len(rows), 1 + len(labels), dtype=torch.bool)
        tags, teacher = torch.zeros(shape, dtype=torch.long), None
        if self.teacher is not None:
            teacher = torch.full((*shape, 1 + len(labels)), float("-inf"))
        columns = [torch.tensor([0, *(column[label] for label in self.asked[r])]) for r in rows]
        for i, (r, own) in enumerate(zip(rows, columns, strict=True)):
            asked[i, own] = True
            if self.tags[r] is not None:
                tags[i, : lengths[i]] = own[torch.tensor(self.tags[r])]
            if teacher is not None:
                teacher[i, : lengths[i], own] = self.teacher[r].log()
        return OpenBatch(
            _bags([pieces for r in rows for pieces in self.words[r]]),
            _bags([self.label_pieces[label] for label in labels]),
            columns,
            torch.arange(shape[1]) < lengths[:, None],
            asked,
            tags,
            torch.tensor([self.tags[r] is not None for r in rows]),
            teacher,
        )


def _bags(texts: Sequence[Sequence[int]]) -> Bags:
    pieces = torch.tensor([piece for text in texts for piece in text], dtype=torch.long)
    sizes = torch.tensor([0, *map(len, texts)], dtype=torch.long)
    return Bags(pieces, sizes.cumsum(0)[:-1])


class TwinTower(nn.Module):
    """A small tagger for any labels, with GLiNER's own calls: `predict_entities`, `inference`,
    `save_pretrained`, `from_pretrained`.

    A word or label is the mean of its word pieces' embeddings. What the tokenizer has no pieces for
    (emoji, a script it never saw) is hashed into one of `buckets` further embeddings, so two such
    words are told apart and no word is lost.
    """

    asks = True  # it must be told which labels to look for

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        embedding: int = 128,
        hidden: int = 128,
        layers: int = 2,
        buckets: int = 512,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        if buckets < 1:
            raise ValueError(f"buckets: expected at least 1, got {buckets}")
        self.tokenizer = tokenizer
        own = tokenizer.backend_tokenizer.to_str()
        self.pieces = Pieces(own, tokenizer.unk_token_id, buckets)
        self.config = {
            "embedding": embedding,
            "hidden": hidden,
            "layers": layers,
            "buckets": buckets,
            "dropout": dropout,
        }
        self.embedding = nn.EmbeddingBag(self.pieces.size + buckets, embedding, mode="mean")
        widths = [embedding] + [2 * hidden] * (layers - 1)
        self.forwards = nn.ModuleList(nn.LSTM(width, hidden, batch_first=True) for width in widths)
        self.backwards = nn.ModuleList(nn.LSTM(width, hidden, batch_first=True) for width in widths)
        self.label = nn.Linear(embedding, 2 * hidden)
        self.none = nn.Parameter(torch.zeros(2 * hidden))
        self.dropout = nn.Dropout(dropout)

    @property
    def parameters_in_all(self) -> int:
        """Number of trainable scalars."""
        return sum(p.numel() for p in self.parameters())

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """What is trained, by the rate it asks for: all at the encoder's."""
        return {"encoder": list(self.parameters())}

    def chain(self, scores: Tensor) -> Chain:
        """This model's side of a comparison: a softmax per word over "none" and the labels."""
        return Chain(None, scores, softmax=True)

    def forward(self, batch: OpenBatch) -> Tensor:
        """Scores [B, L, 1 + U] of "none" and the batch's labels; -inf for labels a sentence is not
        asked for."""
        labels = self.label_vectors(batch.labels)
        scores = self.word_vectors(batch.words, batch.mask) @ labels.T
        return scores.masked_fill(~batch.asked[:, None], float("-inf"))

    def word_vectors(self, words: Bags, mask: Tensor) -> Tensor:
        """The word tower: [B, L, 2 * hidden].

        The backward direction reads each sentence reversed by itself, so padding stays last for
        both and reaches neither: the same numbers as a packed bidirectional LSTM, without the
        slower kernel that packing asks for.
        """
        embedded = self.dropout(self.embedding(words.pieces, words.starts))
        hidden = embedded.new_zeros(*mask.shape, embedded.shape[1])
        hidden[mask] = embedded
        lengths = mask.sum(1)
        for ahead, back in zip(self.forwards, self.backwards, strict=True):
            backwards = back(reversed_rows(hidden, lengths))[0]
            hidden = torch.cat([ahead(hidden)[0], reversed_rows(backwards, lengths)], -1)
        return self.dropout(hidden)

    def label_vectors(self, labels: Bags) -> Tensor:
        """The label tower: [1 + U, 2 * hidden], "none" first."""
        return torch.cat(
            [self.none[None], self.label(self.embedding(labels.pieces, labels.starts))]
        )

    def encode(
        self,
        sentences: Sequence[Sentence],
        asked: Sequence[Sequence[str]],
        teacher: list[Tensor] | None = None,
    ) -> OpenRows:
        """Sentences as this model reads them, each with the labels it is asked for; an entity of
        another label counts as none."""
        tags = []
        for sentence, labels in zip(sentences, asked, strict=True):
            place = {label: 1 + i for i, label in enumerate(labels)}
            own = None if sentence.spans is None else [0] * len(sentence.tokens)
            for start, end, kind in sentence.spans or ():
                own[start:end] = [place.get(kind, 0)] * (end - start)
            tags.append(own)
        pieces = {label: self.pieces(label) for labels in asked for label in labels}
        return OpenRows(
            [[self.pieces(w) for w in s.tokens] for s in sentences],
            list(map(tuple, asked)),
            tags,
            pieces,
            teacher,
        )

    def predict(self, data: OpenRows) -> list[tuple[Span, ...]]:
        """The entities of every sentence, of the labels it is asked for: runs of equal words."""
        found = zip(self.word_labels(data), data.asked, strict=True)
        return [
            tuple(Span(start, end, asked[n - 1]) for start, end, n in word_runs(labels))
            for labels, asked in found
        ]

    @torch.inference_mode()
    def word_labels(self, data: OpenRows) -> list[list[int]]:
        """Per word 0, or 1 + the label's place among those its sentence is asked for."""
        found: list[list[int]] = [[] for _ in data.words]
        with self._at_rest():
            for rows, batch in in_turn(data):
                probabilities = self(batch.to(self.none.device)).softmax(-1).cpu()
                for r, own, columns in zip(rows, probabilities, batch.columns, strict=True):
                    _, best = _decide(own[: len(data.words[r]), columns], 0.5)
                    found[r] = best.tolist()
        return found

    def predict_entities(
        self,
        text: str,
        labels: Sequence[str],
        threshold: float = 0.5,
        flat_ner: bool = True,
        multi_label: bool = False,
    ) -> list[dict[str, Any]]:
        """The entities of one text, as `inference` finds them."""
        if not isinstance(text, str):
            raise TypeError(f"text: expected one string, got {type(text).__name__}")
        return self.inference([text], labels, threshold, flat_ner, multi_label)[0]

    @torch.inference_mode()
    def inference(
        self,
        texts: str | Sequence[str],
        labels: Sequence[str],
        threshold: float = 0.5,
        flat_ner: bool = True,
        multi_label: bool = False,
        batch_size: int = 32,
    ) -> list[list[dict[str, Any]]]:
        """Per text its entities, in GLiNER's form: {"start", "end", "text", "label", "score"},
        characters, end exclusive.

        An entity is a run of words that have the same best label and are more than `threshold`
        likely to be any entity at all; `score` is the mean of that probability. Texts may be of any
        length, empty too. Entities never overlap: `flat_ner=False` and `multi_label=True` are
        errors. A label asked for twice counts once; with no labels nothing is found.
        """
        texts, labels = [texts] if isinstance(texts, str) else list(texts), calls.labels_of(labels)
        calls.check(texts, threshold, flat_ner, multi_label, batch_size)
        found: list[list[dict[str, Any]]] = [[] for _ in texts]
        words = [[(m.start(), m.end()) for m in WORD.finditer(text)] for text in texts]
        rows = sorted((i for i, w in enumerate(words) if w), key=lambda i: len(words[i]))
        if not labels or not rows:
            return found
        device = self.none.device
        with self._at_rest():
            asked = _bags([self.pieces(label) for label in labels]).to(device)
            towers = self.label_vectors(asked).T
            for part in calls.batches(rows, [len(w) for w in words], batch_size):
                lengths = [len(words[i]) for i in part]
                ends = torch.tensor(lengths, device=device)[:, None]
                mask = torch.arange(max(lengths), device=device) < ends
                bags = _bags([self.pieces(texts[i][a:b]) for i in part for a, b in words[i]])
                scores = self.word_vectors(bags.to(device), mask) @ towers
                likely, best = (t.tolist() for t in _decide(scores.softmax(-1), threshold))
                for i, p, b in zip(part, likely, best, strict=True):
                    found[i] = calls.entities(texts[i], words[i], p, b, labels)
        return found

    @contextlib.contextmanager
    def _at_rest(self) -> Iterator[None]:
        """In evaluation mode inside the block, and as it was after it."""
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write twin_tower.json, model.safetensors and the tokenizer into `folder`, whole or not at
        all."""
        with saving(folder) as aside:
            self.tokenizer.save_pretrained(aside)
            weights = {k: v.contiguous() for k, v in self.state_dict().items()}
            save_file(weights, aside / "model.safetensors")
            (aside / CONFIG).write_text(json.dumps(self.config, indent=1), encoding="utf8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "TwinTower":
        """Read back what `save_pretrained` wrote; FileNotFoundError if it is not there, ValueError
        if its files are damaged."""
        folder = Path(folder).expanduser()
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(
                f"{folder}: expected a folder written by TwinTower.save_pretrained, with a {CONFIG}"
            )
        with whole(folder, "TwinTower"):
            config = json.loads((folder / CONFIG).read_text(encoding="utf8"))
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            there = shapes_of(folder / "model.safetensors")
            if config["layers"] > len(there):
                raise ValueError(f"expected at most {len(there)} layers, got {config['layers']}")
            with torch.device("meta"):  # shapes, and no memory
                skeleton = cls(tokenizer, **config).state_dict()
            fits(there, {name: tuple(w.shape) for name, w in skeleton.items()})
            return filled(cls(tokenizer, **config), folder / "model.safetensors")


def _decide(probabilities: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Of [..., 1 + labels]: how likely a word is part of an entity; its label, from 1, or 0 where
    that is not over `threshold`."""
    likely = 1 - probabilities[..., 0]
    best = probabilities[..., 1:].argmax(-1) + 1
    return likely, best * (likely > threshold)
