"""Files that appear whole or not at all: written aside, then renamed. Models' folders, read."""

import contextlib
import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

ASIDE, OURS = ".saving.", ".kdlib-aside-"  # what the names of folders to write in hold
ROOT = Path(__file__).resolve().parents[2]  # the checkout: data, figures, notebooks


@contextlib.contextmanager
def replacing(path: Path, wanted: int | None = None) -> Iterator[Path]:
    """A path to write to; it becomes `path` when the block ends well and vanishes when not. One
    OSError that names it, the bytes `wanted` and those free, where the disk is full."""
    aside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}{OURS}"))
        yield aside / path.name
        made = aside / path.name
        if made.is_file():
            with made.open("rb") as written:  # on the disk before it has a name
                os.fsync(written.fileno())
        os.replace(made, path)
    except Exception as error:
        full = _full(error, path, wanted)
        if full is None:
            raise
        raise full from error
    finally:
        if aside:
            shutil.rmtree(aside, ignore_errors=True)


def _full(error: Exception, path: Path, wanted: int | None) -> OSError | None:
    """What to say where a disk, or a user's share of it, is full; None for another error."""
    known = (errno.ENOSPC, errno.EDQUOT)
    if getattr(error, "errno", None) not in known and "(os error 28)" not in str(error):
        return None
    there = next(folder for folder in path.parents if folder.exists())
    size = f"{wanted:,} bytes" if wanted else "more"
    told = f"the disk is full: expected room for {size}, got {shutil.disk_usage(there).free:,} "
    return OSError(errno.ENOSPC, f"{told}free; nothing was left half-written, make room", str(path))


@contextlib.contextmanager
def saving(folder: str | Path) -> Iterator[Path]:
    """A folder to write a model into: a new one appears whole or not at all, in an earlier one file
    after file is replaced, so that it stays the same folder and no file is ever half there.

    FileExistsError if `folder` is a file, or holds files that this model would not write: nobody's
    work is deleted.
    """
    target = Path(folder).expanduser().resolve()
    if not target.exists():
        for leftover in target.parent.glob(f".{target.name}{OURS}*"):  # of a save that was killed
            if time.time() - leftover.stat().st_mtime > 3600:
                shutil.rmtree(leftover, ignore_errors=True)
        with replacing(target) as aside:
            aside.mkdir()
            yield aside
        return
    if not target.is_dir():
        raise FileExistsError(f"{target}: expected a folder or nothing, got a file")
    for leftover in target.glob(f"{ASIDE}*"):  # of a save that was killed
        shutil.rmtree(leftover)
    aside = Path(tempfile.mkdtemp(dir=target, prefix=ASIDE))
    try:
        yield aside
        made = _files(aside)
        strange = sorted(str(f) for f in _files(target) - made if aside.name not in f.parts)
        if strange:
            raise FileExistsError(
                f"{target}: expected a new folder or an earlier save of this model, got {strange}"
            )
        for file in sorted(made):
            (target / file).parent.mkdir(exist_ok=True)
            os.replace(aside / file, target / file)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _files(folder: Path) -> set[Path]:
    return {f.relative_to(folder) for f in folder.rglob("*") if f.is_file()}


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    content = text.encode("utf8")
    with replacing(path, len(content)) as aside:
        aside.write_bytes(content)


# ---- a model's folder, read back ----

DAMAGED = (OSError, SafetensorError, RuntimeError, TypeError, ValueError, KeyError, AttributeError)


@contextlib.contextmanager
def whole(folder: Path, what: str) -> Iterator[None]:
    """One ValueError that names the folder and what it should hold, for whatever is wrong with its
    files."""
    try:
        yield
    except DAMAGED as error:
        reason = (str(error).splitlines() or [""])[0][:300]
        raise ValueError(
            f"{folder}: expected the files of a whole {what}, got {type(error).__name__}: {reason}"
        ) from error


def shapes_of(weights: Path) -> dict[str, tuple[int, ...]]:
    """The tensors of a safetensors file by name, from its header alone: what a model made of its
    folder may be as large as."""
    with safe_open(weights, framework="numpy") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def fits(there: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError, before anything of that size is made, unless a file's tensors are as wanted."""
    for name, shape in wanted.items():
        if there.get(name) != shape:
            raise ValueError(f"{name}: expected {shape}, got {there.get(name)} in the weights")
