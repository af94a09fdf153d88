"""How much memory this process holds, as Linux counts it; None on other systems.

The peak is `VmHWM` of /proc/self/status: the most that was resident at once since the mark was last set back, shared
libraries included. Processes that samq starts, and a GPU's memory, are not in it.
"""

from __future__ import annotations

import re
from pathlib import Path

_STATUS, _MARKS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): sets VmHWM to what is resident now


def reset_peak() -> bool:
    """Set the mark of the peak back; False where the system does not allow it."""
    try:
        _MARKS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def peak_bytes() -> int | None:
    """The most bytes that were resident since `reset_peak`, or since the process began."""
    return _field("VmHWM")


def resident_bytes() -> int | None:
    """Bytes that are resident now."""
    return _field("VmRSS")


def _field(name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else int(found[1]) << 10
