"""`python -m kdlib bench shipped_conll2003`: ten minutes of distillation on a real corpus, beside
spaCy's own tagger trained on the same labels."""

from collections.abc import Callable, Sequence
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
    write_json_lines(home / "text.jsonl", parts.transfer)
    write_json_lines(home / "gold.jsonl", parts.labelled)
    gate = distil.Gate(0, 0)
    files = home / "text.jsonl", (), home / "gold.jsonl"
    card = distil.distil(
        str(home / "teacher"), home / "student", *files, minutes=minutes, gate=gate
    )
    said = targets.entities(taught, parts.transfer)
    more = [Sentence(s.tokens, tuple(e)) for s, e in zip(parts.transfer, said, strict=True)]
    spacy_on = {"gold": parts.labelled, "gold and the teacher's": parts.labelled + more}
    pipes = {on: _spacy(home, own, parts, steps) for on, own in spacy_on.items()}
    teacher = taught.tagger.eval()
    export(teacher, home / "teacher_onnx", {})
    rows = [
        Row(
            "MiniLM-CRF, the teacher, torch",
            "gold",
            teacher.predict,
            lambda texts: _in_torch(teacher, texts),
            _megabytes(home / "teacher"),
        )
    ]
    whole, small = "model.onnx", "model_int8.onnx"
    for name, on, folder, file in (
        ("the teacher, ONNX", "gold", "teacher_onnx", whole),
        ("the teacher, ONNX int8", "gold", "teacher_onnx", small),
        ("BiLSTM-CRF student, ONNX int8", "gold and the teacher's", "student", small),
    ):
        tagger = runtime.load(home / folder, int8=file == small)
        files = (home / folder / "onnx" / file, home / folder / "tokenizer.json")
        finds = lambda part, tagger=tagger: distil.predict(tagger, part)  # noqa: E731
        rows.append(Row(name, on, finds, tagger.inference, _megabytes(*files)))
    for on, nlp in pipes.items():
        finds = lambda part, nlp=nlp: _of_spacy(nlp, part)  # noqa: E731
        calls = lambda texts, nlp=nlp: list(nlp.pipe(texts, batch_size=len(texts)))  # noqa: E731
        rows.append(Row("spaCy CNN", on, finds, calls, _megabytes(nlp.path)))
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


def _in_torch(tagger: Tagger, texts: list[str]) -> list:
    return tagger.predict([Sentence(tuple(text.split())) for text in texts])


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
