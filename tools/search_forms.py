"""The forms that a search may give each layer, and recipes that give each layer one of them.

| candidate       | weights                                                                       |
|-----------------|-------------------------------------------------------------------------------|
| `float`         | not quantized                                                                 |
| `int8`          | 8 bits, one scale an output channel                                           |
| `int4`          | 4 bits, as the config has them; from an 8-bit one as in the presets           |
| `int4-rankR`    | the same with a low-rank branch of rank R (less where the layer has not more) |

All else (activations, shifting, smoothing, GPTQ) is the config's, for all layers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from samq.errors import UsageError
from samq.quant.config import Recipe, load_recipe

FLOAT, INT8, INT4 = "float", "int8", "int4"
CANDIDATES = (FLOAT, INT8, INT4, f"{INT4}-rank8")
_RANKED = re.compile(rf"{INT4}-rank([1-9]\d*)")

Assignment = Mapping[str, str]
"""Layer → candidate."""


def rule_of(candidate: str, base: Recipe) -> dict[str, Any]:
    """What `layers` says of a layer in this form.

    Raises:
        UsageError: there is no such candidate.
    """
    ranked = _RANKED.fullmatch(candidate)
    if candidate == FLOAT:
        return {"dtype": FLOAT}
    if candidate == INT8:
        return {"dtype": "sint8", "group_shapes": [[1, -1]], "low_rank": None}
    if candidate != INT4 and ranked is None:
        raise UsageError(
            f"{candidate!r} is no candidate; choose from {FLOAT}, {INT8}, {INT4} and {INT4}-rank8 (any rank)"
        )
    low_rank = None
    if ranked is not None:
        as_in_config = {} if base.wgts.low_rank is None else base.wgts.low_rank.model_dump()
        low_rank = as_in_config | {"rank": int(ranked[1]), "max_overhead": None, "shared_down": False}
    usual = base if base.wgts.bits == 4 else load_recipe("int4_w4only" if base.weight_only else "int4_w4a8")
    return {"dtype": usual.wgts.dtype, "group_shapes": usual.wgts.group_shapes, "low_rank": low_rank}


def uniform(base: Recipe, candidate: str) -> Recipe:
    """The config with all quantized layers in one form, which is not `float`."""
    values = base.model_dump()
    values["wgts"] |= rule_of(candidate, base)
    return Recipe.model_validate(values)


def recipe_of(base: Recipe, assignment: Assignment) -> Recipe:
    """The config with each layer in its form: the most frequent one in `wgts`, the others by name in `layers`.

    Args:
        assignment: of all layers that `base` quantizes; one of them at least is not float.
    """
    usual = Counter(form for form in assignment.values() if form != FLOAT).most_common(1)[0][0]
    values = uniform(base, usual).model_dump()
    values["layers"] = {layer: rule_of(form, base) for layer, form in assignment.items() if form != usual}
    return Recipe.model_validate(values)


def check_candidates(candidates: Sequence[str], base: Recipe) -> None:
    """Refuse what cannot be searched.

    Raises:
        UsageError: a candidate does not exist or does not go with the config, or there is nothing to choose.
    """
    if base.quantizer != "samq":
        raise UsageError(f"a search tries samq's own forms, which quantizer: {base.quantizer} has not; use a preset")
    if base.layers:
        raise UsageError("the config has `layers` already, which is what a search decides; remove them")
    for candidate in candidates:
        rule_of(candidate, base)
    if len(set(candidates)) < 2 or not set(candidates) - {FLOAT}:
        raise UsageError("a search needs two --candidates or more, and one that is not float")
