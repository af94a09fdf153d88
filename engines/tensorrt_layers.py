"""The engine inspector's account of a plan: its layers, their precision, and what became of each ONNX node.

| version | a layer's name                              | its ONNX nodes                                        |
|---------|---------------------------------------------|-------------------------------------------------------|
| 8.6     | names of the nodes, joined by " + ", "||"   | the name; `Metadata` where there is one               |
| 8.6     | `{ForeignNode[first...last]}`, type Myelin  | hidden: only the region's first and last are named    |
| 10, 11  | kernels, as `__myl_FcAdd_myl0_3`            | `Metadata`: `[ONNX Layer: name]`, one after the other |

(onnx-tensorrt, `processMetadata`; texts of the inspector in TensorRT issues 4020 and 4397.) A tensor's number type and
layout stand together as `Format/Datatype`; 11 parts them into `Datatype` and `Format`, and weights may stand under a
layer's `Constants` ("Migrating IEngineInspector Usage from TensorRT 10.x to 11.x"; Polygraphy's reader of 11.1).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from samq.engines.base import Executed, together

UNKNOWN = "unknown"
MYELIN = "Myelin"

# First match wins: "BF16" holds "F16".
_TYPES = (
    ("INT4", r"INT4"),
    ("INT8", r"INT8"),
    ("FP8", r"FP8|FLOAT8"),
    ("BF16", r"BF16|BFLOAT16"),
    ("FP16", r"FP16|HALF"),
    ("FP32", r"FP32|FLOAT"),
)
_TACTIC_TYPES = {"i8i8": "INT8", "f16f16": "FP16", "bf16bf16": "BF16", "f32f32": "FP32", "e4m3e4m3": "FP8"}
_TACTIC = re.compile(rf"_({'|'.join(_TACTIC_TYPES)})_")
_METADATA = re.compile(r"\[ONNX Layer: ([^\]|]+?) *(?:\|[^\]]*)?\]")
_FOREIGN = re.compile(r"\{ForeignNode\[(.+?)\.\.\.(.+)\]\}")
_GEMM = re.compile(r"gemm|mma|cask|fc|matmul|matrixmultiply|fullyconnected|conv", re.IGNORECASE)


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine.

    Args:
        name, type, tactic: as the inspector gives them.
        precision: of the arithmetic; of the tensors at the edges, joined by "/", for a fused region.
        weights: precision of stored weights where it differs, else "".
        nodes: names of the ONNX nodes in it, as far as they are told.
    """

    name: str
    type: str
    precision: str
    weights: str
    tactic: str
    nodes: tuple[str, ...]

    @property
    def fused(self) -> bool:
        """A region that TensorRT's compiler took as a whole, and whose inside it does not tell."""
        return self.type == MYELIN or _FOREIGN.fullmatch(self.name) is not None


def read_layers(text: str) -> tuple[EngineLayer, ...]:
    """Layers from the inspector's JSON, in the order of execution.

    Raises:
        ValueError: it is no JSON, or JSON of another form.
    """
    account = json.loads(text, strict=False)  # names in Metadata are parted by control characters
    try:
        return tuple(_read_layer({"Name": row} if isinstance(row, str) else row) for row in account.get("Layers", ()))
    except (TypeError, AttributeError) as error:
        raise ValueError(f"the engine inspector's account has an unknown form: {error}") from error


def _read_layer(row: Mapping[str, Any]) -> EngineLayer:
    name, kind, tactic = (str(row.get(key, "")) for key in ("Name", "LayerType", "TacticName"))
    inputs, outputs, constants = (
        [_type_of(tensor.get("Format/Datatype") or tensor.get("Datatype") or "") for tensor in row.get(key) or ()]
        for key in ("Inputs", "Outputs", "Constants")
    )
    layer = EngineLayer(name, kind, UNKNOWN, "", tactic, _nodes(row))
    if layer.fused:
        edges = dict.fromkeys(kind for kind in (*inputs, *outputs) if kind)
        return replace(layer, precision="/".join(edges) or UNKNOWN)
    stored = row.get("Weights")
    weights = _type_of(stored.get("Type", "")) if isinstance(stored, dict) else ""
    weights = "INT4" if "INT4" in (*inputs[1:], *constants) else weights
    named = _TACTIC.search(tactic)
    numbers = [kind for kind in (*inputs, *outputs) if kind]
    precision = _TACTIC_TYPES[named[1]] if named else next(iter(numbers), UNKNOWN)
    return replace(layer, precision=precision, weights="" if weights == precision else weights)


def _type_of(text: str) -> str:
    """Number type in a tensor's format, "" for whole numbers and truth values."""
    return next((name for name, pattern in _TYPES if re.search(pattern, text.upper())), "")


def nodes_in(metadata: str) -> tuple[str, ...]:
    """Names of the ONNX nodes that a layer's metadata tells."""
    return tuple(dict.fromkeys(_METADATA.findall(metadata)))


def _nodes(row: Mapping[str, Any]) -> tuple[str, ...]:
    metadata = row.get("Metadata") or ""
    told = nodes_in(metadata if isinstance(metadata, str) else json.dumps(metadata))  # 11 may give a list or an object
    name = str(row.get("Name", ""))
    if told or name.startswith("Reformatting CopyNode") or _FOREIGN.fullmatch(name):
        return told
    return tuple(_bare(part) for part in re.split(r" \+ | \|\| |, ", name) if part)


def _bare(name: str) -> str:
    """A node's name without the marks of a pointwise fusion around it."""
    bare = re.sub(r"^(?:PWN\()+", "", name)
    return bare if "(" in bare else bare.rstrip(")")


def with_regions(layers: Sequence[EngineLayer], order: Sequence[str], gemms: Sequence[str]) -> tuple[EngineLayer, ...]:
    """Give fused regions whose nodes are not told the GEMMs that must be in them.

    These are the ones between the region's first and last node that no other layer names; the smallest region that
    spans a GEMM gets it.

    Args:
        order: names of the network's layers, as parsed.
        gemms: those that are matrix products.
    """
    places = {name: index for index, name in reversed(list(enumerate(order)))}
    spans = {index: span for index, layer in enumerate(layers) if (span := _span(layer, places)) is not None}
    told = {node for layer in layers for node in layer.nodes}
    inside = defaultdict(list)
    for gemm in (name for name in gemms if name not in told):
        around = [(last - first, index) for index, (first, last) in spans.items() if first <= places[gemm] <= last]
        if around:
            inside[min(around)[1]].append(gemm)
    return tuple(replace(layer, nodes=(*layer.nodes, *inside[index])) for index, layer in enumerate(layers))


def _span(layer: EngineLayer, places: Mapping[str, int]) -> tuple[int, int] | None:
    """Places of a region's first and last node, where they are known."""
    edges = _FOREIGN.fullmatch(layer.name)
    if edges is None or layer.nodes:
        return None
    first, last = ([places[n] for n in text.split(" + ") if n in places] for text in edges.groups())
    return (min(first), max(last)) if first and last else None


def executed(layers: Sequence[EngineLayer], gemms: Sequence[str]) -> dict[str, Executed]:
    """What became of each GEMM, by layer name for `<layer>/MatMul…`, by node name for branches and rotations.

    A layer that was split into several GEMMs (`<layer>/MatMul_q`, …) is told as one; where they differ, as each.
    """
    found: dict[str, list[Executed]] = defaultdict(list)
    for gemm in gemms:
        layer, _, role = gemm.partition("/")
        if role:
            found[layer if role.startswith("MatMul") else gemm].append(_executed(gemm, layers))
    return {name: together(parts) for name, parts in found.items()}


def inside_region(edges: str) -> str:
    """What is told of a GEMM inside a fused region, by the precision at the region's edges."""
    return f"{UNKNOWN} (inside a fused region, {edges} at its edges)"


def _executed(gemm: str, layers: Sequence[EngineLayer]) -> Executed:
    holding = [layer for layer in layers if gemm in layer.nodes]
    if not holding:
        return Executed(f"{UNKNOWN} (the engine inspector does not name it)", "none")
    layer = max(holding, key=_looks_like_a_gemm)
    operator = layer.tactic or layer.type or UNKNOWN
    if layer.fused:
        return Executed(inside_region(layer.precision), operator)
    if layer.weights:
        return Executed(f"{layer.weights} weights, {layer.precision} arithmetic", operator)
    return Executed(layer.precision if layer.precision == UNKNOWN else f"{layer.precision} GEMM", operator)


def _looks_like_a_gemm(layer: EngineLayer) -> bool:
    return layer.type != "Reformat" and any(_GEMM.search(text) for text in (layer.type, layer.tactic, layer.name))
