"""A student in a spaCy pipeline: `nlp.add_pipe("kdlib", config={"path": "student/"})`."""

from collections.abc import Iterable, Iterator

from spacy.language import Language
from spacy.tokens import Doc
from spacy.util import filter_spans, minibatch

from kdlib.ship import runtime


class Component:
    """Adds the student's entities to `doc.ents`; what is there already stays, and an entity that
    begins or ends within a token takes the whole of it."""

    def __init__(self, path: str) -> None:
        self.student = runtime.load(path)

    def __call__(self, doc: Doc) -> Doc:
        """The doc itself, with its entities."""
        return next(self.pipe([doc]))

    def pipe(self, stream: Iterable[Doc], batch_size: int = 32) -> Iterator[Doc]:
        """The same for many, in batches."""
        for docs in minibatch(stream, batch_size):
            found = self.student.inference([doc.text for doc in docs])
            for doc, entities in zip(docs, found, strict=True):
                own = [
                    doc.char_span(e["start"], e["end"], e["label"], alignment_mode="expand")
                    for e in entities
                ]
                taken = {i for span in doc.ents for i in range(span.start, span.end)}
                free = [span for span in own if not taken & set(range(span.start, span.end))]
                doc.ents = [*doc.ents, *filter_spans(free)]
                yield doc


@Language.factory("kdlib", default_config={"path": ""})
def make(nlp: Language, name: str, path: str) -> Component:
    """spaCy's factory; `path` is a folder that `kdlib distil` wrote."""
    return Component(path)
