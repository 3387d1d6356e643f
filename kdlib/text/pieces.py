"""Words and labels as word pieces, with buckets for what a tokenizer does not know; no torch."""

import zlib

from tokenizers import Tokenizer

from kdlib.text.tags import WORD

MOST = 200_000  # texts remembered


class Pieces:
    """The pieces of a word or label: those of the tokenizer, and for each of its words that this
    does not know, or only in part, one of `buckets` further ones, numbered from `size`.

    tokenizer: its JSON; unknown: the piece that it gives to what it does not know.
    """

    def __init__(self, tokenizer: str, size: int, unknown: int | None, buckets: int) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer)  # nobody else can set it to truncate
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._size, self._unknown, self._buckets = size, unknown, buckets
        self._known: dict[str, tuple[int, ...]] = {}

    def __call__(self, text: str) -> tuple[int, ...]:
        """At least one piece, remembered."""
        if text not in self._known:
            if len(self._known) >= MOST:
                self._known.clear()
            words = WORD.findall(text) or [text]
            self._known[text] = tuple(piece for word in words for piece in self._of_word(word))
        return self._known[text]

    def _of_word(self, word: str) -> list[int]:
        raw = word.encode("utf8", "surrogatepass")
        if raw.decode("utf8", "ignore") == word:
            split = self._tokenizer.encode([word], is_pretokenized=True, add_special_tokens=False)
            if split.ids and self._unknown not in split.ids:
                return split.ids
        return [self._size + zlib.crc32(raw) % self._buckets]
