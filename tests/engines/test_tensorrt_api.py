"""Every name that samq uses of TensorRT, held against the API lists of 8.6.0, 10.3, 10.16 and 11.4.

The lists (`tests/data/trt_api`: class → members) were read from the real bindings. The code says by annotation what is
an object of TensorRT (`builder: trt.Builder = …`, `inputs: list[trt.ITensor] = …`), so that its syntax tree tells which
members it uses; a member that some version lacks must be asked for by `hasattr` in the same function. Members looked up
by `getattr` must be written down beside it, or be asked for.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
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

SEVERAL = re.compile(r"(?:list|tuple|Collection|Iterable|Iterator|Sequence)\[trt\.(\w+)(?:, \.\.\.)?\]")
PASS_ON = ("enumerate", "iter", "list", "reversed", "sorted", "tuple", "zip")  # what they are given

UNKNOWN = "?"  # class of elements that is not written down

Names = dict[str, str]
Loop = ast.comprehension | ast.For


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
        self._words: dict[str, list[str]] = {}
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
        for name, value in assignments(node):
            if self._is_object(value) and name not in self._types and reads_members(node, name):
                self.untold.append(f"{name} = {ast.unparse(value)}")
            if self._gives_objects(value) and several(name) not in self._types:
                self._types[several(name)] = UNKNOWN
        self.generic_visit(node)
        self._types, self._guards = kept

    def visit_For(self, node: ast.For) -> None:
        self._visit_loops(node, [node])

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> None:
        self._visit_loops(node, node.generators)

    visit_SetComp = visit_GeneratorExp = visit_DictComp = visit_ListComp

    def _visit_loops(self, node: ast.expr | ast.For, loops: Sequence[Loop]) -> None:
        """A loop's variables are what it runs through, and hide others of their names in a comprehension."""
        kept = self._types, self._words
        self._types, self._words = dict(kept[0]), dict(kept[1])
        for loop in loops:
            names = [ast.unparse(name) for name in ast.walk(loop.target) if isinstance(name, ast.Name)]
            kind = self._types.get(several(ast.unparse(loop.iter)))
            for name in names:
                if isinstance(loop, ast.comprehension):
                    self._types.pop(name, None)
                if kind not in (None, UNKNOWN):
                    self._types[name] = str(kind)
                elif name not in self._types and self._gives_objects(loop.iter) and reads_members(node, name):
                    self.untold.append(f"{name} in {ast.unparse(loop.iter)}")
                self._words[name] = words_in(loop.iter)
        self.generic_visit(node)
        self._types, self._words = kept

    def visit_Call(self, node: ast.Call) -> None:
        owner = self._owner(node.args[0]) if ast.unparse(node.func) == "getattr" else None
        if owner is not None:
            for member in self._words.get(ast.unparse(node.args[1])) or [member_of(node.args[1])]:
                name = f"{owner}.{member}".lstrip(".")
                if not member.startswith("<"):
                    self.names.append((name, bool(self._guards & {name, owner})))
                elif name not in self._guards:
                    self.untold.append(ast.unparse(node))
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if self._is_object(node.value):
            self.untold.append(ast.unparse(node))
        owner = self._owner(node.value)
        if owner is not None and not node.attr.startswith("__"):
            name = f"{owner}.{node.attr}".lstrip(".")
            self.names.append((name, bool(self._guards & {name, owner})))
        self.generic_visit(node)

    def _owner(self, node: ast.expr) -> str | None:
        """What members are of: a class, "" for the module, None for neither."""
        return "" if is_module(node) else self._class_of(node)

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

    def _gives_objects(self, node: ast.expr) -> bool:
        """Several of what a call of TensorRT may give, or an iterable that it gives."""
        if isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp):
            return self._gives_objects(node.elt)
        if isinstance(node, ast.List | ast.Set | ast.Tuple):
            return any(map(self._gives_objects, node.elts))
        if isinstance(node, ast.Starred):
            return self._gives_objects(node.value)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in PASS_ON:
            return any(map(self._gives_objects, node.args))
        return self._is_object(node) or several(ast.unparse(node)) in self._types

    def _asked_for(self, function: ast.FunctionDef) -> Iterator[str]:
        for call in ast.walk(function):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "hasattr":
                owner = self._owner(call.args[0])
                if owner is not None:
                    yield f"{owner}.{member_of(call.args[1])}".lstrip(".")


def member_of(node: ast.expr) -> str:
    """A member as `hasattr` and `getattr` take it: its name, or what the name is taken from, in brackets."""
    return str(node.value) if isinstance(node, ast.Constant) else f"<{ast.unparse(node)}>"


def words_in(node: ast.expr) -> list[str]:
    """The strings of a collection that is written down; none where it holds anything else."""
    elements = node.elts if isinstance(node, ast.List | ast.Set | ast.Tuple) else []
    words = [element.value for element in elements if isinstance(element, ast.Constant)]
    return [word for word in words if isinstance(word, str)] if len(words) == len(elements) else []


def several(name: str) -> str:
    """What the class of a collection's elements is noted under."""
    return f"{name}[]"


def annotations(node: ast.ClassDef | ast.FunctionDef) -> Names:
    """Classes of TensorRT by the names that are annotated with them: arguments, variables and `self.…`, and `name[]`
    for the elements of a collection.
    """
    found: Names = {}
    for item in ast.walk(node):
        target = item.target if isinstance(item, ast.AnnAssign) else item
        if isinstance(item, (ast.AnnAssign, ast.arg)) and item.annotation is not None:
            words = ast.unparse(item.annotation).removesuffix(" | None")
            name, elements = ast.unparse(target).partition(":")[0], SEVERAL.fullmatch(words)
            if elements is not None:
                found[several(name)] = elements[1]
            elif words.startswith("trt."):
                found[name] = words.removeprefix("trt.")
    return found


def assignments(node: ast.FunctionDef) -> Iterator[tuple[str, ast.expr]]:
    for item in ast.walk(node):
        if isinstance(item, ast.Assign) and len(item.targets) == 1:
            yield ast.unparse(item.targets[0]), item.value
        elif isinstance(item, ast.AnnAssign) and item.value is not None:
            yield ast.unparse(item.target), item.value


def reads_members(node: ast.AST, name: str) -> bool:
    return any(isinstance(item, ast.Attribute) and ast.unparse(item.value) == name for item in ast.walk(node))


def problems(source: str) -> list[str]:
    """What is wrong with a file's use of TensorRT."""
    uses = Uses(ast.parse(source))
    missing = [f"{name} is not in {lacking(name)}" for name, guarded in uses.names if lacking(name) and not guarded]
    nowhere = [f"{name} is in no version" for name, _ in uses.names if len(lacking(name)) == len(VERSIONS)]
    return missing + nowhere + [f"not written down: {text}" for text in uses.untold]


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
        "LayerType.CAST",
        "WeightsRole.name",
    }
    assert len(names) > 60


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("api.BuilderFlag.FP16", "BuilderFlag.FP16 is not in ['11.4.0.106']"),
        ("self.api.BuilderFlag.FP16", "BuilderFlag.FP16 is not in ['11.4.0.106']"),
        ("api.IBuilderConfig.max_workspace", "in no version"),
        ("builder.max_batch_size", "Builder.max_batch_size is not in"),
        ("builder.create_builder_config().flags", "not written down"),
        ("config = builder.create_builder_config()\n    config.nonsense", "not written down"),
        (
            "config: trt.IBuilderConfig = builder.create_builder_config()\n    config.progress_monitor",
            "not in ['8.6.0']",
        ),
        ("[t.nme for t in inputs]", "ITensor.nme is in no version"),
        ("{t.nme: t for i, t in ((0, t) for t in inputs if t.nme)}", "ITensor.nme is in no version"),
        ("found: tuple[trt.ITensor, ...] = f()\n    for t in found:\n        t.nme", "ITensor.nme is in no version"),
        ("{t.name for t in [builder.get(i) for i in range(3)]}", "not written down: t in"),
        ("any(t.name for t in (*builder.all(), 1))", "not written down: t in"),
        ("found = [builder.get(0)]\n    return [t.name for t in found]", "not written down: t in found"),
        ("found: Any = [builder.get(0)]\n    for i, t in enumerate(found):\n        t.name", "not written down: t in"),
        ("getattr(api.LayerType, 'CASTS')", "LayerType.CASTS is in no version"),
        ("getattr(api.BuilderFlag, 'FP16', None)", "BuilderFlag.FP16 is not in ['11.4.0.106']"),
        ("getattr(api, 'Bilder')", "Bilder is in no version"),
        ("{getattr(api.LayerType, name) for name in ('CAST', 'CASTS')}", "LayerType.CASTS is in no version"),
        ("for name in ['CASTS']:\n        getattr(api.LayerType, name)", "LayerType.CASTS is in no version"),
        ("[getattr(api.LayerType, name) for name in names]", "not written down: getattr"),
        ("class M(api.IProgressMonitor):\n        def phase_begin(self): pass", "phase_begin"),
    ],
)
def test_wrong_names_are_found(body: str, expected: str) -> None:
    found = problems(f"def f(api, builder: trt.Builder, inputs: list[trt.ITensor]):\n    {body}\n")
    assert any(expected in text for text in found), found


def test_names_that_are_asked_for_may_be_missing_somewhere() -> None:
    for use in ("api.BuilderFlag.FP16", "getattr(api.BuilderFlag, 'FP16')"):
        assert problems(f"def f(api):\n    if hasattr(api.BuilderFlag, 'FP16'):\n        return {use}\n") == []
    named = "if hasattr(api.BuilderFlag, name):\n        return getattr(api.BuilderFlag, name)"
    assert problems(f"def f(api, name):\n    {named}\n") == []


def test_what_is_no_object_of_tensorrt_may_have_any_members() -> None:
    """Not even where a name is elsewhere that of one."""
    for use in ("[t.nme for t in inputs]", "[t.nme for t in (1, 2)]", "[i.nme for i in range(builder.num)]"):
        assert not [p for p in problems(f"def f(inputs, t: trt.ITensor, builder):\n    {use}\n") if "nme" in p]


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
