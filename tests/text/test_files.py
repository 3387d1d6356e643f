import errno
import os
import subprocess

import pytest
import torch

from kdlib.lab import cache
from kdlib.text.files import replacing, saving, write_text


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 300 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_error_and_after_room_is_made_it_goes_on(small_disk, monkeypatch):
    monkeypatch.setenv("KDLIB_CACHE", str(small_disk))
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 200_000)
    weights = {"w": torch.ones(40_000)}
    with pytest.raises(OSError, match="the disk is full: expected room for 16") as full:
        cache.tensors("weights", "key", lambda: weights)
    assert full.value.errno == errno.ENOSPC and "weights/key.pt" in full.value.filename
    assert not list(small_disk.rglob("*.pt")) and not list(small_disk.rglob(".*aside*"))
    with pytest.raises(OSError, match=r"table\.csv"):
        write_text(small_disk / "figures" / "table.csv", "a,b\n" * 60_000)
    assert not (small_disk / "figures" / "table.csv").exists()
    filler.unlink()
    assert torch.equal(cache.tensors("weights", "key", lambda: weights)["w"], weights["w"])


def full(*arguments, **named):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_what_was_there(tmp_path):
    there = tmp_path / "a.txt"
    write_text(there, "before")
    told = "the disk is full: expected room for 5 bytes, got [0-9,]+"
    with pytest.raises(OSError, match=told), replacing(there, 5) as aside:
        aside.write_text("af")
        full()
    assert there.read_text() == "before" and list(tmp_path.iterdir()) == [there]


def test_a_model_saved_to_a_full_disk_is_absent(tmp_path):
    with pytest.raises(OSError, match="the disk is full"), saving(tmp_path / "model") as aside:
        (aside / "config.json").write_text("{}")
        raise RuntimeError("Error while serializing: I/O error: No space left (os error 28)")
    assert list(tmp_path.iterdir()) == []


def test_another_error_stays_what_it_was(tmp_path):
    with pytest.raises(KeyError), replacing(tmp_path / "a"):
        raise KeyError("a")
