"""Errors as Triton tells them to clients."""

from __future__ import annotations

from typing import Any

import triton_python_backend_utils as pb_utils

from samq.errors import MachineLacks, SamqError
from samq.tools.triton.served.store import UnknownHandle


def refusal(model: str, error: Exception) -> Any:
    """The response to a request that failed.

    Only samq's own messages reach the client; others may say too much, and go to the server's log.
    """
    if isinstance(error, SamqError):
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), _code(error)))
    pb_utils.Logger.log_error(f"{model}: {error!r}")
    hidden = pb_utils.TritonError(f"{model} failed; the server's log says why", pb_utils.TritonError.INTERNAL)
    return pb_utils.InferenceResponse(error=hidden)


def _code(error: SamqError) -> Any:
    if isinstance(error, UnknownHandle):
        return pb_utils.TritonError.NOT_FOUND
    return pb_utils.TritonError.UNAVAILABLE if isinstance(error, MachineLacks) else pb_utils.TritonError.INVALID_ARG
