import shutil

import pytest
from huggingface_hub import RepoUrl
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


def test_every_file_goes_to_the_hub_and_comes_back(student, tmp_path, monkeypatch):
    from huggingface_hub import HfApi

    from kdlib.ship import for_hub

    folder, own = student
    said, hub = {}, tmp_path / "hub"

    def upload_folder(self, *, repo_id, folder_path, **how):
        shutil.copytree(folder_path, hub)
        return said.setdefault("to", repo_id)

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **how: RepoUrl(repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    for_hub.Shared(str(folder)).push_to_hub("me/tagger")

    def contents(of):
        return {str(f.relative_to(of)): f.read_bytes() for f in of.rglob("*") if f.is_file()}

    assert said == {"to": "me/tagger"} and contents(hub) == contents(folder)
    kept = tmp_path / "cache" / "models--me--tagger"  # as a download leaves it
    shutil.copytree(hub, kept / "snapshots" / ("a" * 40))
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("a" * 40)
    how = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    back = for_hub.Shared.from_pretrained("me/tagger", **how)
    assert back.student.inference(TEXTS) == own.inference(TEXTS)
    again = for_hub.Shared.from_pretrained(str(hub))
    again.save_pretrained(hub)  # onto itself
    assert contents(hub) == contents(folder)
