"""`python -m kdlib bench shipped_conll2003`: ten minutes of distillation on a real corpus, beside
spaCy's own tagger trained on the same labels."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from kdlib.lab import cache, scores, targets, timing
from kdlib.lab.study import Fitted, Study
from kdlib.models import Tagger
from kdlib.ship import distil, runtime
from kdlib.ship.export import export
from kdlib.teachers.gliner import Told
from kdlib.teachers.tagger import Taught
from kdlib.text import corpora
from kdlib.text.corpora import Parts
from kdlib.text.files import replacing
from kdlib.text.readers import write_json_lines
from kdlib.text.tags import Sentence, Span

CORPORA = {  # labelled and transfer sentences, dev, the teacher's updates
    "conll2003": (2000, 11000, 500, 500),
    "ncbi_disease": (1000, 4000, 500, 300),
    "wnut17": (1000, 2000, 500, 300),
}


def shipped(
    corpus: str, minutes: float = 10.0, steps: int = 5000, seconds: float = 30.0
) -> pd.DataFrame:
    """On a corpus of $KDLIB_DATA: a MiniLM-CRF teacher trained on some of train's labels, the
    student that `kdlib distil` makes of it, these labels and the rest of train as text, and spaCy's
    convolutional tagger (its `efficiency` settings) on the same labels, and with the teacher's
    labels of that text added.

    f1: on all of test, percent. p50_ms: of text to entities, one thread, all in turns. ratio: as
    fast as the teacher.
    """
    torch.set_num_threads(1)
    labelled, transfer, dev, updates = CORPORA[corpus]
    found = corpora.load(corpus)
    parts = corpora.shuffled(found, labelled, min(transfer, len(found.train) - labelled), dev)
    home = cache.folder() / "shipped" / corpus
    home.mkdir(parents=True, exist_ok=True)
    taught, _ = Study(parts, Fitted(updates)).taught(0)
    taught.tagger.save_pretrained(home / "teacher")
    card = _distilled(home, parts, minutes)
    rows = [*_ours(home, taught.tagger.eval()), *_spacys(home, parts, taught, steps)]
    gold, timed = [s.spans for s in parts.test], _timed(rows, parts.test[:256], seconds)
    for row, own in zip(timed, rows, strict=True):
        row["f1"] = round(float(scores.f1(scores.counts(gold, own.finds(parts.test)))), 2)
    table = pd.DataFrame(timed).assign(operation=corpus, updates=card["updates"])
    print(table.to_string(index=False))
    return table


class Row(NamedTuple):
    """One tagger: how it finds entities over given words, for F1, and in texts, for speed."""

    model: str
    learnt_from: str
    finds: Callable[[Sequence[Sentence]], list[tuple[Span, ...]]]
    reads: Callable[[list[str]], list]
    megabytes: float


def _distilled(home: Path, parts: Parts, minutes: float) -> dict:
    """The card of the student that lies in home/student."""
    write_json_lines(home / "text.jsonl", parts.transfer)
    write_json_lines(home / "gold.jsonl", parts.labelled)
    files = home / "text.jsonl", (), home / "gold.jsonl"
    teacher, out, gate = str(home / "teacher"), home / "student", distil.Gate(0, 0)
    return distil.distil(teacher, out, *files, minutes=minutes, gate=gate)


def _ours(home: Path, teacher: Tagger) -> Iterator[Row]:
    """The teacher in torch, in ONNX and in int8, and its student."""

    def in_torch(texts: list[str]) -> list:
        return teacher.predict([Sentence(tuple(text.split())) for text in texts])

    name, size = "MiniLM-CRF, the teacher, torch", _megabytes(home / "teacher")
    yield Row(name, "gold", teacher.predict, in_torch, size)
    export(teacher, home / "teacher_onnx", {})
    whole, small = "model.onnx", "model_int8.onnx"
    for name, on, folder, file in (
        ("the teacher, ONNX", "gold", "teacher_onnx", whole),
        ("the teacher, ONNX int8", "gold", "teacher_onnx", small),
        ("BiLSTM-CRF student, ONNX int8", "gold and the teacher's", "student", small),
    ):
        tagger = runtime.load(home / folder, int8=file == small)
        files = (home / folder / "onnx" / file, home / folder / "tokenizer.json")
        finds = lambda part, tagger=tagger: distil.predict(tagger, part)  # noqa: E731
        yield Row(name, on, finds, tagger.inference, _megabytes(*files))


def _spacys(home: Path, parts: Parts, teacher: Taught | Told, steps: int) -> Iterator[Row]:
    """spaCy on gold alone, and with the teacher's labels of the transfer text."""
    said = targets.entities(teacher, parts.transfer)
    more = [Sentence(s.tokens, tuple(e)) for s, e in zip(parts.transfer, said, strict=True)]
    learnt = {"gold": parts.labelled, "gold and the teacher's": parts.labelled + more}
    for on, own in learnt.items():
        nlp = _spacy(home, own, parts, steps)
        finds = lambda part, nlp=nlp: _of_spacy(nlp, part)  # noqa: E731
        calls = lambda texts, nlp=nlp: list(nlp.pipe(texts, batch_size=len(texts)))  # noqa: E731
        yield Row("spaCy CNN", on, finds, calls, _megabytes(nlp.path))


def _timed(rows: Sequence[Row], sentences: Sequence[Sentence], seconds: float) -> list[dict]:
    """Median milliseconds a text at batch 1 and 32, in turns."""
    texts = [" ".join(s.tokens) for s in sentences]
    told = [{"operation": "", "model": r.model, "learnt from": r.learnt_from} for r in rows]
    for batch in (1, 32):
        chunks = [texts[i : i + batch] for i in range(0, len(texts) - batch + 1, batch)]
        turns = {
            str(i): lambda at, reads=row.reads, chunks=chunks: reads(chunks[at])
            for i, row in enumerate(rows)
        }
        taken = timing.in_turns(turns, len(chunks), seconds)
        for row, ms in zip(told, taken.values(), strict=True):
            row[f"p50_ms, batch {batch}"] = round(float(np.median(ms)) / batch, 3)
    first = told[0]["p50_ms, batch 1"]
    for row, own in zip(told, rows, strict=True):
        row |= {"ratio": round(first / row["p50_ms, batch 1"], 1)}
        row |= {"disk_mb": round(own.megabytes, 1)}
    return told


def _megabytes(*places: Path) -> float:
    files = [f for place in places for f in (place, *place.rglob("*")) if f.is_file()]
    return sum(f.stat().st_size for f in files) / 1e6


# ---- spaCy ----


def _spacy(home: Path, train: Sequence[Sentence], parts: Parts, steps: int):
    """spaCy's tagger, best of its evaluations on dev; kept under a digest of what it learns."""
    import spacy
    from spacy.cli.init_config import init_config
    from spacy.cli.train import train as fit

    read = [[s.tokens, s.spans] for s in (*train, *parts.dev)]
    folder = home / f"spacy-{cache.digest(spacy.__version__, read, steps)}"
    if not folder.exists():
        with replacing(folder) as aside:
            aside.mkdir()
            nlp, given = spacy.blank("en"), {"training.max_steps": steps}
            for name, own in {"train": train, "dev": parts.dev}.items():
                docs = spacy.tokens.DocBin(docs=[_doc(nlp, s) for s in own])
                docs.to_disk(aside / f"{name}.spacy")
                given[f"paths.{name}"] = str(aside / f"{name}.spacy")
            config = init_config(lang="en", pipeline=["ner"], optimize="efficiency")
            config.to_disk(aside / "config.cfg")
            fit(aside / "config.cfg", aside / "out", overrides=given)
    return spacy.load(folder / "out" / "model-best")


def _doc(nlp, sentence: Sentence):
    from spacy.tokens import Doc
    from spacy.tokens import Span as Ent

    doc = Doc(nlp.vocab, words=list(sentence.tokens))
    doc.ents = [Ent(doc, s.start, s.end, s.type) for s in sentence.spans or ()]
    return doc


def _of_spacy(nlp, sentences: Sequence[Sentence]) -> list[tuple[Span, ...]]:
    bare = (_doc(nlp, s.without_labels()) for s in sentences)
    return [tuple(Span(e.start, e.end, e.label_) for e in doc.ents) for doc in nlp.pipe(bare)]


PEERS = {f"shipped_{corpus}": partial(shipped, corpus) for corpus in CORPORA}
