"""A student as a Haystack component: `pipeline.add_component("ner", Extractor("student/"))`."""

from dataclasses import replace
from typing import Any

from haystack import Document, component, default_from_dict, default_to_dict

from kdlib.ship import runtime


@component
class Extractor:
    """Writes each document's entities into its `meta["entities"]`."""

    def __init__(self, path: str) -> None:
        self.path, self.student = path, runtime.load(path)

    @component.output_types(documents=list[Document])
    def run(self, documents: list[Document]) -> dict[str, list[Document]]:
        """The documents, in order, as copies; those without text have no entities."""
        found = self.student.inference([doc.content or "" for doc in documents])
        pairs = zip(documents, found, strict=True)
        return {"documents": [replace(d, meta={**d.meta, "entities": e}) for d, e in pairs]}

    def to_dict(self) -> dict[str, Any]:
        """For a pipeline's file."""
        return default_to_dict(self, path=self.path)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Extractor":
        """From a pipeline's file."""
        return default_from_dict(cls, data)
