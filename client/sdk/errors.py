"""Failed gRPC calls as errors of this system."""

from __future__ import annotations

import grpc

from triptych.python_models.contract.errors import ErrorKind, TriptychError


def rpc_error(error: grpc.RpcError) -> TriptychError:
    """What a failed gRPC call means to the caller."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return TriptychError(ErrorKind.TIMEOUT, "the Triton server did not answer in time")
    if code is grpc.StatusCode.UNAVAILABLE:
        parsed = TriptychError.from_wire(details)
        if parsed.kind is not ErrorKind.STAGE_FAILED:
            return parsed
        return TriptychError(ErrorKind.STAGE_DEAD, f"the Triton server cannot be reached: {details}")
    if code is grpc.StatusCode.CANCELLED:
        return TriptychError(ErrorKind.CANCELLED, "the request was cancelled")
    return TriptychError.from_wire(details)
