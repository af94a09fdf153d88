"""Every name that samq uses of TensorRT, held against the API lists of 8.6.0, 10.3, 10.16 and 11.4.

The lists (`tests/data/trt_api`: class → members) were read from the real bindings. The code says by annotation what is
an object of TensorRT (`builder: trt.Builder = …`), so that its syntax tree tells which members it uses; a member that
some version lacks must be asked for by `hasattr` in the same function.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from simulated_tensorrt import API, VERSIONS, Simulation

import samq
from samq.engines.tensorrt_build import tactic_sources, wanted_flags
from samq.engines.tensorrt_network import DTYPES, network_flags
from samq.engines.tensorrt_plan import BuildOptions

MODULES = sorted((Path(samq.__file__).parent / "engines").glob("tensorrt*.py"))
EVERYTHING = BuildOptions(float32=("node",), version_compatible=True, hardware_compatible=True, refittable=True)

Names = dict[str, str]


def is_module(node: ast.expr) -> bool:
    """The module `tensorrt`, as the code calls it."""
    return ast.unparse(node) in ("api", "self.api")


def lacking(name: str) -> list[str]:
    """Versions without `Class` or `Class.member`."""
    owner, _, member = name.partition(".")
    return [v for v in VERSIONS if owner not in API[v] or (member and member not in API[v][owner])]


class Uses(ast.NodeVisitor):
    """Names used of TensorRT in one file: (name, guarded), and objects of it whose class is not written down."""

    def __init__(self, tree: ast.Module) -> None:
        self.names: list[tuple[str, bool]] = []
        self.untold: list[str] = []
        self._types: Names = {}
        self._guards: set[str] = set()
        self.visit(tree)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        kept = self._types
        self._types = {**kept, **annotations(node)}
        for base in (self._class_of(b) for b in node.bases):
            overridden = [f.name for f in node.body if isinstance(f, ast.FunctionDef) and not f.name.startswith("_")]
            self.names += [(f"{base}.{name}", base in self._guards) for name in overridden if base]
        self.generic_visit(node)
        self._types = kept

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        kept = self._types, self._guards
        self._types = {**kept[0], **annotations(node)}
        self._guards = kept[1] | set(self._asked_for(node))
        for name, value in plain_assignments(node):
            if self._is_object(value) and name not in self._types and reads_members(node, name):
                self.untold.append(f"{name} = {ast.unparse(value)}")
        self.generic_visit(node)
        self._types, self._guards = kept

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if self._is_object(node.value):
            self.untold.append(ast.unparse(node))
        owner = "" if is_module(node.value) else self._class_of(node.value)
        if owner is not None and not node.attr.startswith("__"):
            name = f"{owner}.{node.attr}".lstrip(".")
            self.names.append((name, bool(self._guards & {name, owner})))
        self.generic_visit(node)

    def _class_of(self, node: ast.expr) -> str | None:
        """`Class` for `api.Class`, or for something annotated with it."""
        if isinstance(node, ast.Attribute) and is_module(node.value):
            return node.attr
        return self._types.get(ast.unparse(node))

    def _is_object(self, node: ast.expr) -> bool:
        """A call of TensorRT that may give an object of it."""
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            return False
        return is_module(node.func.value) or self._class_of(node.func.value) is not None

    def _asked_for(self, function: ast.FunctionDef) -> Iterator[str]:
        for call in ast.walk(function):
            if (
                isinstance(call, ast.Call)
                and ast.unparse(call.func) == "hasattr"
                and isinstance(call.args[1], ast.Constant)
            ):
                owner = "" if is_module(call.args[0]) else self._class_of(call.args[0])
                if owner is not None:
                    yield f"{owner}.{call.args[1].value}".lstrip(".")


def annotations(node: ast.ClassDef | ast.FunctionDef) -> Names:
    """Classes of TensorRT by the names that are annotated with them: arguments, variables and `self.…`."""
    found: Names = {}
    for item in ast.walk(node):
        target = item.target if isinstance(item, ast.AnnAssign) else item
        if isinstance(item, (ast.AnnAssign, ast.arg)) and item.annotation is not None:
            words = ast.unparse(item.annotation).removesuffix(" | None")
            if words.startswith("trt."):
                found[ast.unparse(target).partition(":")[0]] = words.removeprefix("trt.")
    return found


def plain_assignments(node: ast.FunctionDef) -> Iterator[tuple[str, ast.expr]]:
    for item in ast.walk(node):
        if isinstance(item, ast.Assign) and len(item.targets) == 1:
            yield ast.unparse(item.targets[0]), item.value


def reads_members(node: ast.FunctionDef, name: str) -> bool:
    return any(isinstance(item, ast.Attribute) and ast.unparse(item.value) == name for item in ast.walk(node))


def problems(source: str) -> list[str]:
    """What is wrong with a file's use of TensorRT."""
    uses = Uses(ast.parse(source))
    missing = [f"{name} is not in {lacking(name)}" for name, guarded in uses.names if lacking(name) and not guarded]
    nowhere = [f"{name} is in no version" for name, _ in uses.names if len(lacking(name)) == len(VERSIONS)]
    return missing + nowhere + [f"class not written down: {text}" for text in uses.untold]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_every_name_is_in_every_version_or_asked_for(path: Path) -> None:
    assert problems(path.read_text(encoding="utf-8")) == []


def test_the_names_are_found() -> None:
    """The reading above sees what the code uses: chains, annotated objects, members of `self`, overridden methods."""
    names = {name for path in MODULES for name, _ in Uses(ast.parse(path.read_text(encoding="utf-8"))).names}
    assert names >= {
        "Builder",
        "Builder.build_serialized_network",
        "IBuilderConfig.builder_optimization_level",
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "ParserError.desc",
        "IProgressMonitor.step_complete",
        "ILogger.log",
        "IExecutionContext.execute_async_v3",
        "ICudaEngine.get_tensor_profile_shape",
        "LayerType.QUANTIZE",
        "Refitter.set_weights",
        "OnnxParserRefitter.refit_from_file",
        "IConstantLayer.weights",
    }
    assert len(names) > 60


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("api.BuilderFlag.FP16", "BuilderFlag.FP16 is not in ['11.4.0.106']"),
        ("self.api.BuilderFlag.FP16", "BuilderFlag.FP16 is not in ['11.4.0.106']"),
        ("api.IBuilderConfig.max_workspace", "in no version"),
        ("builder.max_batch_size", "Builder.max_batch_size is not in"),
        ("builder.create_builder_config().flags", "class not written down"),
        ("config = builder.create_builder_config()\n    config.nonsense", "class not written down"),
        (
            "config: trt.IBuilderConfig = builder.create_builder_config()\n    config.progress_monitor",
            "not in ['8.6.0']",
        ),
        ("class M(api.IProgressMonitor):\n        def phase_begin(self): pass", "phase_begin"),
    ],
)
def test_wrong_names_are_found(body: str, expected: str) -> None:
    found = problems(f"def f(api, builder: trt.Builder):\n    {body}\n")
    assert any(expected in text for text in found), found


def test_names_that_are_asked_for_may_be_missing_somewhere() -> None:
    asked = "if hasattr(api.BuilderFlag, 'FP16'):\n        return api.BuilderFlag.FP16"
    assert problems(f"def f(api):\n    {asked}\n") == []


@pytest.mark.parametrize("version", VERSIONS)
def test_flags_that_are_set_by_name_exist(version: str) -> None:
    strong = "STRONGLY_TYPED" in API[version]["NetworkDefinitionCreationFlag"]
    assert strong == (version != "8.6.0")
    flags = wanted_flags(EVERYTHING, strongly_typed=strong, quantized=True)
    assert set(flags) <= set(API[version]["BuilderFlag"])
    assert ("FP16" in flags) == ("INT8" in flags) == ("OBEY_PRECISION_CONSTRAINTS" in flags) == (not strong)


@pytest.mark.parametrize("version", VERSIONS)
def test_networks_are_strongly_typed_where_that_exists(version: str) -> None:
    api = Simulation(version)
    name = "EXPLICIT_BATCH" if version == "8.6.0" else "STRONGLY_TYPED"
    assert network_flags(api) == 1 << getattr(api.NetworkDefinitionCreationFlag, name)


@pytest.mark.parametrize("version", VERSIONS)
def test_tactic_sources_are_turned_off_where_they_exist(version: str) -> None:
    api = Simulation(version)
    sources = {name: 1 << bit for name, bit in vars(api.TacticSource).items()}
    config = SimpleNamespace(get_tactic_sources=lambda: sum(sources.values()))
    left = tactic_sources(api, config, BuildOptions().tactics_off)  # type: ignore[arg-type]
    assert {name for name, bit in sources.items() if left & bit} == set(sources) - {"CUBLAS", "CUBLAS_LT", "CUDNN"}


def test_number_types_are_tensorrts() -> None:
    assert set(DTYPES) - set(API["8.6.0"]["DataType"]) == {"INT64"}
    assert all(set(DTYPES) <= set(API[version]["DataType"]) for version in VERSIONS[1:])
