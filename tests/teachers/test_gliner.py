import json
from dataclasses import replace

import pytest
import torch
from conftest import SENTENCES
from gliner import GLiNER
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.teachers import gliner
from kdlib.teachers.gliner import Recipe, Told, by_covering_span, soft_labels, span_scores
from kdlib.text.tags import Sentence, Span

ASKED = [("LOC", "PER")] * len(SENTENCES)
TINY = Recipe(steps=2, batch_size=4, hidden=16)
modes = pytest.mark.parametrize("mode", ["token_level", "markerV0"])


@pytest.fixture
def make(long_folder):
    return lambda mode="token_level", **more: gliner.train(
        SENTENCES, ASKED, replace(TINY, mode=mode, **more), long_folder
    )


@modes
def test_a_gliner_is_trained_by_gliners_trainer_and_repeats_exactly(make, mode):
    first, again = make(mode), make(mode)
    assert first.config.span_mode == mode and not first.training
    pairs = zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(a.equal(b) for a, b in pairs)


def test_another_recipe_or_label_set_is_another_teacher(make, long_folder):
    weights = [
        m.state_dict()
        for m in (make(), make(seed=1), gliner.train(SENTENCES, [("PER",)] * 16, TINY, long_folder))
    ]
    assert not any(
        all(a.equal(b) for a, b in zip(weights[0].values(), w.values(), strict=True))
        for w in weights[1:]
    )


@modes
def test_a_gliner_saved_to_a_folder_is_loaded_by_its_name_and_answers_the_same(
    make, tmp_path, mode
):
    made = make(mode)
    made.save_pretrained(tmp_path / "saved")
    loaded = gliner.load(str(tmp_path / "saved"))
    ours, theirs = (gliner.ask(m, SENTENCES[:4], ASKED[:4]) for m in (made, loaded))
    assert all(
        a.covering.equal(b.covering) and a.entities == b.entities
        for a, b in zip(ours, theirs, strict=True)
    )


def test_what_is_no_gliner_is_said_to_be_none(tmp_path, tiny_folder):
    for name in (str(tmp_path / "nothing"), "./nowhere"):
        with pytest.raises(
            FileNotFoundError, match=r"no GLiNER at .*gliner_config.json, or a hub name"
        ):
            gliner.load(name)
    with pytest.raises(OSError, match="cannot load the GLiNER"):
        gliner.load(tiny_folder)


def test_a_folder_that_names_code_to_run_is_refused_before_anything_is_loaded(make, tmp_path):
    folder = tmp_path / "evil"
    make().save_pretrained(folder, safe_serialization=True)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "gliner_config.json").read_text())
    config["encoder_config"]["auto_map"] = {"AutoModel": f"{folder}--evil.Evil"}
    config["encoder_config"]["model_type"] = "evil"
    (folder / "gliner_config.json").write_text(json.dumps(config))
    with pytest.raises(OSError, match=r"gliner_config.json: expected a model of data alone"):
        gliner.load(str(folder))
    assert not (tmp_path / "ran").exists()


def test_a_damaged_gliner_is_an_error(make, tmp_path):
    make().save_pretrained(tmp_path / "cut", safe_serialization=True)
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(OSError, match="cannot load the GLiNER"):
        gliner.load(str(tmp_path / "cut"))


@modes
def test_answers_are_gliners_own_entities_and_its_scores(make, mode):
    model = make(mode)
    with torch.no_grad():  # a model of two steps finds nothing: make it bolder
        last = (
            model.model.scorer.out_mlp[-1]
            if mode == "token_level"
            else model.model.prompt_rep_layer[-1]
        )
        last.bias += 1.0
    found = gliner.ask(model, SENTENCES[:4], ASKED[:4])
    for sentence, labels, answer in zip(SENTENCES, ASKED, found, strict=False):
        own = model.inference([" ".join(sentence.tokens)], list(labels))[0]
        starts = [sum(len(w) + 1 for w in sentence.tokens[:i]) for i in range(len(sentence.tokens))]
        assert [(starts[s.start], s.type) for s in answer.entities] == [
            (e["start"], e["label"]) for e in own
        ]
        for span, e in zip(answer.entities, own, strict=True):
            assert (
                answer.covering[span.start : span.end, labels.index(span.type)] >= e["score"] - 2e-3
            ).all()
        assert answer.covering.shape == (len(sentence.tokens), 2)
        assert (answer.inside is not None) == (mode == "token_level")
    assert any(a.entities for a in found)


def test_labels_may_differ_from_sentence_to_sentence_and_be_none(make):
    asked = [("PER",), (), ("a big b", "LOC", "PER"), ("LOC",)]
    found = gliner.ask(make(), SENTENCES[:4], asked)
    assert [a.covering.shape[1] for a in found] == [1, 0, 3, 1]
    alone = gliner.ask(make(), SENTENCES[2:3], asked[2:3])[0]
    assert torch.allclose(alone.covering, found[2].covering, atol=2e-3)


def test_a_sentence_that_gliner_would_cut_is_an_error(make):
    with pytest.raises(ValueError, match=r"anna anna.*: this GLiNER reads \d+ of its 200 words"):
        gliner.ask(make(), [Sentence(("anna",) * 200)], [("PER",)])


def test_a_question_that_does_not_fit_is_an_error(make):
    for asked in ([("PER", "PER")], [], [("PER",)] * 2):
        with pytest.raises(ValueError, match="expected distinct labels for each of 1 sentences"):
            gliner.ask(make(), SENTENCES[:1], asked)
    with pytest.raises(ValueError, match="expected labelled sentences to train a GLiNER on"):
        gliner.train([Sentence(("a",))], [("PER",)], TINY)


def test_an_entity_wider_than_any_scored_span_is_taught_too(make, monkeypatch):
    model = make()
    with torch.no_grad():  # sure of everything: the whole sentence is one entity
        model.model.scorer.out_mlp[-1].weight.zero_()
        model.model.scorer.out_mlp[-1].bias.fill_(3.0)
    (answer,) = gliner.ask(model, [Sentence(("anna",) * 20)], [("PER",)])
    assert answer.entities == (Span(0, 20, "PER"),) or all(
        s.end - s.start == 1 for s in answer.entities
    )
    assert (soft_labels(answer.covering)[:, 0] < 0.5).all()


def test_span_scores_are_the_least_of_start_end_and_insides():
    scores = torch.rand(5, 3, 3)
    spans = span_scores(scores, widest=4)
    assert spans.shape == (5, 4, 3)
    for t in range(5):
        for w in range(4):
            inside = scores[t : t + w + 1, :, 2]
            wanted = (
                torch.cat([inside, scores[t : t + 1, :, 0], scores[t + w : t + w + 1, :, 1]]).amin(
                    0
                )
                if t + w < 5
                else 0
            )
            assert torch.equal(spans[t, w], torch.as_tensor(wanted).expand(3))


def test_the_covering_score_is_the_best_of_all_spans_over_a_word():
    spans = torch.rand(6, 3, 2)
    for t, best in enumerate(by_covering_span(spans)):
        over = [spans[s, w] for s in range(6) for w in range(3) if s <= t <= s + w < 6]
        assert torch.equal(best, torch.stack(over).amax(0))


def test_the_score_from_before_is_the_best_of_the_spans_that_began_earlier():
    spans = torch.rand(6, 3, 2)
    for t, best in enumerate(by_covering_span(spans, first=1)):
        over = [spans[s, w] for s in range(6) for w in range(3) if s < t <= s + w < 6]
        assert torch.equal(best, torch.stack(over).amax(0) if over else torch.zeros(2))


def test_iob2_emissions_decode_to_gliners_own_entities(make):
    model = make("markerV0")
    with torch.no_grad():
        model.model.prompt_rep_layer[-1].bias += 1.0
    answers = gliner.ask(model, SENTENCES[:4], ASKED[:4])
    told = Told({s.tokens: a for s, a in zip(SENTENCES, answers, strict=False)}, ["LOC", "PER"])
    assert any(a.entities for a in answers)
    for sentence, e in zip(SENTENCES, told.emissions(SENTENCES[:4]), strict=False):
        path = told.crf.viterbi(e[None], torch.ones(1, len(e), dtype=torch.bool))[0]
        wanted = replace(sentence, spans=told.answers[sentence.tokens].entities).tags
        assert [told.labels[k] for k in path] == wanted
        torch.testing.assert_close(e.exp().sum(1), torch.ones(len(e)))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.floats(0.05, 0.95), st.integers(0, 2**31))
def test_soft_labels_are_distributions_that_keep_gliners_decisions(labels, threshold, seed):
    scores = torch.rand(
        20, labels, generator=torch.Generator().manual_seed(seed), dtype=torch.double
    )
    soft = soft_labels(scores)
    assert torch.allclose(soft.sum(1), torch.ones(20, dtype=torch.double))
    assert ((1 - soft[:, 0] > threshold) == (scores.amax(1) > threshold)).all()
    assert (soft[:, 1:].argmax(1) == scores.argmax(1)).all()


def test_soft_labels_of_nothing_and_of_nonsense():
    assert soft_labels(torch.zeros(3, 0)).tolist() == [[1.0]] * 3
    assert soft_labels(torch.zeros(2, 2)).tolist() == [[1.0, 0.0, 0.0]] * 2
    with pytest.raises(ValueError, match="expected numbers from 0 to 1"):
        soft_labels(torch.tensor([[3.0]]))


def test_the_teachers_package_is_the_real_one(make):
    assert (
        isinstance(make(), torch.nn.Module)
        and type(make()).__module__.startswith("gliner.")
        and GLiNER
    )
