"""A cache keyed by content: the same inputs give the same key, anything else another.

Files appear whole or not at all, and two processes never make the same entry at once (a lock). An
entry begins with the SHA-256 of the rest; one that does not fit it is set aside and made again.
"""

import ast
import dataclasses
import hashlib
import io
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import platformdirs
import torch
from filelock import FileLock

from kdlib.text.files import replacing

# What records are found by. Raise it when a change to kdlib changes what a model learns or a
# teacher says: the golden test tells, and what was made before is then made again.
VERSION = 2
RUN = "KDLIB_RUN"  # the name of the batch run that a kernel belongs to


def code(folder: Path, names: Iterable[str]) -> str:
    """A digest of the Python files that make numbers, docstrings and comments left out."""
    sha = hashlib.sha256()
    for file in sorted(f for name in names for f in folder.glob(name)):
        tree = ast.parse(file.read_text(encoding="utf8"))
        for node in ast.walk(tree):
            first = next(iter(getattr(node, "body", []) or []), None) if _has_docstring(node) else 0
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = [*node.body[1:], ast.Pass()]
        sha.update(f"{file.name}:{ast.dump(tree)}".encode())
    return sha.hexdigest()[:16]


def _has_docstring(node: ast.AST) -> bool:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return isinstance(node, kinds)


# Part of every key, beside what these are given: sentences, settings, weights.
NUMBERS = ("*.py", "students/*.py", "teachers/*.py", "text/tags.py", "text/pieces.py")
NUMBERS += ("lab/train.py", "lab/study.py", "lab/targets.py", "lab/scores.py")
SOURCES = code(Path(__file__).parents[1], NUMBERS)
PLAIN = {type(None), str, int, float, bool}
LIBRARIES = tuple(version(name) for name in ("torch", "transformers", "gliner"))
MADE_BY = (VERSION, SOURCES, LIBRARIES)


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
        if _plain(part):  # most of what sentences are made of, and written by Python at once
            sha.update(repr(part).encode())
            part = ()
        for item in part:
            _feed(sha, item)
        sha.update(b"]")
    else:
        raise TypeError(
            f"digest: expected plain values, tensors or modules, got {type(part).__name__}"
        )


def _plain(part: Iterable[Any]) -> bool:
    """Whether there are nothing but plain values in it, however deep: `repr` tells all of them."""
    while True:
        kinds = set(map(type, part))
        if kinds <= PLAIN:
            return True
        if not kinds <= PLAIN | {list, tuple}:
            return False
        part = [item for inner in part if type(inner) in (list, tuple) for item in inner]


def locked(path: Path) -> FileLock:
    """One process at a time: `with locked(path): ...`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{path}.lock")


def spent(stage: str, seconds: float) -> None:
    """Note what time went to; `notebooks.run_all` adds it up in figures/bench/study.csv."""
    folder().mkdir(parents=True, exist_ok=True)
    with (folder() / "spent.csv").open("a", encoding="utf8") as log:
        log.write(f"{os.environ.get(RUN, '')},{stage},{seconds:.2f}\n")


def write(file: Path, content: bytes) -> None:
    """An entry, whole or not at all, after its checksum."""
    with replacing(file, len(content) + 32) as aside:
        aside.write_bytes(hashlib.sha256(content).digest() + content)


def read(file: Path) -> bytes | None:
    """An entry's content; None where there is none, or none that is whole: that one is renamed to
    *.damaged, which is said, and may be looked at."""
    if not file.exists():
        return None
    stored = file.read_bytes()
    if hashlib.sha256(stored[32:]).digest() == stored[:32]:
        return stored[32:]
    os.replace(file, file.with_name(f"{file.name}.damaged"))
    warnings.warn(f"{file}: damaged, set aside and made again", stacklevel=2)
    return None


def packed(stored: dict) -> bytes:
    """Tensors and plain values as `torch.save` writes them."""
    buffer = io.BytesIO()
    torch.save(stored, buffer)
    return buffer.getvalue()


def unpacked(content: bytes) -> dict:
    """What was `packed`: data, never code."""
    return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")


def _remembered(file: Path, make: Callable[[], bytes]) -> bytes:
    """An entry, made and stored first if it is not there; whole ones are read without a lock, so
    that a cache one may not write to serves too."""
    content = read(file)
    if content is None:
        with locked(file):
            content = read(file)
            if content is None:
                content = make()
                write(file, content)
    return content


def tensors(
    kind: str, key: str, make: Callable[[], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """The tensors stored under `kind`/`key`, made and stored first if they are not there."""
    return unpacked(_remembered(path(kind, f"{key}.pt"), lambda: packed(make())))


def load(kind: str, key: str) -> dict[str, torch.Tensor]:
    """The tensors stored under `kind`/`key`; FileNotFoundError where they are not, or damaged."""
    file = path(kind, f"{key}.pt")
    content = read(file)
    if content is None:
        raise FileNotFoundError(f"{file}: expected an entry of the cache, got none that is whole")
    return unpacked(content)


def record(kind: str, key: str, make: Callable[[], dict]) -> dict:
    """The JSON record stored under `kind`/`key`, made and stored first if it is not there."""
    file = path(kind, f"{key}.json")
    return json.loads(_remembered(file, lambda: json.dumps(make(), indent=1).encode("utf8")))
