"""How ONNX Runtime on the CPU is to run an engine, written beside it: `image_encoder.onnx.json`.

An engine is an ONNX file that any ONNX Runtime loads; what it is to be told then is no part of the format. The sidecar
names the entries for the session's config, those that only some processors need, the versions of the runtime, and what
each quantized layer is to be executed as. Which processor needs what is found out where the engine is loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from samq.engines.base import sidecar_of
from samq.errors import BadInput, MachineLacks

OLDEST = "1.23"  # ONNX Runtime that samq is tested with

NO_IDLE_SPINNING = "session.force_spinning_stop"
EXACT_INT8 = "session.x64quantprecision"
REASONS = {
    NO_IDLE_SPINNING: "idle threads leave the cores to the other engine and to other programs",
    EXACT_INT8: "x64 processors without VNNI sum products of u8 and s8 in 16 bits, which saturate; with VNNI they do"
    " not, and this entry would only make them slower, so whoever loads the engine decides",
}

Entries = Mapping[str, str]


@dataclass(frozen=True)
class CpuOptions:
    """Entries of a session's config.

    Args:
        config: for every machine.
        config_where_u8s8_saturates: besides, where the machine's INT8 kernels are not exact by themselves.
    """

    config: Entries = field(default_factory=lambda: {NO_IDLE_SPINNING: "1"})
    config_where_u8s8_saturates: Entries = field(default_factory=lambda: {EXACT_INT8: "1"})

    def entries(self, *, exact: bool) -> dict[str, str]:
        """Those for a machine whose INT8 kernels are exact by themselves, or are not."""
        return dict(self.config) if exact else {**self.config, **self.config_where_u8s8_saturates}


@dataclass(frozen=True)
class CpuEngineInfo:
    """The sidecar of an engine.

    Args:
        built_with: version of ONNX Runtime that took the graph when it was built.
        requested: quantized layer → what it is to be executed as, in the words of `samq.engines`.
        options: of the session.
        at_least: oldest version of ONNX Runtime that it is meant for.
    """

    built_with: str
    requested: Mapping[str, str]
    options: CpuOptions = field(default_factory=CpuOptions)
    at_least: str = OLDEST

    def as_json(self) -> dict[str, Any]:
        """What the sidecar says, with the reasons for those who load the engine without samq."""
        return {
            "runtime": "onnxruntime",
            "provider": "CPUExecutionProvider",
            "at_least": self.at_least,
            "built_with": self.built_with,
            **asdict(self.options),
            "reasons": REASONS,
            "requested": dict(self.requested),
        }

    def require(self, path: Path, version: str) -> None:
        """Insist on a version of ONNX Runtime that the engine is meant for.

        Args:
            path: of the engine.
            version: of the ONNX Runtime at hand.

        Raises:
            MachineLacks: it is older.
        """
        if _numbers(version) < _numbers(self.at_least):
            raise MachineLacks(
                f"{path} is for ONNX Runtime {self.at_least} or later, here is {version}; "
                f'run `pip install "onnxruntime>={self.at_least}"`'
            )


def load_info(path: Path) -> CpuEngineInfo:
    """Read the sidecar of an engine.

    Raises:
        BadInput: it is missing, or no sidecar.
    """
    sidecar = sidecar_of(path)
    if not sidecar.is_file():
        raise BadInput(f"{sidecar} is missing, which says how {path.name} is to be run; run `samq-export build` again")
    try:
        found = json.loads(sidecar.read_text(encoding="utf-8"))
        if found["runtime"] != "onnxruntime":
            raise ValueError(f"it is of {found['runtime']}")
        options = CpuOptions(_texts(found, "config"), _texts(found, "config_where_u8s8_saturates"))
        info = CpuEngineInfo(str(found["built_with"]), _texts(found, "requested"), options, str(found["at_least"]))
        if not _numbers(info.at_least):
            raise ValueError(f"version {info.at_least}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{sidecar} is no sidecar of an engine ({error!r}); run `samq-export build` again") from error
    return info


def _texts(found: Mapping[str, Any], key: str) -> dict[str, str]:
    """A mapping of texts to texts.

    Raises:
        TypeError: it is something else.
    """
    value = found[key]
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise TypeError(f"{key} is no mapping of texts")
    return value


def _numbers(version: str) -> tuple[int, ...]:
    """(1, 32) of "1.32.0", as far as versions are told apart here."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
