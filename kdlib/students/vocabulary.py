"""Fewer word pieces: most of a small encoder is its table of embeddings, and most of the table is
never read.

WordPiece takes the longest piece that fits. If every piece that a text was cut into is kept, the
text is cut the same way by the smaller vocabulary, because no longer piece has come in; so teacher
and student still see the same pieces of the same words. A piece not kept falls back to shorter
ones, in the end to its letters, all of which are kept: what the large vocabulary can read, the
small one can.
"""

import json
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def prune(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[Sequence[str]]
) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """A tokenizer with the special pieces, the single characters and what `texts` (words) use; and
    which old number each piece had.

    ValueError for a tokenizer that is not WordPiece: byte-pair merges do not fall back this way.
    """
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    if told["model"]["type"] != "WordPiece":
        raise ValueError(
            f"expected a WordPiece tokenizer, such as BERT's, got {told['model']['type']}"
        )
    numbers, prefix = told["model"]["vocab"], told["model"]["continuing_subword_prefix"]
    words = sorted({word for text in texts for word in text})
    if not words:
        raise ValueError("texts: expected words to keep the pieces of, got none")
    told["padding"] = told["truncation"] = None
    whole = Tokenizer.from_str(json.dumps(told))
    used = {piece for e in whole.encode_batch(words, add_special_tokens=False) for piece in e.ids}
    special = {added["id"] for added in told["added_tokens"]} | set(whole.encode("").ids)
    letters = {number for piece, number in numbers.items() if len(piece.removeprefix(prefix)) == 1}
    kept = sorted(used | special | letters)
    new = {old: i for i, old in enumerate(kept)}
    told["model"]["vocab"] = {piece: new[old] for piece, old in numbers.items() if old in new}
    for added in told["added_tokens"]:
        added["id"] = new[added["id"]]
    told["post_processor"] = told["post_processor"] and _renumbered(told["post_processor"], new)
    names = {
        name: getattr(tokenizer, name)
        for name in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    }
    smaller = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(told)),
        **{name: piece for name, piece in names.items() if piece},
    )
    return smaller, kept


def _renumbered(processor: dict, new: dict[int, int]) -> dict:
    """The post-processor, which knows [CLS] and [SEP] by number."""
    processor = dict(processor)
    if "processors" in processor:
        processor["processors"] = [_renumbered(part, new) for part in processor["processors"]]
    for name in ("sep", "cls"):
        if name in processor:
            piece, old = processor[name]
            processor[name] = [piece, new[old]]
    if "special_tokens" in processor:
        own = processor["special_tokens"].items()
        processor["special_tokens"] = {
            name: told | {"ids": [new[old] for old in told["ids"]]} for name, told in own
        }
    return processor
