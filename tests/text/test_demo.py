import filecmp
import random
from collections import Counter

import pytest

from kdlib.lab import baselines, scores
from kdlib.text import corpora, demo
from kdlib.text.readers import write_json_lines
from kdlib.text.tags import to_iob2


@pytest.fixture(scope="module")
def parts():
    return demo.generate()


def test_the_committed_bytes_are_those_of_the_generator(parts, tmp_path):
    for split, sentences in parts.items():
        write_json_lines(tmp_path / f"{split}.jsonl", sentences)
        assert filecmp.cmp(
            tmp_path / f"{split}.jsonl", demo.FOLDER / f"{split}.jsonl", shallow=False
        ), split
    assert sum(f.stat().st_size for f in demo.FOLDER.iterdir()) < 2e6
    assert demo.generate(seed=1)["test"] != parts["test"]


def test_no_sentence_repeats_and_surfaces_vary(parts):
    texts = [" ".join(s.tokens).lower() for sentences in parts.values() for s in sentences]
    assert len(set(texts)) == len(texts) == sum(demo.SIZES.values())
    skeletons = Counter(
        " ".join(t if t[0] == "O" else "X" for t in s.tags) + s.tokens[0] for s in parts["train"]
    )
    assert len(skeletons) > 0.5 * len(parts["train"])


def test_further_sentences_follow_the_stored_ones_and_are_new():
    few, more = demo.generate(further=30), demo.generate(further=300)
    train = corpora.load("demo-fine").train
    assert few["train"][:-30] == train and more["train"][: len(few["train"])] == few["train"]
    assert more["test"] == few["test"] and few["train"][-30:] == more["train"][-300:-270]
    every = [" ".join(s.tokens).lower() for sentences in more.values() for s in sentences]
    assert len(set(every)) == len(every)


def test_the_large_corpus_is_the_stored_one_and_more(monkeypatch):
    monkeypatch.setattr(demo, "FURTHER", 30)
    small, large = corpora.load("demo"), corpora.load("demo-large")
    assert large.train[:-30] == small.train and large.types == small.types
    assert (large.dev, large.test) == (small.dev, small.test)


def test_two_views_of_one_text():
    coarse, fine = corpora.load("demo"), corpora.load("demo-fine")
    assert coarse.types == ["ANI", "LOC", "ORG", "PER", "PLT"] and len(fine.types) >= 25
    for a, b in zip(coarse.test, fine.test, strict=True):
        assert a.tokens == b.tokens and {s[:2] for s in a.spans} <= {s[:2] for s in b.spans}
        assert to_iob2(a.spans, len(a.tokens))


def surfaces(sentences):
    return [(" ".join(s.tokens[a:b]).lower(), kind) for s in sentences for a, b, kind in s.spans]


def test_names_are_ambiguous_and_half_of_the_test_names_are_new(parts):
    kinds = {}
    for name, kind in surfaces(parts["test"]):
        kinds.setdefault(name, set()).add(demo.TO_COARSE.get(kind, "other"))
    every = [found for sentences in parts.values() for found in surfaces(sentences)]
    for name in ("jordan", "amazon", "jaguar", "rose", "turkey"):
        assert len({k for n, k in every if n == name}) > 1, name
    mentions = [name for name, _ in surfaces(parts["test"])]
    assert sum(len(kinds[n]) > 1 for n in mentions) > 0.15 * len(mentions)
    known = {name for name, _ in surfaces(parts["train"])}
    assert 0.4 < sum(n not in known for n in mentions) / len(mentions) < 0.75


def test_label_noise_has_the_rate_it_claims(parts):
    rng, wrong, missed, total = random.Random(0), 0, 0, 0
    for sentence in parts["test"]:
        spoilt = {s[:2]: s.type for s in demo.spoil(sentence, rng).spans}
        for span in sentence.spans:
            total += 1
            missed += span[:2] not in spoilt
            wrong += spoilt.get(span[:2], span.type) != span.type
    assert (
        abs(wrong / total - demo.WRONG_TYPE) < 0.015 and abs(missed / total - demo.MISSED) < 0.015
    )


def test_a_gazetteer_does_not_do_well():
    corpus = corpora.load("demo")
    f1 = scores.scores(corpus.test, baselines.Gazetteer(corpus.train).predict(corpus.test))["f1"]
    assert 20 < f1 < 60
    table = baselines.baselines(corpus).set_index("baseline")["f1"]
    assert (
        table.iloc[0] == 0
        and table["gazetteer of train"] == pytest.approx(f1, abs=0.01)
        and table.iloc[2] < 95
    )
    assert (
        scores.scores(corpus.train, baselines.Gazetteer(corpus.train).predict(corpus.train))["f1"]
        > f1
    )


def test_some_text_is_lower_cased_and_capitals_are_no_sign(parts):
    sentences = parts["test"]
    lower = sum(" ".join(s.tokens) == " ".join(s.tokens).lower() for s in sentences)
    assert 0.05 < lower / len(sentences) < 0.12
    inside = lambda s, i: any(a <= i < b for a, b, _ in s.spans)  # noqa: E731
    distractors = sum(
        w[0].isupper() and not inside(s, i) for s in sentences for i, w in enumerate(s.tokens) if i
    )
    assert distractors > 300
