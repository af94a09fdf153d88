"""Imports go one way: calib ← quant ← export ← engines ← tools, and engines stay light."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import samq

ROOT = Path(samq.__file__).parent
ORDER = ("calib", "quant", "export", "engines", "tools")
SHARED = {"errors", "files", "__version__"}
HEAVY = {"torch", "transformers"}


def imports_of(path: Path) -> set[str]:
    """Modules named by the imports of a file; those that only type checkers follow do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in [node for node in ast.walk(tree) if isinstance(node, ast.If)]:
        if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def file_of(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split(".")[1:])
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


@pytest.mark.parametrize("package", ORDER)
def test_a_package_imports_only_those_before_it(package: str) -> None:
    allowed = {*ORDER[: ORDER.index(package) + 1], *SHARED}
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        own = {name.split(".")[1] for name in imports_of(path) if name.startswith("samq.")}
        assert own <= allowed, f"{path.relative_to(ROOT)} imports samq.{', samq.'.join(sorted(own - allowed))}"


@pytest.mark.parametrize("path", sorted((ROOT / "engines").rglob("*.py")), ids=lambda path: path.stem)
def test_engines_need_neither_torch_nor_transformers(path: Path) -> None:
    chains, seen = [(path,)], {path}
    while chains:
        chain = chains.pop()
        names = imports_of(chain[-1])
        heavy = {name.split(".")[0] for name in names} & HEAVY
        assert not heavy, f"{' → '.join(str(p.relative_to(ROOT)) for p in chain)} imports {heavy}"
        parents = {".".join(name.split(".")[:n]) for name in names for n in range(1, name.count(".") + 2)}
        for module in sorted(name for name in parents if name.split(".")[0] == "samq"):
            found = file_of(module)
            if found is not None and found not in seen:
                seen.add(found)
                chains.append((*chain, found))


def test_submodules_of_onnx_ir_are_imported_where_they_are_used() -> None:
    """Torch's exporter imports `onnx_ir.passes.common` too; where it has not run, `onnx_ir.passes` lacks it."""
    for path in sorted((ROOT / "export").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        assert not [name for name in used if name.startswith("ir.passes.common")], path.relative_to(ROOT)
