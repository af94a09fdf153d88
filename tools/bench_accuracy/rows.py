"""All rows in the order in which they are measured: those that tell most come first."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from samq.errors import MachineLacks, UsageError
from samq.tools.bench_accuracy import llm_compressor_peer, modelopt_peer, ours
from samq.tools.bench_accuracy.method import OURS, Method
from samq.tools.bench_gpu.code import digest_of

METHODS = {method.key: method for method in (*ours.METHODS, *modelopt_peer.METHODS, *llm_compressor_peer.METHODS)}
FIRST = (
    "w4a8",
    "w4a8-rtn",
    "modelopt-w4a8-awq",
    "llmcompressor-w4a8",
    "w4only",
    "modelopt-w4-awq",
    "modelopt-w4-awq-groups",
    "llmcompressor-w4-asym",
    "svdquant",
    "modelopt-svdquant-bytes",
    "modelopt-svdquant",
    "llmcompressor-w4a8-smooth",
    "w8a8",
    "modelopt-w8a8-smooth",
    "llmcompressor-w8a8-smooth",
)
SCORING = ("samq.tools.bench_accuracy.scenes", "samq.tools.simulation", "samq.tools.demo.hostile")
MODULES = {
    modelopt_peer.PACKAGE: "samq.tools.bench_accuracy.modelopt_peer",
    llm_compressor_peer.PACKAGE: "samq.tools.bench_accuracy.llm_compressor_peer",
}
NEED = "{} is not installed; run `pip install samq[bench]` in an environment of its own (docs/accuracy.md)"


def rows(keys: Sequence[str] | None, configs: Sequence[str]) -> list[Method]:
    """The rows asked for.

    Args:
        keys: of methods, None for all of them.
        configs: files that get a row each.

    Raises:
        UsageError: a file is no config.
    """
    named = keys if keys is not None else [*FIRST, *(key for key in METHODS if key not in FIRST)]
    from_files = [ours.config_method(path) for path in configs]
    if len({method.key for method in from_files}) < len(configs):
        raise UsageError("two --config have one name; rename a file")
    return [*(METHODS[key] for key in named), *from_files]


def version_of(package: str) -> str:
    """Version of a peer.

    Raises:
        MachineLacks: it is not installed.
    """
    try:
        return version(package)
    except PackageNotFoundError as error:
        raise MachineLacks(NEED.format(package)) from error


def code_digest(method: Method | None, peer_version: str | None) -> str:
    """Digest of what a row's figures depend on: code, recipe, and the peer's version.

    Args:
        method: None for the float model.
    """
    if method is None:
        return digest_of(SCORING, ("samq.quant",))
    if method.who == OURS:
        parts = [digest_of((*SCORING, "samq.quant.quantize")), method.recipe]
    else:
        parts = [digest_of((*SCORING, MODULES[method.who]), ("samq.quant",)), str(peer_version)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
