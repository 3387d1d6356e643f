"""Encoders, and the tagger over any of them: encoder -> one vector a word -> emissions -> CRF.

An encoder maps word pieces [N, P] and their mask [N, P] to vectors [N, P, `width`]. The other model
is `twin_tower.TwinTower`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from kdlib.batches import Batch, Encoded, encode, in_turn
from kdlib.crf import Chain, LinearChainCRF, legal_iob2, reversed_rows
from kdlib.text import calls
from kdlib.text.files import fits, saving, shapes_of, whole
from kdlib.text.tags import Sentence, Span, to_spans


class Transformer(nn.Module):
    """A Hugging Face encoder: pieces in, last hidden states out. With `shapes` each piece's word
    has its letter case beside them, as 32 numbers: an uncased encoder drops it.
    """

    kind = "transformer"

    def __init__(self, model: transformers.PreTrainedModel, shapes: bool = False) -> None:
        super().__init__()
        self.model, self.reads_shapes = model, shapes
        config = model.config
        roberta = "roberta" in config.model_type  # its positions start after the padding's
        reserved = config.pad_token_id + 1 if roberta else 0
        self.width, self.max_pieces = config.hidden_size, config.max_position_embeddings - reserved
        if shapes:
            self.shape = nn.Embedding(8, 32)
            self.width += 32

    def forward(self, pieces: Tensor, piece_mask: Tensor, shapes: Tensor | None = None) -> Tensor:
        """[N, P] -> [N, P, width]."""
        last = self.model(input_ids=pieces, attention_mask=piece_mask.long()).last_hidden_state
        return torch.cat([last, self.shape(_there(shapes))], -1) if self.reads_shapes else last

    def config(self) -> dict:
        """What `build` needs to make an encoder of this shape."""
        return self.model.config.to_dict() | ({"shapes": True} if self.reads_shapes else {})


class BiLstm(nn.Module):
    """Embedding -> bidirectional LSTM over word pieces; no limit to their number. With `shapes`
    each piece knows its word's letter case, as 16 numbers beside its embedding.
    """

    kind = "lstm"

    def __init__(
        self,
        vocabulary: int,
        embedding: int,
        hidden: int,
        layers: int = 1,
        dropout: float = 0.3,
        shapes: bool = False,
    ) -> None:
        super().__init__()
        self._config = {
            "vocabulary": vocabulary,
            "embedding": embedding,
            "hidden": hidden,
            "layers": layers,
            "dropout": dropout,
        }
        self._config |= {"shapes": True} if shapes else {}
        self.reads_shapes = shapes
        self.embedding = nn.Embedding(vocabulary, embedding)
        if shapes:
            self.shape = nn.Embedding(8, 16)
            embedding += 16
        self.dropout = nn.Dropout(dropout)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True, bidirectional=True)
        self.width, self.max_pieces = 2 * hidden, 100_000

    def forward(self, pieces: Tensor, piece_mask: Tensor, shapes: Tensor | None = None) -> Tensor:
        """[N, P] -> [N, P, width]; padding does not reach the backward direction."""
        read = self.embedding(pieces)
        if self.reads_shapes:
            read = torch.cat([read, self.shape(_there(shapes))], -1)
        out, lengths = self.dropout(read), piece_mask.sum(1)
        for layer in range(self.lstm.num_layers):
            backwards = self._direction(f"l{layer}_reverse", reversed_rows(out, lengths))
            forwards = self._direction(f"l{layer}", out)
            out = torch.cat([forwards, reversed_rows(backwards, lengths)], -1)
        return self.dropout(out)

    def _direction(self, name: str, x: Tensor) -> Tensor:
        """One direction of one layer, [N, P, .] -> [N, P, hidden]: on a CPU twice as fast as
        nn.LSTM on packed sequences."""
        start = x.new_zeros(1, len(x), self.lstm.hidden_size)
        weights = [
            getattr(self.lstm, f"{part}_{name}")
            for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        ]
        return torch.lstm(x, (start, start), weights, True, 1, 0.0, self.training, False, True)[0]

    def config(self) -> dict:
        """What `build` needs to make an encoder of this shape."""
        return self._config


def _there(shapes: Tensor | None) -> Tensor:
    if shapes is None:
        raise ValueError("expected the shapes of the words (encode with this model), got none")
    return shapes


def build(kind: str, config: dict) -> nn.Module:
    """An encoder of a given shape with random weights; the inverse of `kind` and `config()`."""
    if kind == "lstm":
        return BiLstm(**config)
    shapes = config.get("shapes", False)
    config = AutoConfig.for_model(**{k: v for k, v in config.items() if k != "shapes"})
    pooler = {"add_pooling_layer": False} if config.model_type in ("bert", "roberta") else {}
    return Transformer(AutoModel.from_config(config, **pooler), shapes)


class Tagger(nn.Module):
    """A CRF tagger over any encoder; `labels` are IOB2, and only legal IOB2 is ever predicted.

    `softmax` holds the chain at 0: a softmax per word, of which the best legal sequence is taken.
    """

    asks = False  # it finds the types it was made for; a TwinTower must be asked for some

    def __init__(
        self,
        encoder: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        dropout: float = 0.1,
        softmax: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.tokenizer, self.labels = encoder, tokenizer, list(labels)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(encoder.width, len(labels))
        self.crf, self.softmax = LinearChainCRF(len(labels), legal_iob2(labels)), softmax
        if softmax:
            for parameter in self.crf.requires_grad_(False).parameters():
                parameter.zero_()

    def forward(self, batch: Batch) -> Tensor:
        """Emissions [B, L, K]: each word's label scores, read off its first word piece."""
        shapes = [batch.shapes] if self.encoder.reads_shapes else []
        words = self.encoder(batch.pieces, batch.piece_mask, *shapes).flatten(0, 1)[batch.first]
        return self.output(self.dropout(words))

    def chain(self, emissions: Tensor) -> Chain:
        """This model's side of a comparison."""
        return Chain(self.crf, emissions, self.softmax)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """What is trained, by the rate it asks for: encoder, output, crf."""
        return {
            name: list(getattr(self, name).parameters()) for name in ("encoder", "output", "crf")
        }

    @property
    def parameters_in_all(self) -> int:
        """Number of scalars."""
        return sum(p.numel() for p in self.parameters())

    def encode(self, sentences: Sequence[Sentence]) -> Encoded:
        """Sentences as this model reads them."""
        encoder = self.encoder
        return encode(
            sentences, self.tokenizer, self.labels, encoder.max_pieces, encoder.reads_shapes
        )

    @torch.no_grad()
    def emissions(self, data: Encoded) -> list[Tensor]:
        """Emissions [L, K] of every sentence, in order, on the CPU, dropout off."""
        return [e.cpu() for e in self._in_order(data, lambda batch: self(batch))]

    @torch.no_grad()
    def predict(self, sentences: Sequence[Sentence] | Encoded) -> list[tuple[Span, ...]]:
        """The entities of the most probable tag sequence, sentence by sentence; none where there
        are no words. TypeError or ValueError for what are no sentences."""
        if not isinstance(sentences, Encoded):
            calls.check_sentences(sentences)
            with_words = [s for s in sentences if s.tokens]
            found = iter(self.predict(self.encode(with_words)) if with_words else ())
            return [next(found) if s.tokens else () for s in sentences]
        paths = self._in_order(sentences, lambda b: self.crf.viterbi(self(b), b.mask))
        return [to_spans([self.labels[k] for k in path.tolist()]) for path in paths]

    @torch.no_grad()
    def marginals(self, data: Encoded) -> list[Tensor]:
        """Probabilities [L, K] of each word's labels under the chain, sentence by sentence."""
        answer = lambda batch: self.crf.marginals(self(batch), batch.mask)[0].cpu()  # noqa: E731
        return self._in_order(data, answer)

    def _in_order(self, data: Encoded, answer) -> list[Tensor]:
        was_training, device = self.training, self.crf.start.device
        if was_training:  # walking through every module costs more than reading a short sentence
            self.eval()
        found: list[Tensor] = [torch.empty(0)] * len(data)
        try:
            for rows, batch in in_turn(data):
                for row, out in zip(rows, answer(batch.to(device)), strict=True):
                    found[row] = out[: len(data.firsts[row])]
        finally:
            if was_training:
                self.train()
        return found

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tagger.json, model.safetensors and the tokenizer into `folder`, whole or not."""
        shape = {
            "labels": self.labels,
            "dropout": self.dropout.p,
            "softmax": self.softmax,
            "kind": self.encoder.kind,
            "encoder": self.encoder.config(),
        }
        with saving(folder) as aside:
            self.tokenizer.save_pretrained(aside)
            weights = {k: v.contiguous() for k, v in self.state_dict().items()}
            save_file(weights, aside / "model.safetensors")
            text = json.dumps(shape, indent=1, default=str)
            (aside / "tagger.json").write_text(text, encoding="utf8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Tagger":
        """Read back what `save_pretrained` wrote; FileNotFoundError if it is not there, ValueError
        if its files are damaged, or say it is larger than its weights are."""
        folder = Path(folder).expanduser()
        if not (folder / "tagger.json").is_file():
            raise FileNotFoundError(
                f"{folder}: expected a folder written by Tagger.save_pretrained, with a tagger.json"
            )
        with whole(folder, "Tagger"):
            shape = json.loads((folder / "tagger.json").read_text(encoding="utf8"))
            kind, config = shape.pop("kind"), shape.pop("encoder")
            there = shapes_of(folder / "model.safetensors")
            fits(there, {"crf.start": (len(shape["labels"]),)})
            layers = max(
                config.get(name, 0) for name in ("layers", "num_hidden_layers", "n_layers")
            )
            if layers > len(there):
                raise ValueError(f"expected at most {len(there)} layers, got {layers}")
            with torch.device("meta"):  # shapes, and no memory
                skeleton = build(kind, config).state_dict()
            fits(there, {f"encoder.{name}": tuple(w.shape) for name, w in skeleton.items()})
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            model = cls(build(kind, config), tokenizer, **shape)
            return filled(model, folder / "model.safetensors")


def filled(model: nn.Module, weights: Path) -> nn.Module:
    """The model with the weights of a file, in evaluation mode; ValueError for weights that are no
    numbers."""
    read = load_file(weights)
    wrong = [name for name, w in read.items() if not bool(w.isfinite().all())]
    if wrong:
        raise ValueError(f"expected finite weights, got NaN or infinity in {wrong[:3]}")
    model.load_state_dict(read)
    return model.eval()
