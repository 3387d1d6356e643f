"""Word pieces: of sentences, in windows that an encoder takes; of any word or label, with buckets
for what a tokenizer does not know; no torch."""

import zlib
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from kdlib.text.tags import WORD

MOST, SHORT = 200_000, 100  # texts remembered, and the characters of the longest of them


def in_windows(
    words: Sequence[Sequence[int]], most: int
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """The pieces of a sentence's words in windows of at most `most`, cut between words, of a longer
    word its beginning; and where each word's first piece lies: window, place."""
    windows: list[list[int]] = [[]]
    firsts = []
    for word in words:
        word = word[:most]
        if len(windows[-1]) + len(word) > most:
            windows.append([])
        firsts.append((len(windows) - 1, len(windows[-1])))
        windows[-1] += word
    return windows, firsts


def word_pieces(sentences: Sequence[Sequence[str]], tokenizer: Any) -> list[list[list[int]]]:
    """The pieces of every word of every sentence, all read in one call."""
    if not sentences:
        return []
    encoded = tokenizer(
        [list(words) for words in sentences],
        is_split_into_words=True,
        add_special_tokens=False,
        truncation=False,
        verbose=False,
    )
    found = []
    for i, words in enumerate(sentences):
        pieces: list[list[int]] = [[] for _ in words]
        for piece, word in zip(encoded["input_ids"][i], encoded.word_ids(i), strict=True):
            pieces[word].append(piece)
        found.append([p or [tokenizer.unk_token_id] for p in pieces])
    return found


def special_pieces(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The pieces set before and after a text, [CLS] and [SEP] for BERT."""
    probe = tokenizer("a")["input_ids"]
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    at = next(i for i in range(len(probe)) if probe[i : i + len(inner)] == inner)
    return probe[:at], probe[at + len(inner) :]


def shape(word: str) -> int:
    """What an uncased tokenizer drops: 1 no letters, 2 lower case, 3 Title, 4 UPPER, 5 one capital,
    6 mIxed, 7 letters and digits."""
    letters = [c for c in word if c.isalpha()]
    if any(c.isdigit() for c in word) or not letters:
        return 7 if letters else 1
    if all(not c.isupper() for c in letters):
        return 2
    if len(letters) == 1:
        return 5
    if letters[0].isupper() and all(not c.isupper() for c in letters[1:]):
        return 3
    return 4 if all(c.isupper() for c in letters) else 6


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
