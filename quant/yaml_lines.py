"""A YAML file as plain data that knows its lines, and one-line errors that name file, line and problem.

PyYAML composes the text into a tree of nodes, each with its line, and makes the plain data from that tree
(safe loading only). `Document.find` goes down the tree to the line of a place in the data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.reader import ReaderError

from samq.errors import UsageError

MAX_BYTES = 1 << 20
MAX_SHOWN_PROBLEMS = 3
MAX_SHOWN_CHARACTERS = 60
STRING_TAG = "tag:yaml.org,2002:str"
MERGE_TAG = "tag:yaml.org,2002:merge"

Place = tuple[int | str, ...]
"""Keys and list indices from the top of the data."""


class Problem(NamedTuple):
    """What is wrong, and the line (from 1) on which it stands."""

    line: int
    message: str


def refusal(path: Path, problems: list[Problem]) -> UsageError:
    """An error of one line with the first problems in the order of the file."""
    in_order = sorted(problems, key=lambda problem: problem.line)
    shown = [f"line {line}: {message}" for line, message in in_order]
    more = f" (+{len(shown) - MAX_SHOWN_PROBLEMS} more)" if len(shown) > MAX_SHOWN_PROBLEMS else ""
    text = f"{path}, {'; '.join(shown[:MAX_SHOWN_PROBLEMS])}{more}"
    return UsageError(" ".join(text.split()))


def dotted(place: Place) -> str:
    """`wgts.group_shapes[0]`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place).removeprefix(".")


class Document:
    """The plain data of a YAML text, and the way from a place in the data to its line and node."""

    def __init__(self, text: str, root: Node, data: Any, duplicates: list[Problem]) -> None:
        self._text = text
        self._root = root
        self.data = data
        self.duplicates = duplicates

    def find(self, place: Place) -> tuple[int, Node]:
        """Line and node of `place`, or of its nearest parent in the text."""
        line, node = self._root.start_mark.line + 1, self._root
        for step in place:
            if isinstance(node, SequenceNode) and isinstance(step, int):
                node = node.value[step]
                line = node.start_mark.line + 1
            elif isinstance(node, MappingNode):
                entries = [(key, value) for key, value in node.value if key.value == step]
                if not entries:
                    break
                key, node = entries[-1]  # keys merged by `<<` come before the mapping's own
                line = key.start_mark.line + 1
        return line, node

    def shown(self, node: Node) -> str:
        """The value as the file has it, text in quotes, cut where it gets long."""
        if isinstance(node, ScalarNode):
            value = repr(node.value) if node.tag == STRING_TAG else node.value or "null"
        else:
            value = self._text[node.start_mark.index : node.end_mark.index]
        return value if len(value) <= MAX_SHOWN_CHARACTERS else f"{value[:MAX_SHOWN_CHARACTERS]}..."


def read_document(path: Path) -> Document:
    """The file's data and lines.

    Raises:
        UsageError: the file cannot be read, is empty, is not UTF-8 or not one document of plain YAML.
    """
    text = _read_text(path)
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            raise UsageError(f"{path} is empty; copy a preset and change it")
        duplicates = _settle_keys(root)
        return Document(text, root, loader.construct_document(root), duplicates)
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        message = f"the character #x{ord(text[error.position]):04x} is not allowed in YAML"
        raise refusal(path, [Problem(line, message)]) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = ", ".join(filter(None, (error.context, error.problem)))
        raise refusal(path, [Problem(mark.line + 1 if mark else 1, f"not valid YAML: {what}")]) from error
    except RecursionError as error:
        raise UsageError(f"{path} is nested too deeply") from error


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise UsageError(f"{path} is a directory; give a YAML file")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})") from error
    if len(content) > MAX_BYTES:
        raise UsageError(f"{path} is larger than {MAX_BYTES >> 20} MiB; give a YAML file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise refusal(path, [Problem(line, "not UTF-8 text; save the file as UTF-8")]) from error


class _Loader(yaml.SafeLoader):
    """Python's own errors on a scalar (a 13th month, an empty `!!int`) become YAML errors with a line."""

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            problem = f"{node.value!r} is not a {node.tag.rpartition(':')[2]}"
            raise ConstructorError(None, None, problem, node.start_mark) from error


def _settle_keys(root: Node) -> list[Problem]:
    """Make text of every scalar key (`on`, `1` and `null` too) and return those that are given twice."""
    duplicates: list[Problem] = []
    pending: list[tuple[Node, Place]] = [(root, ())]
    seen: set[int] = set()
    while pending:
        node, place = pending.pop()
        if id(node) in seen:  # reached again through an alias
            continue
        seen.add(id(node))
        if isinstance(node, SequenceNode):
            pending += [(item, (*place, index)) for index, item in enumerate(node.value)]
        if not isinstance(node, MappingNode):
            continue
        first_lines: dict[str, int] = {}
        for key, value in node.value:
            if key.tag == MERGE_TAG:
                pending.append((value, place))
            elif isinstance(key, ScalarNode):
                key.tag = STRING_TAG
                inner, line = (*place, key.value), key.start_mark.line + 1
                first = first_lines.get(key.value)
                if first is not None:
                    duplicates.append(Problem(line, f"{dotted(inner)} is given twice, first on line {first}"))
                first_lines.setdefault(key.value, line)
                pending.append((value, inner))
    return duplicates
