"""A cache keyed by content: the same inputs give the same key, anything else another.

Files appear whole or not at all, and two processes never make the same entry at once (a lock).
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import platformdirs
import torch
from filelock import FileLock

from kdlib.text.files import replacing, write_text

# Part of every key. Raise it when a change to kdlib changes what a model learns or a teacher says:
# the golden test tells, and what was made before is then made again.
VERSION = 2
MADE_BY = (VERSION, version("torch"), version("transformers"), version("gliner"))


def folder() -> Path:
    """`$KDLIB_CACHE`, or `kdlib` in the user's cache directory."""
    return (
        Path(os.environ.get("KDLIB_CACHE") or platformdirs.user_cache_dir("kdlib"))
        .expanduser()
        .absolute()
    )


def path(kind: str, name: str) -> Path:
    """Where an entry lies: `kind` is a folder of the cache."""
    return folder() / kind / name


def digest(*parts: Any) -> str:
    """SHA-256 over values, nested containers, dataclasses, tensors, and modules with their weights
    and shape.

    TypeError for anything whose content it cannot see: a silent guess would be a stale entry some
    day.
    """
    sha = hashlib.sha256()
    for part in (MADE_BY, *parts):
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
        configs = [
            m.config.to_dict()
            for m in part.modules()
            if hasattr(getattr(m, "config", None), "to_dict")
        ]
        origin = ("_name_or_path", "transformers_version")  # where it came from, not what it is
        shapes = [{k: str(v) for k, v in config.items() if k not in origin} for config in configs]
        _feed(sha, (repr(part), shapes, dict(part.named_parameters()), dict(part.named_buffers())))
    elif dataclasses.is_dataclass(part) and not isinstance(part, type):
        _feed(
            sha,
            [
                type(part).__name__,
                {f.name: getattr(part, f.name) for f in dataclasses.fields(part)},
            ],
        )
    elif isinstance(part, Mapping):
        sha.update(b"dict")
        _feed(sha, sorted(part.items()))
    elif isinstance(part, (list, tuple)):
        sha.update(f"{len(part)}[".encode())
        for item in part:
            _feed(sha, item)
        sha.update(b"]")
    else:
        raise TypeError(
            f"digest: expected plain values, tensors or modules, got {type(part).__name__}"
        )


def locked(path: Path) -> FileLock:
    """One process at a time: `with locked(path): ...`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{path}.lock")


def spent(stage: str, seconds: float) -> None:
    """Note what time went to; `notebooks.run_all` adds it up in figures/bench/study.csv."""
    folder().mkdir(parents=True, exist_ok=True)
    with (folder() / "spent.csv").open("a", encoding="utf8") as log:
        log.write(f"{stage},{seconds:.2f}\n")


def tensors(
    kind: str, key: str, make: Callable[[], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """The tensors stored under `kind`/`key`, made and stored first if they are not there."""
    file = path(kind, f"{key}.pt")
    with locked(file):
        if not file.exists():
            made = make()
            with replacing(file) as aside:
                torch.save(made, aside)
        return load(kind, key)


def load(kind: str, key: str) -> dict[str, torch.Tensor]:
    """The tensors stored under `kind`/`key`; FileNotFoundError where they are not."""
    return torch.load(path(kind, f"{key}.pt"), weights_only=True)


def record(kind: str, key: str, make: Callable[[], dict]) -> dict:
    """The JSON record stored under `kind`/`key`, made and stored first if it is not there."""
    file = path(kind, f"{key}.json")
    with locked(file):
        if not file.exists():
            write_text(file, json.dumps(make(), indent=1))
        return json.loads(file.read_text(encoding="utf8"))
