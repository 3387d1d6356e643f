import itertools
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import CORPUS, tiny_study

from kdlib.lab import bench, evidence, records, scores, tables
from kdlib.lab.evidence import Experiment
from kdlib.lab.records import Record
from kdlib.lab.study import Fitted, Study
from kdlib.students import STUDENTS, Lstm, Thin
from kdlib.text.tags import Span

METHODS = ["student alone", {"of": "top-k", "name": "one best", "k": 1}, "posterior"]
OWN = Experiment("tiny", METHODS, [2, 3], 2, labelled=6, transfer=8, dev=4, teacher_updates=2)


@pytest.fixture
def at_hand(tiny_folder, tmp_path, monkeypatch):
    """An experiment on the tiny corpus, with records in a folder of its own."""
    students = STUDENTS | {"bilstm": Lstm(embedding=8, hidden=6)}
    monkeypatch.setattr(evidence, "load", lambda name: CORPUS)
    monkeypatch.setattr(evidence, "experiments", lambda: {"own": OWN})
    monkeypatch.setattr(evidence, "STUDENTS", students)
    monkeypatch.setattr(evidence, "Study", partial(Study, encoder=tiny_folder))
    monkeypatch.setattr(records, "FOLDER", tmp_path / "runs")
    return tmp_path / "runs" / "tiny.jsonl"


def test_every_run_is_recorded_once_and_found_by_what_was_declared(at_hand, monkeypatch):
    evidence.run("own")
    first = at_hand.read_bytes()
    rows = evidence.table(OWN)
    assert len(rows) == 2 + 2 * 2 * 3 and set(rows["method"]) == {
        "teacher",
        "student alone",
        "one best",
        "posterior",
    }
    assert (rows.loc[rows["method"] == "posterior", "agreement"] >= 0).all()
    assert not any(word in first.decode() for word in ("Anna", "Paris", "nobody"))
    monkeypatch.setattr(Study, "run", lambda *a: pytest.fail("trained again"))
    evidence.run("own")
    assert at_hand.read_bytes() == first
    lines = first.decode().splitlines()
    at_hand.write_text("\n".join(lines[:-1]) + "\n")
    monkeypatch.undo()
    assert json.loads(lines[-1])["declared"]["method"] == "posterior"


def test_a_gliner_teaches_every_seed_of_an_experiment(at_hand, long_folder, monkeypatch):
    """One GLiNER, trained on sentences that no student reads, for a twin tower and a tagger."""
    own = replace(OWN, teaching=4, transfer=4, students=["twin tower", "bilstm"], updates=[2])
    own = replace(own, methods=["pseudo-labels", "soft targets"])
    monkeypatch.setattr(evidence, "experiments", lambda: {"own": own})
    trained = partial(evidence.targets.trained_gliner, encoder=long_folder)
    monkeypatch.setattr(evidence.targets, "trained_gliner", trained)
    evidence.run("own")
    rows = evidence.table(own)
    assert rows.loc[rows["method"] == "teacher", "seed"].tolist() == [0]
    assert len(rows) == 1 + 2 * 2 * 2 and not evidence.missing("own")
    told = [record.declared for record, _ in evidence.recorded(own)]
    assert {t["teaching"] for t in told} == {4} and {t["teacher"]["steps"] for t in told} == {2}
    assert rows.loc[rows["method"] != "teacher", "word_accuracy"].between(0, 100).all()


def test_a_student_costs_its_teachers_work_too(at_hand, monkeypatch):
    taught = ["student alone", "pseudo-labels", "weighted top-k", "structural"]
    monkeypatch.setattr(evidence, "experiments", lambda: {"own": replace(OWN, methods=taught)})
    rows = bench.cost("own", updates=2).set_index("what")
    assert list(rows.index) == ["teacher: training", "teacher: reading", *taught]
    assert rows["updates"].eq(2).all() and not at_hand.exists()
    assert not list(Path(os.environ["KDLIB_CACHE"]).rglob("*.pt"))  # nor is anything remembered


def test_students_beside_their_teachers_by_hand(monkeypatch):
    teachers = pd.DataFrame({"method": "teacher", "f1": [80.0, 90.0]})
    student = {
        "method": "posterior",
        "f1": 68.0,
        "agreement": 70.0,
        "entropy": np.nan,
        "best": np.nan,
    }
    student = pd.DataFrame([student | {"word_recall": 97.0, "word_accuracy": 98.5}])
    monkeypatch.setattr(evidence, "table", lambda e: pd.concat([teachers, student]))
    (row,) = evidence.beside_teachers(OWN).to_dict("records")
    assert row["method"] == "posterior" and row["sentences"] == 6 + 8
    assert (row["kept"], row["missed"], row["wrong"]) == (80, 3, 1.5)


def test_epochs_are_what_a_student_reads_of_its_text():
    assert OWN.epochs(7) == 7 * 16 / (6 + 8)
    with pytest.raises(ValueError, match="transfer: expected a number of sentences, got 0"):
        replace(OWN, transfer=0).epochs(7)
    with pytest.raises(ValueError, match="expected a GLiNER without unseen, cased or softmax"):
        replace(OWN, teaching=4, softmax=True)


def test_a_power_law_is_found_again():
    sizes = [2_000, 5_000, 11_000]
    assert tables.power_law(sizes, [7 * n**-0.4 for n in sizes]) == pytest.approx((7, 0.4))
    for x, y in (([1, 1], [1, 2]), ([1, 2], [1, 0])):
        with pytest.raises(ValueError, match="expected two different x and numbers above 0"):
            tables.power_law(x, y)


def test_a_stopped_experiment_goes_on(at_hand):
    evidence.run("own")
    whole = at_hand.read_text()
    lines = whole.splitlines()
    at_hand.write_text("\n".join(lines[:-3]) + "\n")
    evidence.run("own")
    assert at_hand.read_text() == whole  # from the cache, to the last bit


def test_the_cells_of_a_grid_make_the_whole_experiment(at_hand):
    """Each as a job of its own, the teachers first, as the Snakefile runs them."""
    evidence.run("own")
    whole = sorted(at_hand.read_text().splitlines())
    at_hand.unlink()
    cells = evidence.cells(OWN)
    assert list(cells)[:2] == [("teacher", 0), ("student alone", 2)] and len(cells) == 7
    for method, updates in reversed(cells):
        evidence.run("own", [method], [updates])
    assert sorted(at_hand.read_text().splitlines()) == whole
    with pytest.raises(ValueError, match="method: expected one of .*'one best'.*, got 'top-k'"):
        evidence.run("own", ["top-k"])
    with pytest.raises(ValueError, match=r"updates: expected one of \[0, 2, 3\], got 4"):
        evidence.run("own", [], [4])


def test_a_teachers_doubt_is_kept_a_sentence_and_added_where_it_was_not(at_hand):
    evidence.run("own")
    whole = at_hand.read_text()
    said = records.doubts("tiny")
    assert [own.of["seed"] for own in said] == [0, 1]
    assert all(own.of["method"] == "teacher" for own in said)
    labels = 2 * len(CORPUS.types) + 1
    for own in said:
        assert len(own.entropy) == len(CORPUS.test)
        assert ((own.entropy > 0) & (own.entropy <= np.log(labels))).all()
    lines = [line for line in whole.splitlines() if "doubt" not in line]
    old = [line.replace(', "cased": false', "") for line in lines]
    assert old != lines
    at_hand.write_text("\n".join(old) + "\n")  # as records were before, by what they declared too
    assert ("teacher", 0) in evidence.missing("own")
    evidence.run("own")
    assert len(records.read("tiny")) == len(old) - 1  # one line is the test set
    assert at_hand.read_text().splitlines()[: len(old)] == old
    assert [own.entropy.tolist() for own in records.doubts("tiny")] == [
        own.entropy.tolist() for own in said
    ]


def test_differences_by_doubt_by_hand(monkeypatch):
    """Of four sentences one side finds all, the other misses the one its teacher doubts most."""
    gold = np.ones((4, 1, 1), dtype=int)
    all_found = np.concatenate([gold] * 3, -1)
    missed = all_found.copy()
    missed[1, :, :2] = 0

    def of(method, counts):
        return Record({"method": method, "seed": 0}, counts, ["A"], [], 1, {}, []), 9

    both = [of("posterior", all_found), of("pseudo-labels", missed)]
    monkeypatch.setattr(evidence, "recorded", lambda experiment: both)
    entropy = np.array([0.1, 0.9, 0.2, 0.3])
    teacher = OWN.declared(None, "", 0, 0)
    noted = [records.Doubt(teacher, test, entropy) for test in ("another", both[0][0].test)]
    monkeypatch.setattr(records, "doubts", lambda corpus: noted)
    rows = evidence.by_doubt(OWN, "posterior", cut=2)
    assert rows["entropy"].tolist() == pytest.approx([0.15, 0.6])
    assert rows["difference"].tolist() == pytest.approx([0, 100 - 66.667])
    monkeypatch.setattr(records, "doubts", lambda corpus: noted[:1])
    assert evidence.by_doubt(OWN, "posterior").empty


def test_an_unknown_experiment_and_a_damaged_record_are_errors(at_hand):
    with pytest.raises(ValueError, match=r"expected one of \['own'\], got 'other'"):
        evidence.run("other")
    at_hand.parent.mkdir()
    for damaged in (b'{"declared": {}, "test": "x"}\n', b'"\xff"\n'):
        at_hand.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"tiny.jsonl:1: expected a record"):
            records.read("tiny")


def test_the_experiments_of_the_study_declare_what_there_is():
    for own in evidence.experiments().values():
        told = [evidence.key(row[-1]) for row in own.grid()]
        assert own.wanted and len(told) == len(set(told))


def test_counts_come_back_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "FOLDER", tmp_path)
    gold = [[Span(0, 1, "A"), Span(2, 3, "B")], [Span(0, 2, "B")], []]
    found = [[Span(0, 1, "A"), Span(2, 3, "A")], [], [Span(0, 1, "B")]]
    counts = records.per_sentence(gold, found, ["A", "B"])
    assert counts[0].tolist() == [[1, 2, 1], [0, 0, 1]]
    assert (counts.sum(1) == scores.counts(gold, found)).all()
    record = Record({"method": "m", "k": (1, 2)}, counts, ["A", "B"], [2, 1], 7, {"x": 1.5}, [])
    records.add("c", record)
    records.add("c", record)
    (back,) = records.read("c")
    assert (back.counts == counts).all() and back.units.tolist() == [[1, 2, 3], [0, 1, 0]]
    assert (back.parameters, back.measures, back.declared["k"]) == (7, {"x": 1.5}, [1, 2])


def test_a_doubt_that_does_not_fit_is_refused_and_nothing_written(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "FOLDER", tmp_path)
    record = Record({"method": "teacher"}, np.zeros((3, 1, 3), int), ["A"], [], 1, {}, [])
    records.add("c", record)
    before = records.file_of("c").read_bytes()
    for wrong in ([0.1, 0.2], [0.1, np.nan, 0.2]):
        with pytest.raises(ValueError, match="entropy: expected 3 numbers"):
            records.add_doubt("c", record, np.array(wrong))
    assert records.file_of("c").read_bytes() == before
    with pytest.raises(ValueError, match="expected a record on this test set first, got a doubt"):
        records.add_doubt("d", record, np.array([0.1, 0.2, 0.3]))
    assert not records.file_of("d").exists()


def test_f1_at_equal_seconds_by_hand():
    """Twice as slow is half the updates, and their F1 half way between 1,000 and 4,000."""
    points = {"pseudo-labels": [1, 2, 3], "posterior": [10, 20, 40], "msd": [5, 5, 5]}
    runs = pd.DataFrame(
        {"student": "s", "method": method, "seed": 0, "updates": updates, "f1": f1}
        for method, own in points.items()
        for updates, f1 in zip((1000, 4000, 16000), own, strict=True)
    )
    ms = {"pseudo-labels": 10.0, "posterior": 20.0}
    found = evidence.at_equal_seconds(runs, ms, 4000).set_index("method")
    assert found["f1"].to_dict() == {"pseudo-labels": 2.0, "posterior": 15.0}
    assert found.loc["posterior", "updates"] == 2000
    with pytest.raises(ValueError, match="posterior: expected budgets around 500 updates, got 1"):
        evidence.at_equal_seconds(runs, ms, 1000)


def test_contrasts_by_hand(monkeypatch):
    """One side finds every entity, the other half of them, in both seeds: 100 - 66.7."""
    gold = np.full((40, 1, 1), 2)
    perfect, half = (np.concatenate([np.full_like(gold, k)] * 2 + [gold], -1) for k in (2, 1))
    more = np.concatenate([perfect[:21], half[21:]])

    def of(method, counts, seed):
        told = {"method": method, "seed": seed, "student": "s"}
        return Record(told, counts, ["A"], [], 1, {}, []), 9

    found = [of("student alone", half, s) for s in (0, 1)]
    found += [of("pseudo-labels", perfect if s else more, s) for s in (0, 1)]
    found += [of("posterior", perfect if s else more, s) for s in (0, 1)]
    found += [of("structural", perfect, 0)]  # one seed shows nothing
    monkeypatch.setattr(evidence, "recorded", lambda experiment: found)
    rows = evidence.contrasts(OWN).set_index(["method", "against"])
    assert len(rows) == 2
    assert tables.told(rows.reset_index().iloc[1]) == (
        "posterior - pseudo-labels: +0.00 [+0.00, +0.00], seeds [+0.00, +0.00], n = 2: equal"
    )
    same = rows.loc["posterior", "pseudo-labels"]
    assert (same["difference"], same["verdict"], same["seeds"]) == (0, "equal", 2)
    ours = rows.loc["pseudo-labels", "student alone"]
    assert ours["low"] > 0 and ours["verdict"] == "not shown"  # two seeds: t reaches below 0
    assert ours["seeds_low"] < 0 and ours["holm"] == 2 * ours["p"]
    table = evidence.table(OWN)
    assert table.set_index(["method", "seed"]).loc[("student alone", 0), "f1"] == pytest.approx(
        66.667
    )


def test_the_gap_closed_runs_from_alone_to_the_ceiling():
    import pandas as pd

    rows = pd.DataFrame(
        {"student": "s", "updates": 9, "seed": 0, "method": m, "f1": f}
        for m, f in (("student alone", 60.0), ("gold on transfer", 80.0), ("posterior", 75.0))
    )
    closed = evidence.gap_closed(rows).set_index("method")["closed"]
    assert closed.to_dict() == {"student alone": 0, "gold on transfer": 100, "posterior": 75}
    assert evidence.gap_closed(rows[:1]).empty


def test_a_record_from_before_a_field_was_there_is_found():
    told = OWN.declared(OWN.wanted[-1], "bilstm", 2, 0)
    older = told | {"teacher": {k: v for k, v in told["teacher"].items() if k != "unseen"}}
    assert evidence.key(older) == evidence.key(told)
    assert evidence.key(told | {"seed": 1}) != evidence.key(told)


def test_a_varied_student_and_start_are_declared(tiny_folder):
    """The start from the teacher differs from the usual one, and both from none."""
    rows = ["bilstm", "thin", {"of": "thin", "name": "thinner", "width": 4, "rate": 0.5}]
    start = {"of": "student alone", "name": "taught", "start": ["taught"]}
    own = Experiment("tiny", ["student alone", start], [2], students=rows, softmax=True)
    assert own.teacher.softmax and own.learners["thinner"] == Thin(0.5, width=4)
    alone, taught = own.wanted
    told = [own.declared(m, s, 2, 0) for m, s in itertools.product(own.wanted, own.learners)]
    assert len({evidence.key(t) for t in told}) == 6 and "shape" not in told[0]
    assert told[2]["shape"]["width"] == 4 and told[2]["start"] == ["projected"]
    assert told[4]["start"] == ["taught"]
    shape = Thin(1e-2, 1, 4, 4, 0)
    study = tiny_study(tiny_folder, teacher=Fitted(updates=2), students={"thin": shape})
    weights = [
        study.lessons(m, "thin", 0).student.encoder.model.get_input_embeddings().weight
        for m in (alone, taught, replace(alone, start=()))
    ]
    assert all((a - b).abs().max() > 1e-4 for a, b in itertools.combinations(weights, 2))


def test_a_teacher_may_do_without_the_quiz(tiny_folder):
    study = tiny_study(tiny_folder, teacher=Fitted(updates=2, unseen=2))
    assert len(study.lessons_of_teacher(0).rows.lengths) == len(study.parts.labelled) - 2
    own = Experiment("tiny", ["msd"], [2], labelled=6, quiz=2, unseen=True)
    assert own.teacher.unseen == 2 and own.declared(own.wanted[0], "bilstm", 2, 0)["quiz"] == 2


def test_a_search_has_seeds_of_its_own_and_dev_decides(at_hand, monkeypatch):
    students = [{"of": "bilstm", "name": f"rate {rate}", "rate": rate} for rate in (1e-4, 1e-2)]
    methods = ["posterior", {"of": "posterior", "name": "posterior, alpha 0.25", "alpha": 0.25}]
    own = replace(OWN, methods=methods, students=students, updates=[2], first=100)
    monkeypatch.setattr(evidence, "experiments", lambda: {"own": own})
    evidence.run("own")
    rows = evidence.searched([own])
    assert set(rows["seed"]) == {100, 101} and set(rows["of"]) == {"posterior"}
    assert len(rows) == 8 and set(rows["rate"]) == {1e-4, 1e-2}
    settings = list(dict.fromkeys(zip(rows["method"], rows["rate"], strict=True)))
    scored = [settings.index((r.method, r.rate)) + r.seed - 100 for r in rows.itertuples()]
    (best,) = evidence.settled(rows.assign(dev_f1=scored)).itertuples()
    assert (best.method, best.rate) == settings[-1] and best.dev_f1 == 3.5


def test_the_tuned_methods_have_the_settings_that_dev_chose():
    known = evidence.experiments()
    searches = (e for name, e in known.items() if name.startswith("tuning_"))
    chosen = evidence.settled(evidence.searched(searches))
    everyones = (chosen["method"] == chosen["of"]) & (chosen["rate"] == STUDENTS["bilstm"].rate)
    others = chosen[~everyones]
    tuned = [e for name, e in known.items() if name.startswith("tuned_")]
    ran = {(m.name, s.rate) for e in tuned for m in e.wanted for s in e.learners.values()}
    assert ran == set(zip(others["method"], others["rate"], strict=True))
