import json
import sys
import tempfile
import types
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.text import corpora, readers
from kdlib.text.readers import DataError, read, tidy_passages
from kdlib.text.tags import WORD, Sentence, Span

SENTENCE = Sentence(("New", "York", "is", "big"), (Span(0, 2, "LOC"),))


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    "content",
    [
        "New B-LOC\nYork I-LOC\nis O\nbig O\n",
        "New\tB-LOC\nYork\tI-LOC\nis\tO\nbig\tO",
        "New NNP x I-LOC\nYork NNP y I-LOC\nis V z O\nbig A z O\n\n",
        "New B-LOC\r\nYork E-LOC\r\nis O\r\nbig O\r\n\r\n",
        "\ufeff-DOCSTART- O\n\nNew B-LOC\nYork M-LOC\nis O\nbig O\n\t\n",
    ],
    ids=[
        "spaces",
        "tabs, no last newline",
        "IOB1 in four columns",
        "IOBES with CRLF",
        "BMES with BOM and DOCSTART",
    ],
)
def test_conll_in_all_its_forms(tmp_path, content):
    assert read(write(tmp_path / "x.conll", content)) == [SENTENCE]


def test_only_newlines_end_a_line_and_only_blanks_part_columns(tmp_path):
    odd = "a\u2028b\tO\nc\x85d\tB-X\ne f\tO\n\u3000\tO\n"
    found = read(write(tmp_path / "x.tsv", odd))
    assert found[0].tokens == ("a\u2028b", "c\x85d", "e f", "\u3000")


def test_json_forms(tmp_path):
    lines = (
        json.dumps({"tokens": SENTENCE.tokens, "ner_tags": SENTENCE.tags})
        + "\n\n"
        + json.dumps({"tokens": ["text"]})
    )
    assert read(write(tmp_path / "a.jsonl", lines)) == [SENTENCE, Sentence(("text",))]
    gliner = [{"tokenized_text": list(SENTENCE.tokens), "ner": [[0, 1, "LOC"]], "negative": []}]
    assert read(write(tmp_path / "b.json", json.dumps(gliner))) == [SENTENCE]
    spans = [{"text": "New York is big", "entities": [[0, 8, "LOC"]]}, {"text": "no labels"}]
    assert read(write(tmp_path / "c.json", json.dumps(spans))) == [
        SENTENCE,
        Sentence(("no", "labels")),
    ]


def test_nested_spans_are_kept_but_have_no_tags(tmp_path):
    nested = [{"tokenized_text": ["a", "b"], "ner": [[0, 1, "X"], [1, 1, "Y"]]}]
    sentence = read(write(tmp_path / "a.json", json.dumps(nested)))[0]
    assert sentence.spans == (Span(0, 2, "X"), Span(1, 2, "Y"))
    with pytest.raises(ValueError, match="overlap"):
        _ = sentence.tags


BAD = {
    "missing column": ("x.conll", "a O\nb\n", r"x.conll:2: expected 2 columns.*got 'b'"),
    "one column": ("x.conll", "a\nb\n", r"x.conll:1: expected 2 columns"),
    "another number of columns": ("x.conll", "a X O\nb O\n", r"x.conll:2: expected 3 columns"),
    "no tag": ("x.conll", "a O\nb X-PER\n", r"x.conll:2: expected a tag.*got 'X-PER'"),
    "a word of one control character": ("x.tsv", "\x1c\tO\n", r"x.tsv:1: expected a word"),
    "nested very deep": (
        "x.jsonl",
        '{"tokens": ' + "[" * 991 + "]" * 991 + "}",
        r"x.jsonl:1: expected JSON of a sentence|a list of words",
    ),
    "no word": ("x.tsv", "a\tO\n\tO\n", r"x.tsv:2: expected a word"),
    "empty": ("x.conll", "", r"x.conll: expected at least one sentence, got 'none'"),
    "only headers": ("x.conll", "-DOCSTART- O\n\n", r"at least one sentence"),
    "not UTF-8": ("x.conll", b"a O\n\xff\xfe O\n", r"x.conll:2: expected UTF-8"),
    "not JSON": ("x.jsonl", '{"tokens": ["a"]}\n{"tokens": \n', r"x.jsonl:2: expected JSON"),
    "another object": (
        "x.jsonl",
        '{"words": ["a"]}',
        r"x.jsonl:1: expected an object with one of tokens",
    ),
    "too few tags": (
        "x.jsonl",
        '{"tokens": ["a", "b"], "ner_tags": ["O"]}',
        r"x.jsonl:1: expected 2 ner_tags, one a word, got '1'",
    ),
    "tags as numbers": (
        "x.jsonl",
        '{"tokens": ["a"], "ner_tags": [0]}',
        r"expected ner_tags as a list of tags in letters",
    ),
    "empty word": (
        "x.jsonl",
        '{"tokens": ["a", " "]}',
        r"expected a list of words that are not empty",
    ),
    "words span outside": (
        "x.json",
        '[{"tokenized_text": ["a"], "ner": [[0, 1, "X"]]}]',
        r"x.json, sentence 1: expected a span within the 1 words",
    ),
    "span backwards": (
        "x.json",
        '[{"tokenized_text": ["a", "b"], "ner": [[1, 0, "X"]]}]',
        r"expected a span within",
    ),
    "character span outside": (
        "x.json",
        '[{"text": "ab", "entities": [[0, 3, "X"]]}]',
        r"expected a span within the 2 characters",
    ),
    "span within a word": (
        "x.json",
        '[{"text": "abc d", "entities": [[1, 3, "X"]]}]',
        r"starts and ends with a word, got",
    ),
    "odd span": (
        "x.json",
        '[{"text": "abc", "entities": [[true, 3, "X"]]}]',
        r"expected entities as",
    ),
    "labels of another shape": (
        "x.jsonl",
        '{"tokens": ["a"], "ner": [[0, 0, "X"]]}',
        r"x.jsonl:1: expected the labels of tokens under 'ner_tags', got 'ner'",
    ),
    "labels under a name nobody knows": (
        "x.json",
        '[{"text": "a", "spans": []}]',
        r"the labels of text under 'entities', got 'spans'",
    ),
    "two shapes at once": (
        "x.jsonl",
        '{"tokens": ["a"], "text": "a"}',
        r"with one of tokens, tokenized_text and text",
    ),
    "half a character": (
        "x.jsonl",
        '{"tokens": ["\\ud800"]}',
        r"x.jsonl:1: expected words of whole Unicode characters",
    ),
    "nested without end": ("x.jsonl", "[" * 100_000, r"x.jsonl:1: expected JSON"),
    "a tag with blanks": (
        "x.jsonl",
        '{"tokens": ["a"], "ner_tags": ["B-X "]}',
        r"expected a tag such as .*got",
    ),
    "old Macintosh lines": (
        "x.conll",
        "a O\rb O\r",
        r"x.conll:1: expected lines that end in a newline",
    ),
    "not a list": ("x.json", '{"text": "abc"}', r"expected a JSON list"),
    "an unknown type": (
        "x.conll",
        "a O\n\nb O\nc B-XYZ\n",
        r"x.conll:4: expected an entity type among \['LOC'\], got 'XYZ'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_get_one_error_with_place_expected_and_got(tmp_path, case):
    name, content, message = BAD[case]
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / name, content), types=["LOC"] if case == "an unknown type" else None)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="expected a readable file"):
        read(tmp_path / "nothing.conll")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["x.conll", "x.jsonl", "x.json"]))
def test_whatever_a_file_holds_it_is_read_or_refused_with_its_name(content, name):
    with tempfile.TemporaryDirectory() as folder:
        file = write(Path(folder) / name, content)
        try:
            found = read(file)
        except DataError as error:
            assert name in str(error)
        else:
            assert found and all(s.tokens and all(s.tokens) for s in found)


def test_overlapping_entities_of_ones_own_folder_are_told_with_file_and_sentence(tmp_path):
    good = [{"tokenized_text": ["a", "b", "c"], "ner": [[0, 1, "X"], [0, 1, "X"]]}]
    bad = [*good, {"tokenized_text": ["a", "b", "c"], "ner": [[0, 1, "X"], [1, 2, "Y"]]}]
    for name in ("train", "dev"):
        (tmp_path / f"{name}.json").write_text(json.dumps(good))
    (tmp_path / "test.json").write_text(json.dumps(bad))
    with pytest.raises(DataError, match=r"test.json, sentence 2: expected spans that do not over"):
        corpora.load(str(tmp_path))
    (tmp_path / "test.json").write_text(json.dumps(good))
    assert corpora.load(str(tmp_path)).test[0].spans == (Span(0, 2, "X"),)  # once


def test_columns_may_stand_in_any_order(tmp_path):
    file = write(tmp_path / "x.conll", "B-LOC 1 New\nI-LOC 2 York\nO 3 is\nO 4 big\n")
    assert read(file, columns=["tag", "number", "word"]) == [SENTENCE]
    with pytest.raises(DataError, match="x.conll:1: expected 2 columns"):
        read(file, columns=["tag", "word"])
    with pytest.raises(ValueError, match="columns: expected one word and one tag among them"):
        read(file, columns=["tag", "number"])


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("x.conll", "a O\nb\n\nNew B-LOC\nYork I-LOC\nis O\nbig O\n\nc Q-X\nd O\n", (2, 9)),
        (
            "x.jsonl",
            '{"tokens": []}\n'
            '{"tokens": ["New", "York", "is", "big"], "ner_tags": ["B-LOC", "I-LOC", "O", "O"]}\n{',
            (1, 3),
        ),
        (
            "x.json",
            '[{"tokenized_text": ["New", "York", "is", "big"], "ner": [[0, 1, "LOC"]]}, {"a": 1}]',
            ("sentence 2",),
        ),
    ],
)
def test_bad_sentences_may_be_left_out_and_named(tmp_path, name, content, where):
    told = []
    assert read(write(tmp_path / name, content), skip=told.append) == [SENTENCE]
    assert len(told) == len(where)
    assert all(str(at) in str(error) for at, error in zip(where, told, strict=True))


def test_written_sentences_are_read_back(tmp_path):
    readers.write_json_lines(tmp_path / "x.jsonl", [SENTENCE, Sentence(("text",))])
    assert read(tmp_path / "x.jsonl") == [SENTENCE, Sentence(("text",))]
    with pytest.raises(ValueError, match="words that are not empty"):
        readers.write_json_lines(tmp_path / "x.jsonl", [Sentence(("a", ""))])


def named(folder, name, files):
    (folder / name).mkdir(parents=True)
    for file, content in files.items():
        write(folder / name / file, content)


def test_named_sets_with_their_oddities(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_DATA", str(tmp_path))
    wikiann = dict.fromkeys(
        ("train", "dev", "test"), "en:New\tB-LOC\nen:York\tI-LOC\nen:is\tO\nen:big\tO\n"
    )
    named(tmp_path, "wikiann_en", wikiann)
    assert corpora.load("wikiann_en").test == [SENTENCE]
    weibo = {
        f"weiboNER_2nd_conll.{s}": f"\u53e30\tO\n\u81541\tI-PER.NOM\n310\tO\n10\tO\n{more}"
        for s, more in (("train", ""), ("dev", "x0\tO\n"), ("test", "y0\tO\n"))
    }
    named(tmp_path, "weibo", weibo)
    assert corpora.load("weibo").train == [
        Sentence(("\u53e3", "\u8154", "3", "1"), (Span(1, 2, "PER.NOM"),))
    ]
    chunks = "".join(f"w{i} X B-NP\n\n" for i in range(20))
    others = chunks.replace("w", "v")
    named(tmp_path, "conll2000", {"train.txt": chunks, "test.txt": others})
    loaded = corpora.load("conll2000")
    assert (len(loaded.train), len(loaded.dev), len(loaded.test)) == (
        18,
        2,
        20,
    ) and loaded.types == ["NP"]
    assert {s.tokens for s in loaded.train}.isdisjoint(s.tokens for s in loaded.dev)


def test_training_sentences_that_stand_in_dev_or_test_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_DATA", str(tmp_path))
    head = "-DOCSTART- -X- -X- O\n\n"
    train, dev = "a x x O\n\nb x x O\n\na x x O\n\nc x x O\n", "c x x O\n\n"
    test = f"{head}a x x O\n\nd x x O\n\n{head}e x x O\n\n"
    named(tmp_path, "conll2003", {"train.txt": head + train, "valid.txt": dev, "test.txt": test})
    loaded = corpora.load("conll2003")
    assert ([s.tokens for s in loaded.train], loaded.repeated) == ([("b",)], 3)
    assert loaded.documents == (2, 1)
    assert corpora.shuffled(loaded, 1).documents == (2, 1)
    assert corpora.shuffled(loaded, 1, test=2).documents == ()  # not all of them


def test_a_folder_of_ones_own(tmp_path):
    named(
        tmp_path,
        "mine",
        {
            "train.conll": "a B-X\n",
            "dev.conll": "b B-X\n",
            "test.jsonl": '{"tokens": ["c"], "ner_tags": ["B-Y"]}',
        },
    )
    loaded = corpora.load(str(tmp_path / "mine"))
    assert loaded.name == "mine" and loaded.types == ["X", "Y"] and loaded.dev[0].tokens == ("b",)
    (tmp_path / "mine" / "test.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="expected one file named test, got none"):
        corpora.load(str(tmp_path / "mine"))
    (tmp_path / "mine" / "dev.conll").rename(tmp_path / "mine" / "valid.txt")
    (tmp_path / "mine" / "test.conll").write_text("c B-Y\n")
    assert corpora.load(str(tmp_path / "mine")).dev[0].tokens == ("b",)
    (tmp_path / "mine" / "test.bak").write_text("c B-Y\n")
    with pytest.raises(
        FileNotFoundError, match=r"one file named test, got \['test.bak', 'test.conll'\]"
    ):
        corpora.load(str(tmp_path / "mine"))


def test_a_set_that_nobody_has_names_what_would_work(monkeypatch):
    monkeypatch.delenv("KDLIB_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FileNotFoundError, match=r"KDLIB_DATA/conll2003.*pip install datasets"):
        corpora.load("conll2003")
    with pytest.raises(FileNotFoundError, match=r"no data set 'conl': expected one of .*'demo'"):
        corpora.load("conl")


def test_the_hub_path_reads_features(monkeypatch):
    """The shape `datasets` gives; the real hub is for machines that reach it."""
    monkeypatch.delenv("KDLIB_DATA", raising=False)

    class Part(list):
        features = {
            "ner_tags": types.SimpleNamespace(
                feature=types.SimpleNamespace(names=["O", "B-LOC", "I-LOC"])
            )
        }

    part = Part(
        [
            {"tokens": list(SENTENCE.tokens), "ner_tags": [1, 2, 0, 0]},
            {"tokens": [], "ner_tags": []},
        ]
    )
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return {"train": part, "validation": part, "test": part}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert corpora.load("conll2003").test == [SENTENCE]
    assert asked == [(("lhoestq/conll2003", None), {"revision": None})]

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=unreachable))
    with pytest.raises(FileNotFoundError, match="no route.*KDLIB_DATA/wnut17"):
        corpora.load("wnut17")


PASSAGE = {"tokenized_text": ["Flu", "is", "a", "disease", "."], "ner": [[0, 0, "disease"]]}


def open_corpus(folder, extra=()):
    folder.mkdir(parents=True)
    numbered = [
        PASSAGE | {"tokenized_text": [*PASSAGE["tokenized_text"], str(i)]} for i in range(1100)
    ]
    (folder / "b.json").write_text(json.dumps([*numbered, *extra]), encoding="utf8")
    (folder / "a.json").write_text(json.dumps(numbered[:3]), encoding="utf8")


@pytest.mark.parametrize(
    "name, where", [("gliner", "gliner/medical"), ("pile-mistral", "pile-mistral")]
)
def test_a_corpus_with_open_types_is_cleaned_and_cut_in_three(tmp_path, monkeypatch, name, where):
    monkeypatch.setenv("KDLIB_DATA", str(tmp_path))
    open_corpus(tmp_path / where)
    corpus = corpora.load(name)
    assert [len(part) for part in (corpus.train, corpus.dev, corpus.test)] == [
        500,
        200,
        400,
    ] and corpus.types == ["disease"]
    assert (
        len(set(s.tokens for part in (corpus.train, corpus.dev, corpus.test) for s in part)) == 1100
    )


def test_an_open_corpus_that_is_not_there_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_DATA", str(tmp_path))
    with pytest.raises(
        FileNotFoundError,
        match=r"gliner is not on this machine: put its JSON files under "
        r"\$KDLIB_DATA/gliner/medical",
    ):
        corpora.load("gliner")

    def no_hub(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(corpora.huggingface_hub, "snapshot_download", no_hub)
    with pytest.raises(FileNotFoundError, match="the hub gave no urchade/pile-mistral"):
        corpora.load("pile-mistral")
    open_corpus(tmp_path / "hub")
    monkeypatch.setattr(
        corpora.huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path / "hub")
    )
    assert len(corpora.load("pile-mistral").test) == 400


def test_passages_are_tidied():
    long = Sentence(tuple(["w"] * 6 + ["."] + ["v"] * 6), (Span(1, 2, "x"), Span(8, 9, "x")))
    overlap = Sentence(
        tuple("abcdef"),
        (
            Span(0, 1, "x"),
            Span(0, 3, "y"),
            Span(2, 4, "x"),
            Span(5, 6, "y"),
            Span(5, 6, "x"),
            Span(5, 6, "x"),
        ),
    )
    found = tidy_passages([long, overlap, overlap], 10)
    assert found == [
        Sentence(long.tokens[:7], (Span(1, 2, "x"),)),
        Sentence(overlap.tokens, (Span(0, 3, "y"), Span(5, 6, "x"))),
    ]
    assert tidy_passages([Sentence(("w",) * 9, ())], 4) == [Sentence(("w",) * 4, ())]


def test_words_of_any_script_stay_whole_with_their_marks():
    text = "Jose\u0301 e-mailed हिन्दी 👩\u200d👩\u200d👧, 東京!\x1f"
    assert WORD.findall(text) == [
        "Jose\u0301",
        "e-mailed",
        "हिन्दी",
        "👩\u200d👩\u200d👧",
        ",",
        "東京",
        "!",
    ]


def test_words_of_named_corpora_stay_out_of_figures():
    assert (
        corpora.printable("conll2003", ("New", "York"))
        == corpora.printable("gliner", ("New", "York"))
        == ["1", "2"]
    )
    assert (
        corpora.printable("demo", ("New", "York"))
        == corpora.printable("my/folder", ("New", "York"))
        == ["New", "York"]
    )
