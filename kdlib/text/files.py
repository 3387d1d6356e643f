"""Files that appear whole or not at all: written aside, then renamed."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the checkout: data, figures, notebooks


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; it becomes `path` when the block ends well and vanishes when not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield aside / path.name
        made = aside / path.name
        if not (made.is_dir() and path.is_dir()):
            os.replace(made, path)
            return
        os.replace(path, aside / "old")  # a folder cannot be renamed over another
        try:
            os.replace(made, path)
        except BaseException:
            os.replace(aside / "old", path)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def saving(folder: str | Path) -> Iterator[Path]:
    """A folder to write a model into, which takes the place of an earlier one whole or not at all.

    FileExistsError if `folder` is a file, or holds files that this model would not write: nobody's
    work is deleted.
    """
    target = Path(folder).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target}: expected a folder or nothing, got a file")
    with replacing(target) as aside:
        aside.mkdir()
        yield aside
        there = {f.name for f in target.iterdir()} if target.exists() else set()
        strange = sorted(there - {f.name for f in aside.iterdir()})
        if strange:
            raise FileExistsError(
                f"{target}: expected a new folder or an earlier save of this model, got {strange}"
            )


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf8", newline="\n")
