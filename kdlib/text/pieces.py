"""Words and labels as word pieces, with buckets for what a tokenizer does not know; no torch."""

import zlib

from tokenizers import Tokenizer

from kdlib.text.tags import WORD

MOST, SHORT = 200_000, 100  # texts remembered, and the characters of the longest of them


class Pieces:
    """The pieces of a word or label: those of the tokenizer, and for each of its words that this
    does not know, or only in part, one of `buckets` further ones, numbered from `size` on.

    tokenizer: its JSON; unknown: the piece that it gives to what it does not know.
    """

    def __init__(self, tokenizer: str, unknown: int | None, buckets: int) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer)  # nobody else can set it to truncate
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.size = self._tokenizer.get_vocab_size()
        self._unknown, self._buckets = unknown, buckets
        self._known: dict[str, tuple[int, ...]] = {}

    def __call__(self, text: str) -> tuple[int, ...]:
        """At least one piece; those of a short text are remembered."""
        found = self._known.get(text)
        if found is None:
            words = WORD.findall(text) or [text]
            found = tuple(piece for word in words for piece in self._of_word(word))
            if len(text) <= SHORT:
                if len(self._known) >= MOST:
                    self._known.clear()
                self._known[text] = found
        return found

    def _of_word(self, word: str) -> list[int]:
        raw = word.encode("utf8", "surrogatepass")
        if raw.decode("utf8", "ignore") == word:
            split = self._tokenizer.encode([word], is_pretokenized=True, add_special_tokens=False)
            if split.ids and self._unknown not in split.ids:
                return split.ids
        return [self.size + zlib.crc32(raw) % self._buckets]
