"""Guesses that read no context: what a model must beat to have learnt anything."""

from collections import Counter, defaultdict
from collections.abc import Iterable

import pandas as pd

from kdlib.lab import scores
from kdlib.text.corpora import Dataset
from kdlib.text.tags import Sentence, Span


class Gazetteer:
    """The baseline that reads no context: the longest known name wins, with the type it most often
    had."""

    def __init__(self, sentences: Iterable[Sentence]) -> None:
        votes: dict[tuple[str, ...], Counter] = defaultdict(Counter)
        for s in sentences:
            for span in s.spans:
                votes[tuple(w.lower() for w in s.tokens[span.start : span.end])][span.type] += 1
        self.types = {name: counted.most_common(1)[0][0] for name, counted in votes.items()}
        self.longest = max(map(len, self.types), default=0)

    def predict(self, sentences: Iterable[Sentence]) -> list[list[Span]]:
        """Entities by look-up, left to right."""
        found = []
        for s in sentences:
            words, at, spans = [w.lower() for w in s.tokens], 0, []
            while at < len(words):
                sizes = range(min(self.longest, len(words) - at), 0, -1)
                size = next((n for n in sizes if tuple(words[at : at + n]) in self.types), 0)
                if size:
                    spans.append(Span(at, at + size, self.types[tuple(words[at : at + size])]))
                at += size or 1
            found.append(spans)
        return found


def baselines(corpus: Dataset) -> pd.DataFrame:
    """Test scores of guesses that read no context: what a model must beat to have learnt
    anything."""
    guesses = {
        "majority (no entity anywhere)": [[] for _ in corpus.test],
        "gazetteer of train": Gazetteer(corpus.train).predict(corpus.test),
        "gazetteer of test itself": Gazetteer(corpus.test).predict(corpus.test),
    }
    rows = [
        {"baseline": name} | scores.scores(corpus.test, guess) for name, guess in guesses.items()
    ]
    return pd.DataFrame(rows).drop(columns="support").round(2)
