"""The tagger that every CRF method shares: encoder -> one vector a word -> emissions -> CRF. The other model is `TwinTower`."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kdlib import backbones
from kdlib.batches import Batch, Encoded, encode, in_turn
from kdlib.cache import saving
from kdlib.crf import LinearChainCRF
from kdlib.data import Sentence
from kdlib.labels import Span, legal_iob2, to_spans
from kdlib.layers import Layers, watched
from kdlib.twin_tower import TwinTower

__all__ = ["Pupil", "Tagger", "TwinTower", "classifier"]


class Tagger(nn.Module):
    """A CRF tagger over any encoder of `backbones`; `labels` are IOB2, and only legal IOB2 is ever predicted."""

    def __init__(
        self, encoder: nn.Module, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.encoder, self.tokenizer, self.labels = encoder, tokenizer, list(labels)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(encoder.width, len(labels))
        self.crf = LinearChainCRF(len(labels), legal_iob2(labels))

    def forward(self, batch: Batch) -> Tensor:
        """Emissions [B, L, K]: each word's label scores, read off its first word piece."""
        hidden = self.encoder(batch.pieces, batch.piece_mask, *([batch.shapes] if self.encoder.reads_shapes else []))
        words = hidden.flatten(0, 1)[batch.first]
        return self.output(self.dropout(words))

    @property
    def parameters_in_all(self) -> int:
        """Number of trainable scalars."""
        return sum(p.numel() for p in self.parameters())

    def encode(self, sentences: Sequence[Sentence]) -> Encoded:
        """Sentences as this model reads them."""
        return encode(sentences, self.tokenizer, self.labels, self.encoder.max_pieces, self.encoder.reads_shapes)

    @torch.no_grad()
    def emissions(self, data: Encoded) -> list[Tensor]:
        """Emissions [L, K] of every sentence, in order, on the CPU, dropout off."""
        return [e.cpu() for e in self._in_order(data, lambda batch: self(batch))]

    @torch.no_grad()
    def predict(self, sentences: Sequence[Sentence] | Encoded) -> list[tuple[Span, ...]]:
        """The entities of the most probable tag sequence, sentence by sentence."""
        data = sentences if isinstance(sentences, Encoded) else self.encode(sentences)
        paths = self._in_order(data, lambda batch: self.crf.viterbi(self(batch), batch.mask))
        return [to_spans([self.labels[k] for k in path.tolist()]) for path in paths]

    def _in_order(self, data: Encoded, answer) -> list[Tensor]:
        was_training, device = self.training, next(self.parameters()).device
        if was_training:  # walking through every module costs more than reading a short sentence
            self.eval()
        found: list[Tensor] = [torch.empty(0)] * len(data)
        for rows, batch in in_turn(data):
            for row, out in zip(rows, answer(batch.to(device)), strict=True):
                found[row] = out[: len(data.firsts[row])]
        if was_training:
            self.train()
        return found

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and the tokenizer into `folder`, whole or not at all."""
        shape = {"labels": self.labels, "dropout": self.dropout.p, "kind": self.encoder.kind, "encoder": self.encoder.config()}
        with saving(folder) as aside:
            self.tokenizer.save_pretrained(aside)
            save_file({k: v.contiguous() for k, v in self.state_dict().items()}, aside / "model.safetensors")
            (aside / "tagger.json").write_text(json.dumps(shape, indent=1, default=str), encoding="utf8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Tagger":
        """Read back what `save_pretrained` wrote; FileNotFoundError if it is not there."""
        folder = Path(folder)
        if not (folder / "tagger.json").is_file():
            raise FileNotFoundError(f"{folder}: expected a folder written by Tagger.save_pretrained, with a tagger.json")
        shape = json.loads((folder / "tagger.json").read_text(encoding="utf8"))
        encoder = backbones.build(shape["kind"], shape["encoder"])
        model = cls(encoder, AutoTokenizer.from_pretrained(folder), shape["labels"], shape["dropout"])
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.eval()


def classifier(tagger: Tagger) -> Tagger:
    """The same tagger with its chain held at 0: a softmax per word, of which the best legal IOB2 sequence is predicted."""
    with torch.no_grad():
        for parameter in tagger.crf.parameters():
            parameter.zero_()
    tagger.crf.requires_grad_(False)
    return tagger


class Pupil(Tagger):
    """A tagger that is watched while it learns: `inside` holds the layers of the last batch read in training mode, and `projection`, W_h of
    the adaptive paper's eq. 18, takes its hidden states to the teacher's width. `graduate` leaves both behind.
    """

    inside: Layers

    def __init__(self, encoder: nn.Module, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], teacher_width: int) -> None:
        super().__init__(encoder, tokenizer, labels)
        self.projection = nn.Linear(encoder.width, teacher_width, bias=False)

    def forward(self, batch: Batch) -> Tensor:
        """Emissions [B, L, K]; in training mode `inside` is renewed."""
        if not self.training:
            return super().forward(batch)
        with watched(self.encoder) as self.inside:
            return super().forward(batch)

    @property
    def parameters_in_all(self) -> int:
        """Number of scalars of the tagger that is left when the lessons are over."""
        return super().parameters_in_all - self.projection.weight.numel()

    def graduate(self) -> Tagger:
        """The tagger itself, made of the same modules."""
        tagger = Tagger(self.encoder, self.tokenizer, self.labels)
        tagger.output, tagger.crf, tagger.dropout = self.output, self.crf, self.dropout
        return tagger.train(self.training)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tagger that is left when the lessons are over."""
        self.graduate().save_pretrained(folder)
