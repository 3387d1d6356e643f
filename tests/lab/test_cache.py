import multiprocessing
import subprocess
import sys

import pytest
import torch
from conftest import bert

from kdlib.crf import LinearChainCRF, legal_iob2
from kdlib.lab import cache
from kdlib.lab.train import Settings
from kdlib.text.files import ROOT, replacing, write_text


def test_digests_tell_contents_apart():
    plain = [None, 0, 0.0, False, "0", "", ("a", "b"), ("ab",), Settings(), Settings(seed=1)]
    nested = [[], [[]], [0], [0, 0], {}, {"a": 1}, {"a": 2}, {"b": 1}, [("a", 1)]]
    nested += [[[0], 0], [[0, 0]], [[0], [0]], [[False]], [["0"]], [[None, (0,)]], ["\ud800"]]
    tensors = [
        torch.zeros(2),
        torch.zeros(2, 1),
        torch.zeros(2).double(),
        torch.zeros(0),
        torch.tensor([0.0, -0.0]),
    ]
    values = [*plain, *nested, *tensors]
    digests = [cache.digest(v) for v in values]
    assert len(set(digests)) == len(values)
    assert cache.digest({"a": 1, "b": [2]}) == cache.digest({"b": [2], "a": 1})
    with pytest.raises(TypeError, match="digest: expected plain values"):
        cache.digest(object())


def test_modules_are_their_weights():
    torch.manual_seed(0)
    layer = torch.nn.Linear(2, 2)
    before = cache.digest(layer)
    assert cache.digest(layer) == before
    with torch.no_grad():
        layer.bias[0] += 1e-6
    assert cache.digest(layer) != before


def test_modules_are_their_shape_too():
    def same_weights(module):
        for p in module.parameters():
            torch.nn.init.zeros_(p)
        return cache.digest(module)

    assert same_weights(torch.nn.Dropout(0.1)) != same_weights(torch.nn.Dropout(0.9))
    assert same_weights(bert(heads=2)) != same_weights(bert(heads=4))
    assert same_weights(bert(heads=2)) == same_weights(bert(heads=2))
    assert same_weights(LinearChainCRF(3)) != same_weights(
        LinearChainCRF(3, legal_iob2(["O", "B-X", "I-X"]))
    )


def test_an_entry_is_made_once_and_a_failed_one_leaves_nothing(tmp_path):
    def broken():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        cache.tensors("x", "k", broken)
    with pytest.raises(RuntimeError):
        cache.record("x", "k", broken)
    assert [p for p in (cache.folder() / "x").iterdir() if p.suffix != ".lock"] == []
    calls = []
    for _ in range(2):
        assert cache.record("x", "k", lambda: calls.append(1) or {"a": 1.5}) == {"a": 1.5}
    assert len(calls) == 1


def flipped(content):
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


@pytest.mark.parametrize("damage", [lambda c: b"", lambda c: c[:40], lambda c: b"x" * 99, flipped])
@pytest.mark.parametrize("kind", ["record", "tensors"])
def test_a_damaged_entry_is_set_aside_and_made_again(damage, kind):
    wanted = {"a": 1.5} if kind == "record" else {"a": torch.arange(9)}
    store = getattr(cache, kind)
    store("x", "k", lambda: wanted)
    (file,) = (f for f in (cache.folder() / "x").iterdir() if f.suffix != ".lock")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(UserWarning, match=f"{file.name}: damaged, set aside and made again"):
        again = store("x", "k", lambda: wanted)
    assert str(again) == str(wanted) and file.with_name(f"{file.name}.damaged").exists()
    assert str(store("x", "k", lambda: pytest.fail("made twice"))) == str(wanted)


def test_weights_that_are_not_there_or_damaged_are_an_error_not_a_guess():
    with pytest.raises(FileNotFoundError, match="expected an entry of the cache"):
        cache.load("x", "k")
    cache.tensors("x", "k", lambda: {"a": torch.zeros(3)})
    cache.path("x", "k.pt").write_bytes(b"half")
    with pytest.warns(UserWarning), pytest.raises(FileNotFoundError, match="none that is whole"):
        cache.load("x", "k")


def test_whole_entries_need_no_lock(monkeypatch):
    """So a cache that one may read and not write to serves."""
    cache.record("x", "k", lambda: {"a": 1})
    monkeypatch.setattr(cache, "locked", lambda path: pytest.fail("locked"))
    assert cache.record("x", "k", lambda: pytest.fail("made")) == {"a": 1}


def test_keys_hold_the_code_that_makes_numbers_and_not_its_comments(tmp_path):
    file = tmp_path / "losses.py"
    digests = []
    for text in (
        'def f(x):\n    """Twice."""\n    return 2 * x\n',
        'def f(x):\n    """Two times x."""\n    return 2 * x  # why\n',
        "def f(x):\n    return 3 * x\n",
    ):
        file.write_text(text)
        digests.append(cache.code(tmp_path, ["*.py"]))
    assert digests[0] == digests[1] != digests[2]
    assert cache.code(ROOT / "kdlib", cache.NUMBERS) == cache.SOURCES


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path):
    target = tmp_path / "f.txt"
    write_text(target, "old")
    with pytest.raises(ZeroDivisionError), replacing(target) as aside:
        aside.write_text("half")
        raise ZeroDivisionError
    assert target.read_text() == "old" and [
        p.name for p in tmp_path.iterdir() if p.name != "cache"
    ] == ["f.txt"]


MAKE = """
import pathlib, sys, time, torch
from kdlib.lab import cache
from kdlib.crf import LinearChainCRF, legal_iob2
def make():
    with open(sys.argv[1], "a") as log: log.write("made\\n")
    time.sleep(0.5)
    return {"t": torch.arange(5)}
assert cache.tensors("shared", "k", make)["t"].tolist() == [0, 1, 2, 3, 4]
"""


def test_two_processes_make_one_entry(tmp_path):
    log = tmp_path / "log"
    started = [subprocess.Popen([sys.executable, "-c", MAKE, str(log)]) for _ in range(2)]
    assert [p.wait(60) for p in started] == [0, 0]
    assert log.read_text() == "made\n"


def _killed_while_writing(target):
    with replacing(target) as aside:
        aside.write_text("half")
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_killed_while_writing_leaves_no_half_file(tmp_path):
    target = tmp_path / "f.json"
    process = multiprocessing.get_context("fork").Process(
        target=_killed_while_writing, args=(target,)
    )
    process.start()
    process.join(30)
    assert process.exitcode == -9 and not target.exists()


def test_what_was_never_stored_is_not_read_as_empty():
    with pytest.raises(FileNotFoundError):
        cache.load("weights", "nothing")
    assert not cache.path("weights", "nothing.pt").exists()


def test_the_version_is_part_of_every_key(monkeypatch):
    before = cache.digest("x")
    monkeypatch.setattr(cache, "MADE_BY", (cache.VERSION + 1, *cache.MADE_BY[1:]))
    assert cache.digest("x") != before
