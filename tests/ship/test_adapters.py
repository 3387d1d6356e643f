import pytest
from test_runtime import TEXTS, made  # noqa: F401

from kdlib.ship import runtime


@pytest.fixture
def student(made):  # noqa: F811
    return made[1], runtime.load(made[1])


def test_spacy_finds_what_the_student_finds(student):
    spacy = pytest.importorskip("spacy")
    folder, own = student
    nlp = spacy.blank("en")
    nlp.add_pipe("kdlib", config={"path": str(folder)})
    docs = list(nlp.pipe(TEXTS * 20))
    for text, doc in zip(TEXTS * 20, docs, strict=True):
        found = own.predict_entities(text)
        assert [(s.text, s.label_) for s in doc.ents] == [(e["text"], e["label"]) for e in found]
    assert any(doc.ents for doc in docs) and nlp("").ents == ()
    ruler = nlp.add_pipe("entity_ruler", before="kdlib")
    ruler.add_patterns([{"label": "NAME", "pattern": "Anna"}])
    assert all(s.label_ == "NAME" for s in nlp("Anna").ents)  # what is there already stays


def test_presidio_finds_what_the_student_finds(student):
    pytest.importorskip("presidio_analyzer")
    from kdlib.ship.for_presidio import Recognizer

    folder, own = student
    recognizer = Recognizer(str(folder), {"PER": "PERSON"})
    assert recognizer.supported_entities == ["LOC", "PERSON"]
    names = {"PER": "PERSON", "LOC": "LOC"}
    for text in TEXTS:
        wanted = [(names[e["label"]], e["start"], e["end"]) for e in own.predict_entities(text)]
        found = recognizer.analyze(text, [])
        assert [(r.entity_type, r.start, r.end) for r in found] == wanted
        people = recognizer.analyze(text, ["PERSON"])
        assert [r.start for r in people] == [a for kind, a, _ in wanted if kind == "PERSON"]


def test_haystack_finds_what_the_student_finds(student):
    haystack = pytest.importorskip("haystack")
    from kdlib.ship.for_haystack import Extractor

    folder, own = student
    extractor = Extractor.from_dict(Extractor(str(folder)).to_dict())
    documents = [haystack.Document(content=text, meta={"n": 1}) for text in (*TEXTS, None)]
    done = extractor.run(documents)["documents"]
    assert [d.meta["entities"] for d in done] == own.inference([*TEXTS, ""])
    assert all(d.meta["n"] == 1 for d in done) and "entities" not in documents[0].meta
