import json
import os

import pytest
import torch
from conftest import SENTENCES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from kdlib import losses
from kdlib.lab import targets
from kdlib.students import Twin, pretrained
from kdlib.text.calls import batches
from kdlib.text.tags import Sentence, Span, word_runs
from kdlib.twin_tower import TwinTower

LABELS = ("PER", "LOC")


def entities(labels, asked):
    """The entities that labels word by word stand for."""
    return tuple(Span(a, b, asked[n - 1]) for a, b, n in word_runs(labels))


@pytest.fixture
def model(tiny):
    torch.manual_seed(0)
    made = TwinTower(tiny.tokenizer, embedding=8, hidden=6, layers=2, buckets=64).eval()
    nn.init.normal_(made.none)
    return made


def test_the_word_tower_is_a_packed_bidirectional_lstm(model):
    batch = model.encode(SENTENCES[:4], [LABELS] * 4).collate(range(4))
    reference = nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True)
    for layer, (ahead, back) in enumerate(zip(model.forwards, model.backwards, strict=True)):
        for source, suffix in ((ahead, ""), (back, "_reverse")):
            for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(reference, f"{kind}_l{layer}{suffix}").data = getattr(
                    source, f"{kind}_l0"
                ).data
    embedded = torch.zeros(*batch.mask.shape, 8)
    embedded[batch.mask] = model.embedding(batch.words.pieces, batch.words.starts)
    packed = nn.utils.rnn.pack_padded_sequence(
        embedded, batch.mask.sum(1), batch_first=True, enforce_sorted=False
    )
    wanted, _ = nn.utils.rnn.pad_packed_sequence(reference(packed)[0], batch_first=True)
    found = model.word_vectors(batch.words, batch.mask)
    torch.testing.assert_close(found[batch.mask], wanted[batch.mask])


def test_a_sentence_scores_the_same_alone_and_beside_longer_ones_with_other_labels(model):
    rows = model.encode(SENTENCES[:3], [("LOC",), ("PER", "LOC"), ("big", "PER")])
    together = model(rows.collate([0, 1, 2]))
    columns = rows.collate([0, 1, 2]).columns
    for r in range(3):
        alone = model(rows.collate([r]))[0]
        torch.testing.assert_close(together[r, : rows.lengths[r]][:, columns[r]], alone)
    assert (together[0, :, 2:] == float("-inf")).all()  # labels that only the others are asked for


def test_tags_go_there_and_back(model):
    asked = [("LOC", "PER"), ("LOC",), ("PER", "LOC"), ("big",)]
    rows = model.encode(SENTENCES[:4], asked)
    assert rows.tags[1] == [1] and rows.tags[3] == [0, 0, 0]
    assert [entities(t, a) for t, a in zip(rows.tags, asked, strict=True)] == [
        s.spans for s in SENTENCES[:4]
    ]
    assert model.encode([Sentence(("Anna",))], [("PER",)]).tags == [None]


def test_it_learns_from_hard_labels(model):
    rows = model.encode(SENTENCES, [LABELS] * 8 + [LABELS[::-1]] * 8)
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    for _ in range(60):
        batch = rows.collate(range(16))
        loss = losses.hard_labels(model(batch), batch.tags, batch.mask)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    assert model.predict(rows) == [s.spans for s in SENTENCES]
    assert model.predict_entities("Anna lives in Paris.", LABELS) == [
        {"start": 0, "end": 4, "text": "Anna", "label": "PER", "score": pytest.approx(1, abs=0.2)},
        {
            "start": 14,
            "end": 19,
            "text": "Paris",
            "label": "LOC",
            "score": pytest.approx(1, abs=0.2),
        },
    ]


def test_soft_targets_of_labels_not_asked_for_cost_nothing(model):
    teacher = [torch.tensor([[0.2, 0.8]]), torch.tensor([[0.5, 0.25, 0.25]])]
    rows = model.encode([Sentence(("anna",)), Sentence(("paris",))], [("PER",), LABELS], teacher)
    batch = rows.collate([0, 1])
    value = losses.soft_targets(model(batch), batch.teacher, batch.mask, 2.0)
    alone = [
        losses.soft_targets(
            model(rows.collate([r])), rows.collate([r]).teacher, torch.ones(1, 1).bool(), 2.0
        )
        for r in (0, 1)
    ]
    torch.testing.assert_close(value, torch.stack(alone).mean())
    value.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


TEXT = st.text(
    st.one_of(
        st.sampled_from("ab \n.é\u0301👩\u200d😀नि中'-<&"), st.characters(exclude_categories=["Cs"])
    ),
    max_size=60,
)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(TEXT, max_size=4),
    st.lists(st.text(min_size=1, max_size=8).filter(str.strip), max_size=4),
    st.floats(0, 1),
)
def test_any_text_gets_entities_with_exact_offsets(model, texts, labels, threshold):
    found = model.inference(texts, labels, threshold, batch_size=2)
    assert len(found) == len(texts)
    for text, entities in zip(texts, found, strict=True):
        at = 0
        for e in entities:
            assert (
                at <= e["start"] < e["end"] <= len(text)
                and e["text"] == text[e["start"] : e["end"]]
                and e["label"] in labels
            )
            assert e["text"] == e["text"].strip() and threshold < e["score"] <= 1
            at = e["end"]
        json.dumps(entities)


def test_batches_change_nothing(model):
    texts = ["Anna lives in Paris.", "", "b", "Paris " * 30, "  ", "c d e"]
    one_by_one = [model.predict_entities(t, LABELS, 0.2) for t in texts]
    for size in (1, 2, 32):
        for ours, wanted in zip(
            model.inference(texts, LABELS, 0.2, batch_size=size), one_by_one, strict=True
        ):
            assert [(e["start"], e["label"]) for e in ours] == [
                (e["start"], e["label"]) for e in wanted
            ]
            assert [e["score"] for e in ours] == pytest.approx(
                [e["score"] for e in wanted], abs=1e-5
            )


def test_bad_input_gets_a_defined_answer_or_one_clear_error(model):
    assert model.predict_entities("", LABELS) == [] == model.predict_entities("Anna", [])
    assert model.inference([], LABELS) == [] and len(model.inference("Anna", LABELS)) == 1
    assert model.predict_entities("Anna x", [*LABELS, "PER"], 0.0) == model.predict_entities(
        "Anna x", LABELS, 0.0
    )
    assert model.predict_entities(
        "Анна в городе 東京", ["местоположение", "人名", "very long label " * 9], 0.0
    )
    long = model.predict_entities("Anna saw Paris. " * 3334, LABELS, 0.0)
    assert long[-1]["end"] == 16 * 3334 - 1
    for wrong, message in (
        (("Anna", "PER"), "labels: expected a list of strings"),
        (("Anna", ["PER", 3]), "labels: expected a list of strings"),
        ((None, LABELS), "text: expected one string, got NoneType"),
    ):
        with pytest.raises(TypeError, match=message):
            model.predict_entities(*wrong)
    with pytest.raises(TypeError, match="texts: expected strings, got bytes"):
        model.inference([b"Anna"], LABELS)
    with pytest.raises(ValueError, match="labels: expected words, got ' '"):
        model.predict_entities("Anna", ["PER", " "])
    for threshold in (True, 2, "0.5", float("nan")):
        with pytest.raises(ValueError, match="threshold: expected a probability"):
            model.predict_entities("Anna", LABELS, threshold)
    for size in (0, -1, True, 2.5):
        with pytest.raises(ValueError, match="batch_size: expected a whole number from 1"):
            model.inference(["Anna"], LABELS, batch_size=size)
    assert model.inference(["a \ud800 b"], ["PER", "\ud800"], 0.0)[0][-1]["end"] == 5
    with pytest.raises(ValueError, match="one label"):
        model.predict_entities("Anna", LABELS, multi_label=True)


def test_words_the_tokenizer_does_not_know_are_told_apart_and_none_is_lost(model):
    vocabulary = len(model.tokenizer)
    known, *strange = (model.pieces(w) for w in ("paris", "😀", "東", "ქალაქი", "\u200b"))
    assert max(known) < vocabulary <= min(min(p) for p in strange) and len(set(strange)) == 4
    assert model.pieces("in 東") == (*model.pieces("in"), *model.pieces("東"))
    long = 99 * "in 東 "
    assert model.pieces(long) == 99 * model.pieces("in 東") and long not in model.pieces._known


def test_saved_and_read_back_it_answers_the_same(model, tmp_path):
    model.save_pretrained(tmp_path / "twin")
    again = TwinTower.from_pretrained(tmp_path / "twin")
    assert not again.training
    for text in ("Anna lives in Paris.", "😀 東"):
        assert again.predict_entities(text, LABELS, 0.1) == model.predict_entities(
            text, LABELS, 0.1
        )


def test_saving_never_deletes_what_is_not_its_own(model, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("mine")
    with pytest.raises(
        FileExistsError,
        match=r"work: expected a new folder or an earlier save of this model, got \['thesis.txt'\]",
    ):
        model.save_pretrained(tmp_path / "work")
    with pytest.raises(FileExistsError, match="expected a folder or nothing, got a file"):
        model.save_pretrained(tmp_path / "work" / "thesis.txt")
    assert [f.name for f in tmp_path.iterdir()] == ["work"] and (
        tmp_path / "work" / "thesis.txt"
    ).read_text() == "mine"
    model.save_pretrained(tmp_path / "twin")
    model.save_pretrained(tmp_path / "twin")
    before = (tmp_path / "twin" / "model.safetensors").read_bytes()
    nn.init.zeros_(model.none)

    def failing(source, target):
        raise OSError("disk gone")

    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", failing)
        with pytest.raises(OSError, match="disk gone"):
            model.save_pretrained(tmp_path / "twin")
    assert (tmp_path / "twin" / "model.safetensors").read_bytes() == before
    (tmp_path / "twin" / ".saving.killed").mkdir()
    monkeypatch.chdir(tmp_path / "twin")
    model.save_pretrained(".")  # the folder one stands in stays the same folder
    assert (tmp_path / "twin").samefile(".")
    assert (tmp_path / "twin" / "model.safetensors").read_bytes() != before
    assert not list((tmp_path / "twin").glob(".saving*"))


def test_a_long_text_does_not_make_padding_of_short_ones():
    lengths = [2] * 40 + [9000, 9000]
    found = list(batches(range(42), lengths, 32))
    assert found == [list(range(32)), list(range(32, 40)), [40], [41]]


def test_a_folder_that_is_no_model_or_is_damaged_says_so(model, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"expected a folder written by TwinTower.save_pretrained"
    ):
        TwinTower.from_pretrained(tmp_path)
    folder = tmp_path / "twin"
    model.save_pretrained(folder)
    whole = {f.name: f.read_bytes() for f in folder.iterdir()}
    damages = {
        "model.safetensors": [b"", whole["model.safetensors"][:500], None],
        "twin_tower.json": [b"{", b"{}", b'{"hidden": 7}', b'{"wide": 1}', b"[]"],
        "tokenizer.json": [b"{}", b"null"],
    }
    for name, contents in damages.items():
        for content in contents:
            (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
            with pytest.raises(ValueError, match="expected the files of a whole TwinTower"):
                TwinTower.from_pretrained(folder)
            (folder / name).write_bytes(whole[name])
    assert TwinTower.from_pretrained(folder)


def test_at_its_full_size_it_has_at_most_six_million_parameters_and_starts_from_the_encoder():
    backbone = pretrained.load()
    model = Twin().model(backbone, targets.pca)
    assert model.parameters_in_all <= 6_000_000
    rows = targets.pca(backbone.encoder.model.get_input_embeddings().weight.detach(), 128)
    assert model.embedding.weight[: len(rows)].equal(rows)


def test_an_exception_leaves_the_mode_as_it_was(model, monkeypatch):
    model.train()
    with pytest.raises(TypeError, match="texts: expected strings, got NoneType"):
        model.inference([None], LABELS)
    monkeypatch.setattr(model, "pieces", lambda text: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.inference(["Anna"], LABELS)
    assert model.training


@pytest.mark.parametrize(
    "claimed", [{"layers": 100_000}, {"hidden": 10**7}, {"buckets": 10**10}, {"embedding": 10**8}]
)
def test_a_folder_that_claims_to_be_huge_is_refused_before_it_is_made(model, tmp_path, claimed):
    model.save_pretrained(tmp_path / "twin")
    file = tmp_path / "twin" / "twin_tower.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | claimed))
    with pytest.raises(ValueError, match="expected the files of a whole TwinTower"):
        TwinTower.from_pretrained(tmp_path / "twin")
