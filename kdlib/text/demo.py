"""The demo corpus: sentences drawn from a recursive grammar over real-world names, one text with
two sets of types.

`fine`: 29 open types (city, river, dog breed, disease, ...). `coarse`: PER, LOC, ORG, ANI
(animals), PLT (plants); the rest is O. It is made to be hard in the way real text is: names that
stand under several types, names that training never saw, words that look like names, lower-cased
and misspelt text, and wrong labels in training at a known rate. `python -m kdlib.text.demo` writes
data/demo.
"""

import random
import re
from collections import defaultdict
from functools import lru_cache
from pathlib import Path

import yaml

from kdlib.text import tags
from kdlib.text.files import ROOT
from kdlib.text.readers import write_json_lines
from kdlib.text.tags import Sentence, Span

FOLDER = ROOT / "data" / "demo"
SPLITS = ("train", "dev", "test")
SIZES = {"train": 4000, "dev": 400, "test": 1000}
FURTHER = 40_000  # sentences of train that are in no file: text for the asking
COARSE = {
    "PER": ("politician", "athlete", "musician", "writer", "scientist"),
    "LOC": ("city", "country", "river", "mountain", "island"),
    "ORG": ("company", "university", "sports team", "newspaper"),
    "ANI": ("mammal", "bird", "fish", "dog breed", "insect"),
    "PLT": ("tree", "flower", "vegetable or herb", "fruit"),
}
TO_COARSE = {fine: coarse for coarse, group in COARSE.items() for fine in group}
WRONG_TYPE, MISSED = (
    0.06,
    0.04,
)  # shares of the training entities given a wrong type, or no label at all
LOWER_CASED, MISSPELT = 0.08, 0.05  # shares of the sentences
AMBIGUOUS = 0.4  # how often a name is drawn among those of several types, where a type has such
UNSEEN = 0.5  # how often a name in dev or test is one that training never saw


def coarse(sentence: Sentence) -> Sentence:
    """The sentence with PER, LOC, ORG, ANI and PLT alone."""
    spans = (Span(s.start, s.end, TO_COARSE[s.type]) for s in sentence.spans if s.type in TO_COARSE)
    return Sentence(sentence.tokens, tuple(spans))


class Names:
    """Draws names by type, from those of one split: training knows 3 names in 5, dev and test have
    1 in 5 each to themselves.

    A name of several types is known to training under the first of them; the others fall as they
    may, so that test can meet a known name as something it never was.
    """

    def __init__(self, lists: dict[str, list[str]], split: str, rng: random.Random) -> None:
        self.rng, self.split = rng, split
        types_of: dict[str, list[str]] = defaultdict(list)
        for kind, names in lists.items():
            for name in names:
                types_of[name.lower()].append(kind)
        self.shared = {name for name, types in types_of.items() if len(types) > 1}
        self.pools: dict[str, dict[str, list[str]]] = {}
        for kind, names in lists.items():
            pools = self.pools[kind] = {part: [] for part in SIZES}
            shuffled = sorted(names)
            random.Random(kind).shuffle(shuffled)
            for i, name in enumerate(shuffled):
                first = name.lower() in self.shared and types_of[name.lower()][0] == kind
                pools[
                    "train" if first else ("train", "train", "train", "dev", "test")[i % 5]
                ].append(name)

    def draw(self, kind: str) -> str:
        """A name of the type; a person's is made of given and family names."""
        if kind in COARSE["PER"]:
            given, family = self._one("given"), self._one("family")
            return self.rng.choice(
                [f"{given} {family}"] * 5 + [family] * 3 + [given, f"{given[0]}. {family}"]
            )
        return self._one(kind)

    def _one(self, kind: str) -> str:
        names = self.pools[kind][self.split if self.rng.random() < UNSEEN else "train"]
        shared = [name for name in names if name.lower() in self.shared]
        return self.rng.choice(shared if shared and self.rng.random() < AMBIGUOUS else names)


@lru_cache
def _rules() -> dict[str, tuple[list[str], list[int]]]:
    rules = yaml.safe_load((Path(__file__).parent / "demo_grammar.yaml").read_text(encoding="utf8"))
    weighted = {}
    for name, alternatives in rules.items():
        found = [re.fullmatch(r"(.*?)(?: @(\d+))?", alternative) for alternative in alternatives]
        weighted[name] = [m[1] for m in found], [int(m[2] or 1) for m in found]
    return weighted


@lru_cache
def _lists() -> dict[str, list[str]]:
    lists = yaml.safe_load((Path(__file__).parent / "demo_names.yaml").read_text(encoding="utf8"))
    return {kind: [name.strip() for name in names.split(",")] for kind, names in lists.items()}


def _expand(symbol: str, names: Names) -> list[tuple[str, str | None]]:
    """Words, each with the type of the entity that starts there, '+' if it continues one, or
    None."""
    bodies, weights = _rules()[symbol]
    body = names.rng.choices(bodies, weights)[0]
    out: list[tuple[str, str | None]] = []
    for piece in body.replace("<", "\0<").replace(">", ">\0").split("\0"):
        if piece.startswith("<"):
            words = names.draw(piece[1:-1]).replace("'s", " 's").split()
            out += [(word, piece[1:-1] if i == 0 else "+") for i, word in enumerate(words)]
            continue
        for word in piece.split():
            if word.startswith("$") and word != "$":
                out += _expand(word[1:], names)
            else:
                out.append((word, None))
    return out


def sentence(names: Names) -> Sentence:
    """One sentence of the grammar, commas and articles tidied, sometimes lower-cased or
    misspelt."""
    drawn = _expand("SENTENCE", names)
    words: list[tuple[str, str | None]] = []
    for i, (word, mark) in enumerate(drawn):
        following = drawn[i + 1][0] if i + 1 < len(drawn) else ""
        if word == "," and (following in {",", ".", ";", ")", ":"} or not following):
            continue
        if word == "a" and following[:1].lower() in "aeiou":
            word = "an"
        words.append((word, mark))
    rng = names.rng
    if words[0][0][0].islower() and not words[0][0].startswith("@"):
        words[0] = (words[0][0][0].upper() + words[0][0][1:], words[0][1])
    if rng.random() < LOWER_CASED:
        words = [(word.lower(), mark) for word, mark in words]
    if rng.random() < MISSPELT:
        at = rng.randrange(len(words))
        words[at] = (_misspell(words[at][0], rng), words[at][1])
    tokens, starts = (
        tuple(w for w, _ in words),
        [i for i, (_, mark) in enumerate(words) if mark not in (None, "+")],
    )
    spans = []
    for start in starts:
        end = start + 1
        while end < len(words) and words[end][1] == "+":
            end += 1
        spans.append(Span(start, end, words[start][1]))
    return Sentence(tokens, tuple(spans))


def _misspell(word: str, rng: random.Random) -> str:
    """Two neighbouring letters change places, or one is lost."""
    if len(word) < 4:
        return word
    at = rng.randrange(1, len(word) - 2)
    return (
        word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        if rng.random() < 0.5
        else word[:at] + word[at + 1 :]
    )


@lru_cache
def _confused() -> dict[str, list[str]]:
    """By fine type, the types of other coarse ones."""
    return {
        kind: [t for t in sorted(TO_COARSE) if TO_COARSE[t] != TO_COARSE.get(kind)]
        for kind in (*TO_COARSE, *_lists())
    }


def spoil(labelled: Sentence, rng: random.Random) -> Sentence:
    """The sentence as a careless annotator labels it: types confused across the coarse ones,
    entities missed."""
    return Sentence(
        labelled.tokens, tags.spoil(labelled.spans, _confused(), WRONG_TYPE, MISSED, rng)
    )


def generate(seed: int = 0, further: int = 0) -> dict[str, list[Sentence]]:
    """Train (with label noise), dev and test; no sentence comes twice, not even across the three.

    Train ends with so many `further` sentences, drawn last, so that all others are what they are
    without.
    """
    rng = random.Random(seed)
    seen: set[str] = set()
    parts: dict[str, list[Sentence]] = {split: [] for split in SIZES}
    for split, size in (*SIZES.items(), ("train", SIZES["train"] + further)):
        names, found = Names(_lists(), split, rng), parts[split]
        while len(found) < size:
            new = sentence(names)
            text = " ".join(new.tokens).lower()
            if text not in seen and 3 <= len(new.tokens) <= 60:
                seen.add(text)
                found.append(spoil(new, rng) if split == "train" else new)
    return parts


def main() -> None:
    """Write data/demo and print its sizes; FileNotFoundError outside a checkout."""
    if not FOLDER.parent.is_dir():
        raise FileNotFoundError(f"{FOLDER.parent}: expected a checkout of the study, got none")
    for split, sentences in generate().items():
        write_json_lines(FOLDER / f"{split}.jsonl", sentences)
        print(
            f"{split}: {len(sentences)} sentences, {sum(len(s.spans) for s in sentences)} entities"
        )


if __name__ == "__main__":
    main()
