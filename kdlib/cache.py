"""A cache keyed by content: the same inputs give the same key, anything else another, so nothing stale is ever read.

Files appear whole or not at all (written aside, then renamed), and two processes never make the same entry at once (a lock).
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import platformdirs
import torch
from filelock import FileLock


def folder() -> Path:
    """`$KDLIB_CACHE`, or `kdlib` in the user's cache directory."""
    return Path(os.environ.get("KDLIB_CACHE") or platformdirs.user_cache_dir("kdlib")).expanduser().absolute()


def path(kind: str, name: str) -> Path:
    """Where an entry lies: `kind` is a folder of the cache."""
    return folder() / kind / name


def digest(*parts: Any) -> str:
    """SHA-256 over values, nested containers, dataclasses, tensors, and modules with their weights and shape.

    TypeError for anything whose content it cannot see: a silent guess would be a stale entry some day.
    """
    sha = hashlib.sha256()
    for part in parts:
        _feed(sha, part)
    return sha.hexdigest()[:32]


def _feed(sha: "hashlib._Hash", part: Any) -> None:
    if part is None or isinstance(part, (str, int, float, bool)):
        sha.update(f"{type(part).__name__}:{part!r};".encode())
    elif isinstance(part, torch.Tensor):
        part = part.detach().cpu().contiguous()
        sha.update(f"tensor:{part.dtype}{list(part.shape)}".encode())
        sha.update(part.view(-1).view(torch.uint8).numpy().tobytes() if part.numel() else b"")
    elif isinstance(part, torch.nn.Module):
        configs = [m.config.to_dict() for m in part.modules() if hasattr(getattr(m, "config", None), "to_dict")]
        origin = ("_name_or_path", "transformers_version")  # where a model came from, not what it is
        shapes = [{k: str(v) for k, v in config.items() if k not in origin} for config in configs]
        _feed(sha, (repr(part), shapes, dict(part.named_parameters()), dict(part.named_buffers())))
    elif dataclasses.is_dataclass(part) and not isinstance(part, type):
        _feed(sha, [type(part).__name__, {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}])
    elif isinstance(part, dict):
        sha.update(b"dict")
        _feed(sha, sorted(part.items()))
    elif isinstance(part, (list, tuple)):
        sha.update(f"{len(part)}[".encode())
        for item in part:
            _feed(sha, item)
        sha.update(b"]")
    else:
        raise TypeError(f"digest: expected plain values, tensors or modules, got {type(part).__name__}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; it takes the name `path` when the block ends well and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield aside / path.name
        made = aside / path.name
        if not (made.is_dir() and path.is_dir()):
            os.replace(made, path)
            return
        os.replace(path, aside / "old")  # a folder cannot be renamed over another: the old one steps aside first
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

    FileExistsError if `folder` is a file, or holds files that this model would not write: nobody's work is deleted.
    """
    target = Path(folder).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target}: expected a folder or nothing, got a file")
    with replacing(target) as aside:
        aside.mkdir()
        yield aside
        strange = {f.name for f in target.iterdir()} - {f.name for f in aside.iterdir()} if target.exists() else set()
        if strange:
            raise FileExistsError(
                f"{target}: expected a new folder or an earlier save of this model, got one with {sorted(strange)}"
            )


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf8", newline="\n")


def locked(path: Path) -> FileLock:
    """One process at a time: `with locked(path): ...`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{path}.lock")


def tensors(kind: str, key: str, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors stored under `kind`/`key`, made and stored first if they are not there."""
    file = path(kind, f"{key}.pt")
    with locked(file):
        if not file.exists():
            made = make()
            with replacing(file) as aside:
                torch.save(made, aside)
        return torch.load(file, weights_only=True)


def record(kind: str, key: str, make: Callable[[], dict]) -> dict:
    """The JSON record stored under `kind`/`key`, made and stored first if it is not there."""
    file = path(kind, f"{key}.json")
    with locked(file):
        if not file.exists():
            write_text(file, json.dumps(make(), indent=1))
        return json.loads(file.read_text(encoding="utf8"))
