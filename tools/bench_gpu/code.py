"""Which of samq's code a figure depends on, and a digest of it: a change elsewhere must not cost a measurement."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from threading import Lock

import samq

PACKAGE = "samq"
KERNEL_NAMES = ("samq.engines.kernels",)  # how they are read changes neither plans nor times

_PARSING = Lock()  # ast.parse of Python 3.11 counts its recursion for all threads together, and then raises SystemError


@cache
def digest_of(roots: tuple[str, ...], without: tuple[str, ...] = ()) -> str:
    """Digest of modules and of all that they import of samq, 16 hex digits.

    Args:
        roots: names of modules, `samq.` included.
        without: packages that are left out, with what only they import.
    """
    digest = hashlib.sha256()
    for name in sorted(modules_of(roots, without)):
        digest.update(name.encode() + b"\0")
        digest.update(_file_of(name).read_bytes())
    return digest.hexdigest()[:16]


def modules_of(roots: Collection[str], without: Collection[str] = ()) -> set[str]:
    """Names of modules and of all that they import of samq, wherever in them the import stands.

    Raises:
        ValueError: a root is no module of samq.
    """
    unknown = [name for name in roots if not _exists(name)]
    if unknown:
        raise ValueError(f"no modules of {PACKAGE}: {', '.join(unknown)}")
    found: set[str] = set()
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name in found or any(name == left_out or name.startswith(f"{left_out}.") for left_out in without):
            continue
        found.add(name)
        waiting += _imports(name)
    return found


def _imports(name: str) -> Iterator[str]:
    """Modules of samq that a module imports, and the packages that it lies in."""
    parent = name.rpartition(".")[0]
    if parent:
        yield parent
    with _PARSING:
        tree = ast.parse(_file_of(name).read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            candidates = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            candidates = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from filter(_exists, candidates)


def _exists(name: str) -> bool:
    return name.partition(".")[0] == PACKAGE and _file_of(name).is_file()


def _file_of(name: str) -> Path:
    path = Path(samq.__file__).parent.joinpath(*name.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
