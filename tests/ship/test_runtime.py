import json
import shutil
import subprocess
import sys
from itertools import chain, pairwise

import numpy as np
import onnx
import pytest
import torch
from conftest import SENTENCES, tagger
from transformers import DistilBertConfig, DistilBertModel
from typer.testing import CliRunner

from kdlib.__main__ import app
from kdlib.crf import LinearChainCRF, legal_iob2
from kdlib.models import Transformer
from kdlib.ship import runtime
from kdlib.ship.export import crf_of, export
from kdlib.students import encoders
from kdlib.text.tags import Sentence, iob2_labels
from kdlib.twin_tower import TwinTower

TEXTS = [" ".join(s.tokens) for s in SENTENCES[:4]]


def words_of(text):
    (words,) = runtime.calls.windows(text, 99)
    return [text[a:b] for a, b in words]


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_folder):
    """A BiLSTM of two layers with sure opinions, and the folder it was written to."""
    from kdlib.students import pretrained

    backbone, folder = pretrained.load(tiny_folder), tmp_path_factory.mktemp("ship") / "student"
    torch.manual_seed(1)  # not every random model has an opinion; nor may it be another test's
    model = tagger(backbone, encoder=encoders.lstm(backbone.encoder, 8, 6, 2)).eval()
    with torch.no_grad():
        model.output.weight *= 40  # a random model hardly prefers any label
        model.crf.transitions.uniform_(-2, 2)
    export(model, folder, {"PER": 0.2}, "# A card\n")
    return model, folder


def test_fp32_gives_what_torch_gives_alone_and_in_a_batch(made):
    model, folder = made
    student = runtime.load(folder, int8=False)
    words = [words_of(text) for text in TEXTS]
    together, lengths = student.emissions(words)
    for i, sentence in enumerate(SENTENCES[:4]):
        alone, _ = student.emissions(words[i : i + 1])
        np.testing.assert_allclose(together[i, : lengths[i]], alone[0], atol=1e-6)
        (expected,) = model.emissions(model.encode([sentence]))
        np.testing.assert_allclose(alone[0], expected, atol=2e-5)
    found = [
        [(e["text"], e["label"]) for e in own] for own in student.inference(TEXTS, threshold=0)
    ]
    by_torch = [
        [(" ".join(s.tokens[a:b]), kind) for a, b, kind in spans]
        for s, spans in zip(SENTENCES, model.predict(SENTENCES[:4]), strict=False)
    ]
    assert found == by_torch and any(found)


@pytest.mark.parametrize("kind", ["bert", "thin", "thin, factorised"])
def test_a_bert_gives_what_torch_gives_in_windows_of_its_own_too(tiny, tmp_path, kind):
    torch.manual_seed(0)
    embedding = 6 if "factorised" in kind else 0
    encoder = None if kind == "bert" else encoders.thin(tiny.encoder, 2, 8, 12, embedding)
    model = tagger(tiny, encoder=encoder).eval()
    export(model, tmp_path / "s", {})
    student = runtime.load(tmp_path / "s", int8=False)
    words = ("anna", "lives", "in", "paris") * 5  # more pieces than its 24 places
    texts = [*TEXTS, " ".join(words)]
    together, lengths = student.emissions([words_of(text) for text in texts])
    for i, sentence in enumerate([*SENTENCES[:4], Sentence(words)]):
        (expected,) = model.emissions(model.encode([sentence]))
        np.testing.assert_allclose(together[i, : lengths[i]], expected, atol=2e-5)


@pytest.fixture
def twin(tiny, tmp_path):
    """A twin tower with sure opinions, and the student of the folder it was written to."""
    torch.manual_seed(0)
    model = TwinTower(tiny.tokenizer, embedding=8, hidden=6, buckets=4).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 3
    export(model, tmp_path / "twin", {"PER": 0.3}, labels=["PER", "LOC"])
    return model, tmp_path / "twin"


def test_a_twin_tower_gives_what_torch_gives_for_any_labels(twin):
    model, folder = twin
    student = runtime.load(folder, int8=False)
    assert student.labels == ["LOC", "PER"] and student.thresholds == {"LOC": 0.5, "PER": 0.3}
    texts = [*TEXTS, "", "Anna 😀 東 in unknown-Paris", "x"]
    for labels in (["a city", "PER", "東"], ["PER"]):
        for threshold in (0.0, 0.5, 0.9):
            whole = model.inference(texts, labels, threshold)
            for size in (1, 3, 32):
                ours = student.inference(texts, labels, threshold, batch_size=size)
                assert [len(own) for own in ours] == [len(own) for own in whole]
                for a, b in zip(chain(*ours), chain(*whole), strict=True):
                    assert a == b | {"score": pytest.approx(b["score"], abs=1e-5)}
            assert threshold or any(ours)
    assert student.inference(texts, []) == [[]] * len(texts)
    near = runtime.load(folder).inference(texts, ["PER"], 0.0)
    assert [[e["text"] for e in own] for own in near] == [
        [e["text"] for e in own] for own in student.inference(texts, ["PER"], 0.0)
    ]
    by_default, asked = (student.inference(texts, ["PER"], least) for least in (None, 0.3))
    assert by_default == asked  # the label's own threshold


@pytest.mark.parametrize(
    "damage",
    [
        {"buckets": 0},
        {"buckets": 5},
        {"unknown_piece": "x"},
        {"model_type": "x"},
        {"thresholds": {"LOC": 0.5, "PER": 1.5}},
    ],
    ids=str,
)
def test_a_twin_tower_with_a_damaged_config_is_refused(twin, damage):
    _, folder = twin
    config = json.loads((folder / runtime.CONFIG).read_text())
    (folder / runtime.CONFIG).write_text(json.dumps(config | damage))
    with pytest.raises(ValueError, match="expected the files of a whole student"):
        runtime.load(folder)
    (folder / runtime.CONFIG).write_text(json.dumps(config | {"unknown_piece": None}))
    assert runtime.load(folder).predict_entities("Anna", ["PER"], 0.0)  # a byte-level tokenizer's


def test_int8_is_near_and_a_quarter_as_large(made):
    _, folder = made
    small, whole = (runtime.load(folder, int8=int8) for int8 in (True, False))
    ours, exact = (side.emissions([words_of(TEXTS[2])])[0] for side in (small, whole))
    assert 0 < abs(ours - exact).max() < 0.1 * abs(exact).max()
    graph = onnx.load(folder / "onnx" / "model_int8.onnx").graph
    weights = map(onnx.numpy_helper.to_array, graph.initializer)
    most = [abs(w.astype(int)).max() for w in weights if w.dtype == np.int8 and w.ndim > 1]
    assert most and 2 * 255 * max(most) < 2**15  # two products fit 16 bits on any CPU
    sizes = [(folder / "onnx" / f"model{end}.onnx").stat().st_size for end in ("_int8", "")]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spread", [3, 30])  # of a doubtful network, of one without any doubt
def test_its_crf_is_the_models(seed, spread):
    torch.manual_seed(seed)
    labels = iob2_labels(["A", "B"])
    crf = LinearChainCRF(len(labels), legal_iob2(labels)).double()
    for scores in crf.parameters():
        torch.nn.init.normal_(scores, std=2)
    holder = type("Holder", (), {"crf": crf})()
    ours = runtime.Crf(
        *(runtime._scores(v) for v in json.loads(json.dumps(crf_of(holder))).values())
    )
    lengths = np.array([1, 2, 9, 9])
    emissions = spread * torch.randn(4, 9, len(labels), dtype=torch.double)
    for rows in (range(4), [0], [2, 3]):
        rows = list(rows)
        own, words = emissions[rows][:, : lengths[rows].max()], lengths[rows]
        mask = torch.arange(own.shape[1]) < torch.tensor(words)[:, None]
        best, marginals = crf.viterbi(own, mask), crf.marginals(own, mask)[0].detach()
        assert ours.viterbi(own.numpy(), words) == [
            path[:n].tolist() for path, n in zip(best, words, strict=True)
        ]
        found = ours.marginals(own.numpy(), words)
        for i, n in enumerate(words):
            np.testing.assert_allclose(found[i, :n], marginals[i, :n], atol=1e-10)


def test_it_needs_neither_torch_nor_transformers(made):
    code = "import sys; from kdlib.ship import runtime; s = runtime.load(sys.argv[1]); "
    code += (
        "s.predict_entities('Anna'); print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(made[1])], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_any_text_gets_exact_slices_and_no_word_is_lost(made):
    student = runtime.load(made[1])
    strange = [
        "",
        " \n\t",
        "a\0b",
        "مرحبا باريس",
        "e\u0301te\u0301 in Paris",
        "🙂 Anna 🙂",
        "x" * 5000,
    ]
    long = "Anna lives in Paris. " * 4000
    for text in [*strange, long]:
        found = student.predict_entities(text, threshold=0)
        assert all(e["text"] == text[e["start"] : e["end"]] for e in found)
        assert all(a["end"] <= b["start"] for a, b in pairwise(found))
        words = [w for part in runtime.calls.windows(text, 256) for w in part]
        assert words == [m.span() for m in runtime.calls.WORD.finditer(text)]
    starts = [e["start"] for e in student.predict_entities(long, threshold=0)]
    assert starts and max(starts) > 0.99 * len(long)  # to the very end
    assert all(long[w[-1][0]] == "." for w in runtime.calls.windows(long, 256))


def test_calls_take_what_gliners_take_and_refuse_what_cannot_be_answered(made):
    student = runtime.load(made[1])
    assert student.labels == ["LOC", "PER"] and student.thresholds == {"LOC": 0.0, "PER": 0.2}
    everything = student.inference(TEXTS, threshold=0)
    assert student.inference(TEXTS, ["PER"], threshold=0) == [
        [e for e in own if e["label"] == "PER"] for own in everything
    ]
    assert student.inference([]) == [] and student.inference(TEXTS[0]) == student.inference(
        TEXTS[:1]
    )
    assert not any(student.inference(TEXTS, threshold=1.0))
    one = student.pipeline(TEXTS[0])
    assert all(set(e) == {"entity_group", "score", "word", "start", "end"} for e in one)
    assert [f for _, f in student.stream(iter(TEXTS), threshold=0)] == everything
    for wrong, error, message in (
        (lambda: student.inference(TEXTS, ["dog"]), ValueError, r"some of \['LOC', 'PER'\], got"),
        (lambda: student.predict_entities(["a"]), TypeError, "text: expected one string"),
        (lambda: student.inference([None]), TypeError, "texts: expected strings, got NoneType"),
        (lambda: student.inference(["\ud800"]), ValueError, "texts: expected whole characters"),
        (lambda: student.inference(["a"], threshold=2), ValueError, "threshold: expected"),
        (lambda: student.predict_entities("a", flat_ner=False), ValueError, "one label: expected"),
        (lambda: student.inference(["a"], multi_label=True), ValueError, "one label: expected"),
        (lambda: student.inference(["a"], None, 0.5, 8), ValueError, "got flat_ner=8"),
    ):
        with pytest.raises(error, match=message):
            wrong()


def test_a_folder_that_is_no_student_says_so(made, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a folder with a config.json"):
        runtime.load(tmp_path)
    shutil.copytree(made[1], tmp_path / "s")
    for content, got in (
        ("{", "expected JSON"),
        ("[]", "got 'list'"),
        ('{"format": "x"}', "got 'x'"),
    ):
        (tmp_path / "s" / "config.json").write_text(content)
        with pytest.raises(ValueError, match=got):
            runtime.load(tmp_path / "s")


def changed(name, value):
    return lambda config: config | {name: value}


@pytest.mark.parametrize(
    "change",
    [
        changed("most_pieces", 2),
        changed("most_pieces", "many"),
        changed("thresholds", {"PER": 0.5}),
        changed("thresholds", {"PER": 0.5, "LOC": -0.1}),
        changed("tags", ["O", "B-PER"]),
        changed("tags", ["O", "X"]),
        changed("unknown_piece", None),
        changed("special_pieces", [[99999], []]),
        changed("crf", {"start": [0.0], "transitions": [[0.0]], "end": [0.0]}),
        changed("crf", {"start": [None] * 5, "transitions": [[0.0] * 5] * 5, "end": [0.0] * 5}),
        lambda config: {"format": config["format"]},
    ],
)
def test_parts_that_do_not_fit_are_refused_when_it_is_loaded(made, tmp_path, change):
    shutil.copytree(made[1], tmp_path / "s")
    file = tmp_path / "s" / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match="s: expected the files of a whole student"):
        runtime.load(tmp_path / "s")


@pytest.mark.parametrize("name", ["onnx/model_int8.onnx", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"half", None])
@pytest.mark.parametrize("kind", ["made", "twin"])
def test_damaged_files_are_one_clear_error(request, tmp_path, kind, name, content):
    shutil.copytree(request.getfixturevalue(kind)[1], tmp_path / "s")
    file = tmp_path / "s" / name
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(ValueError, match="s: expected the files of a whole student"):
        runtime.load(tmp_path / "s")


@pytest.mark.parametrize("stops", [False, True])
def test_no_entity_is_split_where_a_window_ends(made, monkeypatch, stops):
    """Three-word names all over a text of 2,000 words, with sentence ends or without any."""
    student = runtime.load(made[1])

    def capitals(words, least):
        for own in words:
            runs = runtime.word_runs([int(w[0].isupper()) for w in own])
            yield [(start, end, "PER", 1.0) for start, end, _ in runs]

    monkeypatch.setattr(student, "_entities", capitals)
    for gap in range(1, 12):
        one = "Anna Maria Luisa " + "word " * gap + (". " if stops else "")
        text = one * (2000 // len(one.split()))
        found = student.predict_entities(text)
        assert [e["text"] for e in found] == ["Anna Maria Luisa"] * text.count("Anna")
        assert all(text[e["start"] : e["end"]] == e["text"] for e in found)
        sizes = {len(w.words) for w in runtime.windows(0, text, 64)}
        assert max(sizes) <= 64 and (max(sizes) == 64 or stops)


def test_windows_that_overlap_never_give_entities_that_do(made):
    """A student that finds what it likes, at its own thresholds and below."""
    student = runtime.load(made[1])
    text = "Anna in Paris is big old nobody " * 300
    for found in (student.predict_entities(text, threshold=0), student.predict_entities(text)):
        assert found and all(a["end"] <= b["start"] for a, b in pairwise(found))
    kept = runtime._in_order([{"start": 4, "end": 6}, {"start": 1, "end": 5}])
    assert list(kept) == [{"start": 1, "end": 5}]


def test_an_initial_ends_no_sentence():
    text = "word " * 120 + "J. R. R. Tolkien wrote. " + "word " * 100
    first, *_ = runtime.calls.windows(text, 130)
    assert text[first[-1][0] : first[-1][1]] == "." and text[: first[-1][1]].endswith("wrote.")


def test_export_replaces_an_earlier_one_and_refuses_what_it_cannot_write(made, tmp_path, tiny):
    model, folder = made
    shutil.copytree(folder, tmp_path / "s")
    export(model, tmp_path / "s", {}, "new")
    assert (tmp_path / "s" / "README.md").read_text() == "new"
    assert runtime.load(tmp_path / "s").thresholds == {"LOC": 0.0, "PER": 0.0}
    with pytest.raises(ValueError, match=r"thresholds: expected labels among"):
        export(model, tmp_path / "s", {"dog": 0.5})
    with pytest.raises(ValueError, match=r"thresholds: expected numbers from 0 to 1"):
        export(model, tmp_path / "s", {"PER": 1.5})
    with pytest.raises(TypeError, match="labels: expected a list of strings, got 'PER'"):
        export(TwinTower(tiny.tokenizer, embedding=4, hidden=2), tmp_path / "t", {}, labels="PER")
    distil = DistilBertModel(DistilBertConfig(vocab_size=70, dim=16, n_layers=1, n_heads=2))
    with pytest.raises(ValueError, match="expected a BiLSTM .*, got Transformer"):
        export(tagger(tiny, encoder=Transformer(distil)), tmp_path / "t", {})
    assert not (tmp_path / "t").exists()


def test_predict_streams_lines_into_json_lines(made):
    done = CliRunner().invoke(app, ["predict", str(made[1])], input="\n".join(TEXTS) + "\n")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.exit_code == 0 and [row["text"] for row in rows] == TEXTS
    assert [row["entities"] for row in rows] == runtime.load(made[1]).inference(TEXTS)
    assert CliRunner().invoke(app, ["predict", "nowhere"]).exit_code == 2
