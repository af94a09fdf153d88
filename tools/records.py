"""Records of benchmarks: JSON files that are written again after each figure, and read back by the next run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from samq.errors import BadInput


def read_json_record(path: Path, bench: str, check: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """The content of a record.

    Args:
        bench: what writes such records.
        check: raises LookupError, TypeError, ValueError or AttributeError where the content is no such record.

    Raises:
        BadInput: there is none, or it is something else.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        check(content)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); measure first, or name another --json") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadInput(f"{path}: is no record of {bench}; name another --json") from error
    return content
