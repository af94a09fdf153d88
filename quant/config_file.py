"""A YAML file into a pydantic model; what pydantic finds is told with the line, the key and the fix."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from samq.quant.yaml_lines import Document, Place, Problem, dotted, read_document, refusal

WRONG_VALUE = {
    "bool_type": "is not true or false, without quotes",
    "finite_number": "is not a finite number",
    "float_type": "is not a number such as 0.01, without quotes (YAML takes 1e-2 for text)",
    "int_type": "is not a whole number such as 128, without quotes or point",
    "list_type": "is not a list",
    "string_type": "is not text; put it in quotes",
}
BOUNDS = {
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
}

ANY_NAME = "*"  # of a field, where the file chooses the name

ModelT = TypeVar("ModelT", bound=BaseModel)
Fields = dict[str, FieldInfo]
"""Every field of a model and of the models in it, by dotted key."""


def impossible(reason: str, key: str | Place = "") -> PydanticCustomError:
    """The error for a validator to raise.

    Args:
        key: the key at fault below what is being validated, dotted; or its place, where keys have dots in them.
    """
    place = tuple(key.split(".")) if isinstance(key, str) and key else tuple(key)
    return PydanticCustomError("impossible", "{reason}", {"reason": reason, "place": place})


def load_yaml(path: Path, model: type[ModelT]) -> ModelT:
    """The file's content as a `model`.

    Raises:
        UsageError: the file cannot be read, is not YAML or does not fit the model.
    """
    document = read_document(path)
    try:
        loaded = model.model_validate(document.data)
    except ValidationError as error:
        fields = _fields(model)
        found = [_explain(details, document, fields) for details in error.errors()]
        raise refusal(path, document.duplicates + found) from error
    if document.duplicates:
        raise refusal(path, document.duplicates)
    return loaded


def _explain(details: ErrorDetails, document: Document, fields: Fields) -> Problem:
    kind, context = details["type"], details.get("ctx", {})
    place = details["loc"] + context.get("place", ())
    line, node = document.find(place)
    key, value = dotted(place), document.shown(node)
    field = _field_at(place, fields)
    if kind == "impossible":
        message = f"{key}: {context['reason']}"
    elif kind == "extra_forbidden":
        message = f"{key} is not a known key; {_nearest_key(str(place[-1]), field, fields)}"
    elif kind == "missing":
        choices = ", ".join(map(str, get_args(fields[field].annotation)))
        message = f"{key} is missing" + (f"; give one of {choices}" if choices else "")
    elif kind == "literal_error":
        choices = context["expected"].replace("'", "").replace(" or ", ", ")
        message = f"{key}: {value} is not one of {choices}"
    elif kind == "model_type":
        names = ", ".join(_names_in(field, fields))
        message = f"{key or 'the file'}: {value} is not a mapping; its keys are {names}"
    elif kind in BOUNDS:
        message = f"{key} must be {BOUNDS[kind].format(**context)}, not {value} ({fields[field].description})"
    else:
        message = f"{key}: {value} {WRONG_VALUE.get(kind, details['msg'])}"
    return Problem(line, message)


def _field_at(place: Place, fields: Fields) -> str:
    """Dotted key of the field at `place`, as `fields` has it: ANY_NAME where the file chooses the name."""
    key = ""
    for step in place:
        prefix = f"{key}." if key else ""
        chosen = any(field.startswith(f"{prefix}{ANY_NAME}.") for field in fields)
        key = f"{prefix}{ANY_NAME if chosen else step}"
    return key


def _nearest_key(unknown: str, field: str, fields: Fields) -> str:
    """Advice on an unknown key: the nearest one beside it or, where it is nearer, elsewhere."""
    if unknown in fields:
        return f"write {unknown.replace('.', ': {')}: ...{'}' * unknown.count('.')}"
    beside = _names_in(field.rpartition(".")[0], fields)
    anywhere = {key.rpartition(".")[2]: key for key in reversed(fields)}
    for known, similarity in ((beside, 0.7), (anywhere, 0.9), (beside, 0.6), (anywhere, 0.5)):
        near = difflib.get_close_matches(unknown.lower(), known, n=1, cutoff=similarity)
        if near:
            return f"did you mean {known[near[0]]}?"
    return f"known keys here: {', '.join(beside)}"


def _names_in(parent: str, fields: Fields) -> dict[str, str]:
    """Name to dotted key of the fields right below `parent`."""
    split = {key: key.rpartition(".") for key in fields}
    return {name: key for key, (above, _, name) in split.items() if above == parent}


def _fields(model: type[BaseModel], prefix: str = "") -> Fields:
    found: Fields = {}
    for name, field in model.model_fields.items():
        found[prefix + name] = field
        inner = f"{prefix}{name}.{ANY_NAME}." if get_origin(field.annotation) is dict else f"{prefix}{name}."
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type(BaseModel)):
                found |= _fields(kind, inner)
    return found
