"""What every method did before the lab was rebuilt: losses of each update and predictions, exactly.

`golden.json` was written by the code of three separate labs. If a change to kdlib moves it, raise
`cache.VERSION` and renew the entries, for then every committed table was made by other code.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import CORPUS, SENTENCES, tiny_study

from kdlib.lab import targets, train
from kdlib.lab.study import Budget, Fitted, Study
from kdlib.methods import METHODS, chosen
from kdlib.students import Cut, Thin, Twin
from kdlib.teachers.gliner import Recipe
from kdlib.text.corpora import Dataset, in_file_order, shuffled
from kdlib.text.tags import Sentence

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text(encoding="utf8"))
MIXED, MSD = METHODS["multi-grained"], METHODS["msd"].tuned(rate=0.5, every=2)
GRAINS = {
    "equal grains": (1 / 3, 1 / 3, 1 / 3),
    "sequence": (1.0, 0.0, 0.0),
    "label": (0.0, 1.0, 0.0),
    "token": (0.0, 0.0, 1.0),
    "sequence + label": (0.5, 0.5, 0.0),
    "sequence + token": (0.5, 0.0, 0.5),
    "label + token": (0.0, 0.5, 0.5),
}
CHAIN = {name: MIXED.tuned(grains=g) for name, g in GRAINS.items()} | {"msd": MSD}
CHAIN |= {
    f"msd, exact, {d}": MSD.tuned(way="exact", distils=d, anchor=0.1)
    for d in ("posterior", "structural", "weighted top-k")
}
ALONE, ADAPTIVE, TINY = METHODS["student alone"], METHODS["adaptive"], METHODS["tinybert"]
PKD, PROJECTED = METHODS["bert-pkd"], ("projected",)
LAYERS = {
    "undistilled": (ALONE, "wide"),
    "distilbert": (METHODS["distilbert"], "wide"),
    "bert-pkd": (PKD, "wide"),
    "bert-pkd last": (PKD.tuned(last=True), "wide"),
    "tinybert": (TINY, "thin"),
    "tinybert task stage": (replace(TINY, start=PROJECTED), "thin"),
    "adaptive": (ADAPTIVE, "thin"),
    "undistilled thin": (ALONE, "thin"),
    "undistilled thin, random start": (replace(ALONE, start=()), "thin"),
    "adaptive, random start": (replace(ADAPTIVE, start=()), "thin"),
    "adaptive, random start, general stage": (replace(ADAPTIVE, start=("general",)), "thin"),
    "adaptive, projected start": (replace(ADAPTIVE, start=PROJECTED), "thin"),
    "hard + soft": (ADAPTIVE.tuned(terms=("soft",)), "thin"),
    "hard + attention": (ADAPTIVE.tuned(terms=("attention",)), "thin"),
    "hard + hidden": (ADAPTIVE.tuned(terms=("hidden",)), "thin"),
    "constant weight": (ADAPTIVE.tuned(weight=("constant", 0.5)), "thin"),
    "rescaled weight": (ADAPTIVE.tuned(weight=("rescaled", 0.0)), "thin"),
    "teacher softened": (ADAPTIVE.tuned(softened="teacher"), "thin"),
}


@pytest.fixture
def said(monkeypatch):
    """The loss of every update of the latest training."""
    found, fit = [], train.fit

    def noting(model, seen, loss, *rest, **more):
        found.clear()

        def call(*arguments):
            found.append(loss(*arguments))
            return found[-1]

        for name in ("state_dict", "load_state_dict"):
            if hasattr(loss, name):
                setattr(call, name, getattr(loss, name))
        history = fit(model, seen, call, *rest, **more)
        found[:] = [value.item() for value in found]
        return history

    monkeypatch.setattr(train, "fit", noting)
    return found


def check(group, name, run, losses, rel=1e-5):
    golden = GOLDEN[group][name]
    assert losses == pytest.approx(golden["losses"], rel=rel)
    assert [[list(span) for span in spans] for spans in run.predicted] == golden["predicted"]
    if "dev_f1" in golden:
        assert [row["dev_f1"] for row in run.history] == golden["dev_f1"]
    for row, wanted in zip(run.history, golden.get("history", run.history), strict=True):
        assert all(math.isclose(row[key], value, rel_tol=1e-5) for key, value in wanted.items())


@pytest.mark.parametrize("name", GOLDEN["chain"])
def test_crf_methods(name, tiny_folder, said):
    study = tiny_study(tiny_folder)
    method, student = name.split(" | ")
    if method == "teacher":
        return check("chain", name, study.taught(0)[1], said)
    method = CHAIN.get(method) or chosen([method])[0]
    # A difference of two nearby losses has fewer digits than they: 4e-5 between kinds of CPU.
    rel = 1e-4 if dict(method.knobs).get("way") == "central" else 1e-5
    check("chain", name, study.run(method, student, 0), said, rel)


@pytest.mark.parametrize("name", GOLDEN["layers"])
def test_layer_methods(name, tiny_folder, said):
    corpus = Dataset("own", SENTENCES, SENTENCES[:4], SENTENCES[:4])
    thin = Thin(layers=2, width=10, feed_forward=20, embedding=6)
    study = Study(
        shuffled(corpus, 4, 6),
        Fitted(3, 2, softmax=True, one=True),
        Budget(5, 2, general=2),
        tiny_folder,
        students={"thin": thin, "wide": Cut(layers=2)},
    )
    if name == "teacher":
        return check("layers", name, study.taught(0)[1], said)
    check("layers", name, study.run(*LAYERS[name], 0), said)


def test_a_gliner_and_its_twin_towers(long_folder, said):
    words = [Sentence((*s.tokens, str(i)), s.spans) for i, s in enumerate(CORPUS.train)]
    parts = in_file_order(Dataset("toy", words[:12], words[12:13], words[13:]), 6, 2)
    model = targets.trained_gliner(parts, Recipe(steps=1, batch_size=2, hidden=16), long_folder)
    for name, golden in GOLDEN["open"].items():
        if name == "teacher":
            told = targets.told(model, parts)
            found = {" ".join(k): [list(s) for s in a.entities] for k, a in told.answers.items()}
            assert found == golden["entities"]
            continue
        who, size, reading = name.split(", ")
        study = Study(
            parts.first(int(size)),
            targets.told(model, parts, reading),
            Budget(6, 4, evaluations=2),
            long_folder,
            students={"twin tower": Twin()},
            follow=True,
        )
        method = METHODS["soft targets"].tuned(alpha=0.2, temperature=0.5)
        method = ALONE if who == "hard student" else method
        check("open", name, study.run(method, "twin tower", 0), said)
