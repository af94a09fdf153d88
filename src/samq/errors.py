"""Errors that a user can act on. Each carries the exit code that `samq-export` ends with.

The message is one line and names the fix. Everything else that is raised is a bug and keeps its traceback.
"""

from __future__ import annotations


class SamqError(Exception):
    """Base of all errors that are shown as one line, without a traceback."""

    exit_code: int = 1


class UsageError(SamqError):
    """A wrong option, configuration key, value or combination."""

    exit_code = 2


class AccuracyGateMissed(SamqError):
    """The quantized model is less accurate than `--min-relative-miou` asks."""

    exit_code = 3


class SpeedGateMissed(SamqError):
    """The engine is slower than `--min-speedup` asks."""

    exit_code = 4


class MachineLacks(SamqError):
    """This machine has not got what was asked for: a package, a GPU, the network, disk space."""

    exit_code = 5


class BadInput(SamqError):
    """Input data or a checkpoint is missing, unreadable, corrupt or not finite."""

    exit_code = 6
