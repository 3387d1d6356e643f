"""A student as a Presidio recogniser: `registry.add_recognizer(Recognizer("student/"))`."""

from typing import Any

from presidio_analyzer import EntityRecognizer, RecognizerResult

from kdlib.ship import runtime


class Recognizer(EntityRecognizer):
    """Finds what the student finds; `names` turns its labels into Presidio's, such as
    {"person": "PERSON"}."""

    def __init__(
        self, path: str, names: dict[str, str] | None = None, language: str = "en"
    ) -> None:
        self.student = runtime.load(path)
        self.names = {label: label for label in self.student.labels} | (names or {})
        super().__init__(list(self.names.values()), "kdlib", language)

    def load(self) -> None:
        """Nothing is left to load."""

    def analyze(
        self, text: str, entities: list[str], nlp_artifacts: Any = None
    ) -> list[RecognizerResult]:
        """The entities asked for; all where `entities` is empty."""
        found = self.student.predict_entities(text)
        named = [(self.names[e["label"]], e["start"], e["end"], e["score"]) for e in found]
        return [RecognizerResult(*own) for own in named if not entities or own[0] in entities]
