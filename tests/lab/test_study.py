import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CORPUS, SENTENCES, tiny_study
from transformers import BertConfig, BertForTokenClassification, BertTokenizerFast

from kdlib import losses
from kdlib.lab import cache, plots, scores, tables, targets, train
from kdlib.lab.study import Fitted, Study
from kdlib.losses import surrogate_labels
from kdlib.methods import METHODS, Lacks, Lesson, chosen
from kdlib.models import Tagger
from kdlib.students import Lstm, Thin, Twin
from kdlib.teachers import gliner
from kdlib.teachers.gliner import Answer, Recipe, Told
from kdlib.teachers.tagger import Taught, from_hugging_face
from kdlib.text.corpora import Dataset, Parts, in_file_order, shuffled, with_noise
from kdlib.text.tags import Sentence, Span, iob2_labels

WORDS = [Sentence((*s.tokens, str(i)), s.spans) for i, s in enumerate(SENTENCES)]
SET = Dataset("toy", WORDS[:12], WORDS[12:13], WORDS[13:])


@pytest.fixture
def study(tiny_folder):
    return tiny_study(tiny_folder)


@pytest.fixture
def no_fit(monkeypatch):
    return lambda: monkeypatch.setattr(train, "fit", lambda *a, **k: pytest.fail("trained again"))


def wise(parts, sure=0.9):
    """A teacher that knows gold."""
    answers = {}
    for s in (*parts.labelled, *parts.transfer_gold, *parts.dev, *parts.test):
        asked = parts.asked(s)
        of = torch.full((len(s.tokens), len(asked)), 0.01)
        for start, end, kind in s.spans:
            of[start:end, asked.index(kind)] = sure
        answers[s.tokens] = Answer(asked, s.spans, of, None, of * 0)
    return Told(answers, parts.types)


def test_no_seeds_and_no_number_are_errors(study):
    with pytest.raises(ValueError, match="seeds: expected at least one, got none"):
        study.runs(["student alone"], ["bilstm"], [])
    with pytest.raises(ValueError, match=r"expected numbers, got NaN for \['alpha'\]"):
        chosen(["posterior"], alpha=float("nan"))


def test_surrogates_too_large_to_hold_are_refused_with_their_size(study, monkeypatch):
    monkeypatch.setattr(targets, "MOST_SURROGATES", 100)
    with pytest.raises(ValueError, match="counts of neighbouring labels of at most 0 GB, got 0 GB"):
        study.run("top-k", "bilstm", 0)


# ---- parts ----


def test_the_parts_do_not_overlap_and_transfer_has_no_labels(study):
    parts = study.parts
    assert len(parts.labelled) == 6 and len(parts.transfer) == 8
    assert all(s.spans is None for s in parts.transfer)
    both = parts.labelled + parts.transfer_gold
    assert Counter(s.tokens for s in both) <= Counter(s.tokens for s in CORPUS.train)
    assert shuffled(CORPUS, 6, 8) == parts
    unlabelled = replace(CORPUS, test=[SENTENCES[0].without_labels()])
    with pytest.raises(ValueError, match="tiny: expected labels in all of test, got text alone"):
        shuffled(unlabelled)
    for wrong in ({"labelled": 17}, {"labelled": 6, "transfer": 11}):
        with pytest.raises(ValueError, match="expected at most 16 labelled"):
            shuffled(CORPUS, **wrong)
    with pytest.raises(ValueError, match="dev: expected a whole number"):
        shuffled(CORPUS, dev=-1)


@pytest.mark.parametrize("n", [0, 1, 2, 17, 400])
def test_the_shuffle_is_torchs(n):
    corpus = Dataset("x", [Sentence((str(i),), ()) for i in range(n)], [], [])
    expected = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()
    assert [int(s.tokens[0]) for s in shuffled(corpus).labelled] == expected


def test_noise_spoils_the_share_it_claims_of_training_alone():
    gold = Sentence(("a", "b", "c"), (Span(0, 1, "X"), Span(1, 3, "Y")))
    parts = Parts(["X", "Y"], [gold] * 1000, [gold] * 1000, [gold], [gold])
    noisy = with_noise(parts, 0.3, clean=100)
    assert noisy.labelled[900:] == [gold] * 100
    assert (noisy.dev, noisy.test) == (parts.dev, parts.test)
    taught = (noisy.labelled[:900], noisy.transfer_gold)
    spans = [s for sentences in taught for x in sentences for s in x.spans]
    kept = sum(s in gold.spans for s in spans) / 3800
    assert abs(kept - 0.7) < 0.02 and abs(len(spans) / 3800 - 0.85) < 0.02  # half are missed
    assert with_noise(parts, 0.3, clean=100) == noisy and with_noise(parts, 0.0) == parts
    alone = [Sentence(("a",), (Span(0, 1, "Y"),))] * 9
    only = replace(parts, types=["Y"], transfer_gold=[], labelled=alone)
    assert {s.spans for s in with_noise(only, 1.0).labelled} == {()}  # no other type: missed
    with pytest.raises(ValueError, match="noise: expected a share"):
        with_noise(parts, 1.5)


def test_types_become_words_and_parts_keep_the_order_of_the_file():
    parts = in_file_order(SET, 6, 2)
    assert (
        parts.types == ["location", "person"] and parts.transfer_gold[0].tokens == WORDS[8].tokens
    )
    sizes = (parts.labelled, parts.teaching, parts.transfer, parts.dev, parts.test)
    assert [len(p) for p in sizes] == [6, 2, 4, 1, 3]
    assert parts.labelled[0].spans == (Span(0, 1, "person"), Span(3, 4, "location"))
    assert parts.first(8).text == parts.text[:8] and len(parts.first(3).labelled) == 3
    for size in (0, 11):
        with pytest.raises(ValueError, match="size: expected 1 to 10 sentences"):
            parts.first(size)
    for labelled, teaching, transfer in ((13, 0, 0), (0, 1, 0), (8, 1, 4), (8, -1, 1)):
        with pytest.raises(ValueError, match="expected labelled, teaching and transfer sentences"):
            in_file_order(SET, labelled, teaching, transfer)
    for broken in (Dataset("x", WORDS, [], WORDS), Dataset("x", WORDS, WORDS, [])):
        with pytest.raises(ValueError, match="x: expected entities, dev and test sentences"):
            in_file_order(broken, 1)


def test_with_many_types_a_sentence_is_asked_for_its_own_and_as_many_others():
    types = [f"type {i}" for i in range(50)]
    many = replace(in_file_order(SET, 6, 2), types=types, mentions=types)
    sentence = Sentence(("a", "b", "c"), (Span(0, 1, "type 3"), Span(1, 2, "type 9")))
    asked = many.asked(sentence)
    assert {"type 3", "type 9"} <= set(asked) and len(asked) == len(set(asked)) == 6
    assert many.asked(sentence) == asked != many.asked(replace(sentence, tokens=("x", "y", "z")))
    assert len(many.asked(sentence.without_labels())) == 8  # its gold does not show
    few = replace(many, mentions=["type 1", "type 1"])
    assert sorted(few.asked(sentence)) == ["type 1", "type 3", "type 9"]
    assert few.asked(sentence.without_labels()) == ("type 1",)


# ---- what can be combined ----


@pytest.mark.parametrize(
    ("method", "student", "missing"),
    [
        ("structural", "twin tower", "sequences"),
        ("msd", "twin tower", "a living teacher"),
        ("adaptive", "bilstm", "layers"),
        ("distilbert", "thin", "layers as wide as the teacher's"),
    ],
)
def test_what_a_student_cannot_serve_is_refused_before_anything_trains(
    study, method, student, missing, no_fit
):
    no_fit()
    with pytest.raises(Lacks, match=f"the method '{method}' needs .*{missing}.*'{student}' lacks"):
        study.runs([METHODS["student alone"], method], [student], [0])


def test_what_a_teacher_cannot_tell_is_refused(long_folder):
    parts = in_file_order(SET, 6, 2)
    told = Study(parts, wise(parts), encoder=long_folder, quiz=2)
    for method, missing in (("adaptive", "layers"), ("msd", "a living teacher")):
        with pytest.raises(Lacks, match=f"'{method}' needs .*{missing}.*which its teacher lacks"):
            told.runs([method], ["transformer"], [0])
    characters = Study(parts, encoder="characters")
    with pytest.raises(Lacks, match="needs a Transformer, got the encoder 'characters'"):
        characters.runs(["student alone"], ["thin"], [0])
    text = replace(parts, transfer_gold=parts.transfer)
    with pytest.raises(Lacks, match="needs gold labels that the text lacks"):
        replace(told, parts=text).runs(["gold on transfer"], ["twin tower"], [0])


def test_a_teacher_that_sees_letter_case_teaches_what_it_says_and_nothing_inside_it(study):
    cased = replace(study, teacher=Fitted(5, 4, cased=True))
    (blind, seeing), labels = (s.new_teacher() for s in (study, cased)), len(study.labels)
    assert seeing.parameters_in_all - blind.parameters_in_all == 8 * 32 + 32 * labels
    thin = replace(cased, students={"thin": Thin(layers=2, width=10, feed_forward=20, embedding=6)})
    assert len(cased.runs(["teacher", "structural"], ["bilstm"], [0])) == 2
    assert thin.runs(["posterior"], ["thin"], [0])  # its start is the encoder's, not the teacher's
    for method, missing in (("adaptive", "layers"), ("msd", "a living teacher")):
        with pytest.raises(Lacks, match=f"'{method}' needs .*{missing}.*which its teacher lacks"):
            cased.runs([method], ["transformer"], [0])
    with pytest.raises(Lacks, match="sees letter case needs a Transformer, got 'characters'"):
        replace(cased, encoder="characters").check(METHODS["posterior"], "bilstm")


def test_unknown_choices_are_refused(study):
    with pytest.raises(ValueError, match=r"method: expected some of .*got \['magic'\]"):
        study.runs(["magic"], ["bilstm"], [0])
    with pytest.raises(ValueError, match="student: expected one of .*got 'gru'"):
        study.runs(["posterior"], ["gru"], [0])
    with pytest.raises(ValueError, match=r"posterior: expected knobs among .*got \['k'\]"):
        METHODS["posterior"].tuned(k=3)
    with pytest.raises(ValueError, match="sees: expected 'labelled' or 'all'"):
        Fitted(sees="everything")
    for wrong in ({"updates": 0}, {"batch": 2.5}, {"rate": float("inf")}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
            Fitted(**wrong)
    for quiz in (0, 6):
        with pytest.raises(ValueError, match="quiz: expected some, not all, of 6 labelled"):
            replace(study, quiz=quiz).runs(["posterior", "msd"], ["bilstm"], [0])
    assert not (cache.folder() / "runs").exists()  # nothing was trained before it was refused


def test_every_method_declares_a_colour_of_its_own_and_a_source():
    assert len({m.colour for m in METHODS.values()}) == len(METHODS)
    assert all(m.source and name == m.name for name, m in METHODS.items())


# ---- runs ----


def test_a_run_is_remembered_and_a_change_is_another_run(study, monkeypatch):
    posterior, fits, fit = METHODS["posterior"], [], train.fit
    first = study.run(posterior, "bilstm", 0)
    monkeypatch.setattr(train, "fit", lambda *a, **k: fits.append(1) or fit(*a, **k))
    assert study.run(posterior, "bilstm", 0) == first and not fits
    for other in (posterior.tuned(alpha=0.2), posterior.tuned(temperature=2.0)):
        study.run(other, "bilstm", 0)
    shorter = replace(study, budget=replace(study.budget, updates=4))
    shorter.run(posterior, "bilstm", 0)
    assert len(fits) == 3
    monkeypatch.setattr(cache, "VERSION", 99)
    monkeypatch.setattr(cache, "MADE_BY", (99,))
    study.run("student alone", "bilstm", 0)
    assert len(fits) == 4
    assert not list((cache.folder() / "checkpoints").glob("*.pt"))


def test_only_a_methods_own_knobs_make_another_run(study, no_fit):
    study.run("posterior", "bilstm", 0)
    tuned = chosen(["posterior"], k=7, weight_temperature=2.0)
    no_fit()
    study.run(tuned[0], "bilstm", 0)
    study.run(METHODS["posterior"].tuned("another name"), "bilstm", 0)
    for knobs in ({"k": 2}, {"weight_temperature": 2.0}, {"temperature": 2.0}, {"alpha": 0.1}):
        with pytest.raises(pytest.fail.Exception, match="trained again"):
            study.run(METHODS["multi-grained"].tuned(**knobs), "bilstm", 0)


def test_methods_and_seeds_share_what_was_read_before_them(study, monkeypatch):
    """Neither the sentences nor what their teacher says of them is made a second time."""
    shared, methods = replace(study, teacher=Fitted(5, 4, one=True)), ["posterior", "structural"]
    shared.runs(methods, ["bilstm"], [0], show=False)
    monkeypatch.setattr(Tagger, "encode", lambda *a: pytest.fail("encoded again"))
    monkeypatch.setattr(Tagger, "emissions", lambda *a: pytest.fail("asked again"))
    runs = shared.runs(methods, ["bilstm"], [0, 1], show=False)
    assert len(runs) == 4 and len({json.dumps(run.history) for run in runs}) == 4


def test_a_teacher_whose_weights_were_lost_is_trained_again(study):
    weights = study.taught(0)[0].tagger.state_dict()
    for file in (cache.folder() / "weights").glob("*.pt"):
        file.unlink()
    again = replace(study).taught(0)[0].tagger.state_dict()
    assert all(weights[name].equal(again[name]) for name in weights)


def test_text_without_labels_teaches_no_teacher(study):
    text = replace(study, parts=replace(study.parts, transfer_gold=study.parts.transfer))
    sees_all = replace(text, teacher=replace(study.teacher, sees="all")).taught(0)[0]
    assert sees_all.tagger.output.weight.equal(study.taught(0)[0].tagger.output.weight)


def test_one_teacher_serves_every_seed(study):
    shared = replace(study, teacher=replace(study.teacher, one=True))
    weights = [shared.taught(seed)[0].tagger.output.weight for seed in (0, 1)]
    assert weights[0].equal(weights[1])
    assert not study.taught(1)[0].tagger.output.weight.equal(weights[0])
    runs = shared.runs(["teacher", "student alone"], ["bilstm"], [0, 1])
    found = tables.table(runs, study.parts)[["method", "seed"]].values.tolist()
    assert found == [["teacher", 0], ["student alone", 0], ["student alone", 1]]


def test_transfer_sentences_add_no_gold_term(study):
    """Eq. 6 on a batch without labels is (1 - alpha) times the distillation loss."""
    teacher = study.taught(0)[0]
    own = study.lessons(METHODS["posterior"], "bilstm", 0)
    student, batch = own.student.eval(), own.rows.collate([0, 7, 8])
    assert batch.labelled.tolist() == [True, False, False]
    chain = student.chain(student(batch))
    other = teacher.tagger.chain(batch.teacher)
    distilled = losses.posterior(chain, other, batch.mask)
    one = chain._replace(emissions=chain.emissions[:1])
    gold = losses.crf_nll(one, batch.tags[:1], batch.mask[:1]) / 3
    for alpha in (0.0, 0.3):
        lesson = Lesson(chain, other, batch, 0.0)
        found = METHODS["posterior"].loss(lesson, alpha=alpha, temperature=1.0)
        torch.testing.assert_close(found, alpha * gold + (1 - alpha) * distilled)


def test_pseudo_labels_are_gold_where_there_is_gold_and_the_teachers_best_elsewhere(study):
    own = study.lessons(METHODS["pseudo-labels"], "bilstm", 0)
    parts, teacher = study.parts, study.taught(0)[0].tagger
    names = iob2_labels(parts.types)
    wanted = [s.tags for s in parts.labelled]
    wanted += [
        replace(s, spans=x).tags
        for s, x in zip(parts.transfer, teacher.predict(parts.transfer), strict=True)
    ]
    assert [[names[t] for t in tags] for tags in own.rows.tags] == wanted


def test_gold_on_transfer_is_the_student_alone_on_all_its_text(study):
    ceiling = study.run("gold on transfer", "bilstm", 0)
    everything = replace(study.parts, labelled=study.parts.labelled + study.parts.transfer_gold)
    alone = replace(study, parts=everything).run("student alone", "bilstm", 0)
    assert [h["loss"] for h in ceiling.history] == [h["loss"] for h in alone.history]


def test_gold_labels_of_the_transfer_part_reach_no_distilled_student(study):
    spoilt = [replace(s, spans=()) for s in study.parts.transfer_gold]
    other = replace(study, parts=replace(study.parts, transfer_gold=spoilt))
    for method in ("posterior", "pseudo-labels", "multi-grained"):
        first, again = (s.run(method, "bilstm", 0).history for s in (study, other))
        assert [h["loss"] for h in first] == [h["loss"] for h in again]


def test_surrogates_are_those_of_the_teachers_paths_and_are_kept(study, monkeypatch):
    teacher = study.taught(0)[0]
    text = study.parts.text
    seen = targets.with_teacher(teacher.tagger.encode(text), text, teacher)
    found = targets.with_surrogates(seen, teacher, 3, 2.0)
    batch = found.collate([0, 1, 9])
    expected = surrogate_labels(teacher.tagger.chain(batch.teacher), batch.mask, 3, 2.0)
    for name, value in batch.surrogates._asdict().items():
        torch.testing.assert_close(value, getattr(expected, name))
    assert batch.to("cpu").surrogates.allowed.dtype == torch.bool
    monkeypatch.setattr(targets, "surrogate_labels", None)
    again = targets.with_surrogates(seen, teacher, 3, 2.0)
    assert all(
        a.unary.equal(b.unary) for a, b in zip(again.surrogates, found.surrogates, strict=True)
    )
    with pytest.raises(TypeError):
        targets.with_surrogates(seen, teacher, 4, 2.0)  # other surrogates are made anew
    with pytest.raises(ValueError, match="expected sentences with their teacher's emissions"):
        targets.with_surrogates(teacher.tagger.encode(text), teacher, 2)
    assert targets.with_teacher(found, text, teacher).surrogates is None


def test_a_sentence_longer_than_the_teachers_window_is_read_by_both(study):
    long = Sentence(("anna", "lives", "in", "paris") * 10)
    teacher, student = study.taught(0)[0], study.new_student("bilstm", 0)
    seen = targets.with_teacher(student.encode([long]), [long], teacher)
    own = teacher.tagger.encode([long])
    assert seen.teacher[0].equal(teacher.tagger.emissions(own)[0]) and len(seen.teacher[0]) == 40
    assert len(seen.windows[0]) == 1 < len(own.windows[0])
    with pytest.raises(ValueError, match="expected the data's own 1 sentences, got 1 of other"):
        targets.with_teacher(student.encode([long]), study.parts.labelled[:1], teacher)


def test_characters_need_no_pretrained_encoder(study):
    characters = replace(study, encoder="characters")
    teacher = characters.taught(0)[0].tagger
    student = characters.new_student("bilstm", 0)
    assert student.parameters_in_all < teacher.parameters_in_all / 5
    words = replace(study, encoder="character transformer", teacher=Fitted(2, 4, softmax=True))
    shape = Thin(layers=2, width=24, feed_forward=48, embedding=12)
    words = replace(words, students={"thin": shape}, budget=replace(study.budget, updates=2))
    assert np.isfinite(words.run("adaptive", "thin", 0).history[-1]["loss"])


def test_a_thin_student_is_kept_and_predicts_as_its_run_says(study, no_fit):
    thin = Thin(layers=2, width=10, feed_forward=20, embedding=6)
    layered = replace(study, teacher=Fitted(3, 4, softmax=True), students={"thin": thin})
    student, run = layered.trained("adaptive", "thin", 0)
    assert [tuple(spans) for spans in run.predicted] == student.predict(study.parts.test)
    start = layered.new_student("thin", 0)
    pairs = zip(student.encoder.parameters(), start.encoder.parameters(), strict=True)
    assert any(not a.equal(b) for a, b in pairs)
    no_fit()
    again, _ = replace(layered).trained("adaptive", "thin", 0)
    pairs = zip(student.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(a.equal(b) for a, b in pairs)
    with pytest.raises(ValueError, match="student: expected one whose weights are kept"):
        study.trained("posterior", "bilstm", 0)


def test_a_thin_student_of_seen_pieces_reads_its_own_vocabulary(study):
    thin = Thin(layers=2, width=10, feed_forward=20, embedding=0, pieces="seen")
    few = [SENTENCES[3]] * 6  # "nobody is in": no Anna, no Paris
    parts = replace(study.parts, labelled=few, transfer_gold=few)
    pruned = replace(study, parts=parts, students={"thin": thin})
    student = pruned.new_student("thin", 0)
    assert len(student.tokenizer) < len(study.taught(0)[0].tagger.tokenizer)
    assert np.isfinite(pruned.run("posterior", "thin", 0).history[-1]["loss"])
    with pytest.raises(ValueError, match="pieces: expected 'seen' or 'whole'"):
        Thin(pieces="some")


def test_the_tables_hold_what_the_runs_say(study):
    runs = study.runs(["teacher", "student alone", "posterior"], ["bilstm"], [0, 1])
    table = tables.table(runs, study.parts)
    assert list(table["method"].unique()) == ["teacher", "student alone", "posterior"]
    for run, f1 in zip(runs, table["f1"], strict=True):
        assert f1 == pytest.approx(scores.scores(study.parts.test, run.predicted)["f1"], abs=1e-3)
    summed = tables.summary(table)
    assert summed.loc["posterior", "seeds"] == 2
    compared = tables.compare(runs, study.parts)
    assert set(compared["method"]) == {"teacher", "posterior"}
    paired = tables.paired(runs, study.parts, {"teacher": ["posterior"], "student alone": []})
    assert [(r.method, r.against) for r in paired.itertuples()] == [("posterior", "teacher")]
    closer = tables.closer_look(runs, study.parts).set_index("method")
    assert closer.loc["teacher", "agreement with teacher"] == 100


def test_shown_is_what_both_intervals_leave_out_0():
    rows = [(1, 2, 1, 2), (-2, -1, -2, -1), (-1, 2, 1, 2), (1, 2, -1, 2), (1, 2, np.nan, np.nan)]
    compared = pd.DataFrame(rows, columns=["low", "high", "seeds_low", "seeds_high"])
    assert tables.shown(compared).tolist() == [True, True, False, False, False]


def test_a_papers_table_has_its_f1_recomputed():
    paper = tables.printed("msd_table1_conll2003")
    p, r = paper.loc["teacher", ["precision", "recall"]]
    assert paper.loc["teacher", "f1 from p and r"] == pytest.approx(2 / (1 / p + 1 / r))


def test_a_sentence_side_by_side_begins_where_the_teacher_doubts(study, monkeypatch):
    monkeypatch.setenv(plots.BATCH, "1")
    seen = []
    monkeypatch.setattr(plots, "display", lambda html: seen.append(html.data))
    runs = study.runs(["teacher", "student alone"], ["bilstm"], [0])
    tagger = study.taught(0)[0].tagger
    plots.side_by_side(study.parts, runs, "own", tagger)
    sure = [words.amax(1).min() for words in tagger.marginals(tagger.encode(study.parts.test))]
    doubted = study.parts.test[int(np.argmin(sure))]
    assert all(word in seen[0] for word in doubted.tokens)
    assert [who in seen[0] for who in ("gold", "teacher", "student alone")] == [True] * 3


def test_mass_of_k_best_grows_to_all(study):
    found = targets.mass_of_k_best(study.taught(0)[0], study.parts.test, [1, 5, 10_000])
    median = found.set_index("k")["0.5"]
    assert median[1] <= median[5] <= median[10_000]
    short = targets.mass_of_k_best(study.taught(0)[0], [Sentence(("paris",))], [5])
    assert short["0.5"][0] == pytest.approx(1, abs=1e-4)


# ---- a GLiNER, a twin tower, a Hugging Face classifier ----


@pytest.fixture
def open_study(long_folder):
    parts = in_file_order(SET, 6, 2)
    students = {"twin tower": Twin(), "bilstm": Lstm(embedding=8, hidden=6)}
    budget = tiny_study(long_folder).budget
    budget = replace(budget, updates=60, evaluations=2)
    return Study(parts, wise(parts), budget, long_folder, students=students, follow=True)


def test_both_twin_towers_learn_and_are_read_back(open_study, no_fit):
    labelled = replace(open_study, parts=open_study.parts.first(6))
    soft = METHODS["soft targets"].tuned(alpha=0.2, temperature=0.5)
    pairs = [(labelled, METHODS["student alone"]), (open_study, soft)]
    for on, method in pairs:
        _, run = on.trained(method, "twin tower", 0)
        assert run.history[-1]["loss"] < run.history[0]["loss"] and len(run.history) == 2
        last = run.history[-1]
        assert last["last_gold_recall"] == last["last_teacher_recall"] >= 80
    no_fit()
    again, _ = replace(open_study).trained(soft, "twin tower", 0)
    assert not again.training


def test_every_student_learns_from_a_gliner_and_it_decodes_to_the_same_entities(open_study):
    told, parts = open_study.teacher, open_study.parts
    sentences = [*parts.labelled, *parts.dev, *parts.test]
    for sentence, emissions in zip(sentences, told.emissions(sentences), strict=True):
        mask = torch.ones(1, len(emissions), dtype=torch.bool)
        path = told.crf.viterbi(emissions[None], mask)[0]
        assert [told.labels[k] for k in path] == sentence.tags
    names = ["pseudo-labels", "gold on transfer", "soft targets"]
    open_study.runs(names, ["twin tower", "bilstm"], [0], show=False)
    for method in ("posterior", "structural", "weighted top-k", "multi-grained"):
        assert np.isfinite(open_study.run(method, "bilstm", 0).history[-1]["loss"])


def test_a_tagger_teaches_a_twin_tower(study):
    rows = study.lessons(METHODS["soft targets"], "twin tower", 0).rows
    assert all(torch.allclose(p.sum(1), torch.ones(len(p))) for p in rows.teacher)
    assert np.isfinite(study.run("soft targets", "twin tower", 0).history[-1]["loss"])


def test_with_alpha_0_a_distilled_student_sees_no_gold_label_at_all(open_study):
    parts = open_study.parts
    spoilt = replace(parts, labelled=[replace(s, spans=()) for s in parts.labelled])
    soft = METHODS["soft targets"].tuned(alpha=0.0)
    found = (replace(open_study, parts=p, follow=False) for p in (parts, spoilt))
    first, again = (s.run(soft, "twin tower", 0).history for s in found)
    assert [h["loss"] for h in first] == [h["loss"] for h in again]


def test_a_teacher_that_knows_nothing_teaches_nothing(open_study):
    answers = {
        t: replace(a, entities=(), covering=torch.zeros_like(a.covering))
        for t, a in open_study.teacher.answers.items()
    }
    blank = replace(open_study, teacher=Told(answers, open_study.parts.types))
    found = blank.run(METHODS["soft targets"].tuned(alpha=0.0), "twin tower", 0)
    assert not any(found.predicted)


def test_the_tables_hold_both_references(open_study):
    parts = open_study.parts.first(6)
    hard, soft = METHODS["student alone"], METHODS["soft targets"]
    study = replace(open_study, parts=parts)
    runs = study.runs([hard, soft], ["twin tower"], [0, 1], show=False)
    answers = study.teacher.answers
    first = parts.test[0].tokens
    answers[first] = replace(answers[first], entities=())  # a mistake of the teacher's
    study = replace(study)
    references, teacher = study.references(parts.test), study.taught(0)[1]
    for table in (
        tables.by_reference([teacher, *runs], parts.test, references),
        tables.paper_table(teacher, runs, parts.test, references),
    ):
        columns = ["model", "seed", "reference", "accuracy", "precision", "recall", "f1"]
        assert list(table.columns[:7]) == columns and len(table) == 2 * 5
        own = table[(table["model"] == "teacher") & (table["reference"] == "teacher")].iloc[0]
        assert own["accuracy"] == own["recall"] == own["span_f1"] == 100
        gold = table[(table["model"] == "teacher") & (table["reference"] == "gold")].iloc[0]
        assert gold["recall"] < 100 and gold["precision"] == 100
    compared = tables.compare(runs, parts, "student alone", references["teacher"])
    assert set(compared["method"]) == {"soft targets"}
    assert len(tables.histories(runs)) == 8


def test_the_question_to_the_teacher_does_not_show_the_gold_of_the_transfer_part(monkeypatch):
    types = [f"type {i}" for i in range(60)]
    renamed = [Sentence((*"abc", str(i)), (Span(0, 1, types[i]),)) for i in range(60)]
    parts = Parts(types, renamed[:30], renamed[30:50], renamed[50:55], renamed[55:], [], types)
    spoilt = replace(parts, transfer_gold=[replace(s, spans=()) for s in parts.transfer_gold])
    asked = []

    def answers(model, sentences, of):
        asked.append([of.asked(s) for s in sentences])
        return [Answer((), (), torch.zeros(4, 0), None, torch.zeros(4, 0))] * len(sentences)

    monkeypatch.setattr(targets, "answers", answers)
    model = torch.nn.Linear(1, 1)
    for of in (parts, spoilt):
        targets.told(model, of)
    assert asked[0] == asked[1] and all(types[55 + i] in asked[0][55 + i] for i in range(5))


def test_unseen_types_are_those_of_another_set_alone():
    spans = (Span(0, 1, "person"), Span(1, 2, "Dog Breed"))
    other = Dataset("x", [], [], [Sentence(("a", "b"), spans), Sentence(("c",), ())])
    sentences, types = targets.unseen_types(other, ["person"])
    assert types == ["dog breed"]
    assert sentences == [Sentence(("a", "b"), (Span(1, 2, "dog breed"),))]


def test_a_real_gliner_is_trained_once_and_asked_once(long_folder, monkeypatch):
    parts, tiny = in_file_order(SET, 6, 2), Recipe(steps=1, batch_size=2, hidden=16)
    model = targets.trained_gliner(parts, tiny, long_folder)
    told = targets.told(model, parts)
    assert set(told.answers) == {s.tokens for s in (*parts.text, *parts.dev, *parts.test)}
    other = Dataset("x", [], [], [Sentence(("a", "dog"), (Span(1, 2, "animal"),))])
    assert len(targets.quality(model, told, parts, other)) == 2
    monkeypatch.setattr(gliner, "train", lambda *a: pytest.fail("trained again"))
    again = targets.trained_gliner(parts, tiny, long_folder)
    monkeypatch.setattr(gliner, "ask", lambda *a: pytest.fail("asked again"))
    answers = targets.told(again, parts).answers
    for tokens, answer in told.answers.items():
        assert answers[tokens].entities == answer.entities
        assert answers[tokens].covering.equal(answer.covering)


def classifier(folder, tiny_folder, labels):
    """A Hugging Face token classifier with random weights, saved as its users save one."""
    torch.manual_seed(0)
    config = BertConfig.from_pretrained(tiny_folder)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: k for k, label in enumerate(labels)}
    model = BertForTokenClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer = BertTokenizerFast.from_pretrained(tiny_folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def test_a_hugging_face_classifier_teaches_from_a_folder(study, tiny_folder, tmp_path):
    labels = ["B-PER", "O", "I-LOC", "I-PER", "B-LOC"]  # in an order of its own
    model, tokenizer = classifier(tmp_path, tiny_folder, labels)
    teacher = from_hugging_face(str(tmp_path), study.parts.types)
    sentence = Sentence(("anna", "in", "paris"))
    encoded = tokenizer(list(sentence.tokens), is_split_into_words=True, return_tensors="pt")
    firsts = [encoded.word_ids().index(i) for i in range(3)]
    with torch.no_grad():
        expected = model(**encoded).logits[0][firsts]
    found = Taught(teacher).emissions([sentence])[0]
    torch.testing.assert_close(found, expected[:, [labels.index(x) for x in teacher.labels]])
    told = replace(study, teacher=str(tmp_path))
    runs = told.runs(["teacher", "posterior", "pseudo-labels"], ["bilstm"], [0])
    runs += told.runs(["adaptive", "msd"], ["transformer"], [0])
    assert all(np.isfinite(r.history[-1]["loss"]) for r in runs[1:])
    with pytest.raises(Lacks, match=r"'adaptive' needs layers of as many heads .*got \(12, 384\)"):
        replace(told, encoder="minilm").runs(["adaptive"], ["thin"], [0])


def test_a_classifier_with_other_labels_is_refused(study, tiny_folder, tmp_path):
    classifier(tmp_path, tiny_folder, ["O", "B-PER", "I-PER"])
    with pytest.raises(ValueError, match=r"expected a classifier with the labels .*B-LOC.*, got"):
        replace(study, teacher=str(tmp_path)).runs(["posterior"], ["bilstm"], [0])
    with pytest.raises(FileNotFoundError, match="no token classifier at './nowhere'"):
        from_hugging_face("./nowhere", ["PER"])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"]["0"] == "O"


def test_a_type_may_be_named_like_a_column(study):
    spans = (Span(0, 1, "f1"), Span(1, 2, "method"))
    sentences = [Sentence(("a", "b"), spans)] * 2
    parts = replace(study.parts, test=sentences, types=["f1", "method"])
    run = tables.Run("teacher", 0, [spans, spans[:1]], [], 1, 0.0)
    (row,) = tables.closer_look([run], parts).to_dict("records")
    assert row["method"] == "teacher" and row["f1"] == pytest.approx(600 / 7)
    assert (row["f1 of f1"], row["f1 of method"]) == pytest.approx((100, 200 / 3))
