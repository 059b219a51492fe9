"""The contract's dataclasses as gRPC messages of the KServe v2 protocol, for the SDK and the OpenAI shim alike.

Raw protobuf rather than tritonclient's high-level classes: the asynchronous one of those drops the parameter that asks
for an empty final response, and both copy every blob once more.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2 as pb

from triptych.python_models.contract.delta import Delta
from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.request import ChatRequest
from triptych.python_models.contract.settings import Settings
from triptych.python_models.contract.tensors import CANCEL, CHAT, CHAT_TEXT, DELTA, MEDIA, RENEW, REQUEST, TensorSpec

# The server is often on the loopback interface, where a proxy of the environment would be in the way.
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),
)

_LENGTH = struct.Struct("<I")
_NUMPY: dict[str, np.dtype[Any]] = {
    "TYPE_INT32": np.dtype("<i4"),
    "TYPE_FP32": np.dtype("<f4"),
    "TYPE_UINT8": np.dtype("u1"),
}


def target(url: str) -> str:
    """``host:port`` of a gRPC address that may carry a scheme."""
    return url.split("://", 1)[-1].rstrip("/")


def ensemble_for(request: ChatRequest) -> str:
    """The ensemble that serves a request: the one without encoder steps where there is nothing to encode."""
    return CHAT.name if next(request.media(), None) else CHAT_TEXT.name


def chat_message(request_id: str, request: ChatRequest, media: Sequence[bytes]) -> Any:
    """A ``ModelInferRequest`` to the right ensemble.

    Args:
        request_id: unique among running requests; the ensemble copies it to each step, ``cancel`` and ``renew``
            name requests by it.
        request: what to answer.
        media: encoded media that the request's parts refer to by index.
    """
    message = _message(ensemble_for(request), request_id)
    _add_strings(message, REQUEST, [request.to_json().encode()])
    if media:
        _add_strings(message, MEDIA, media)
    return message


def control_message(stage: str, *, cancel: Sequence[str] = (), renew: Sequence[str] = ()) -> Any:
    """A ``ModelInferRequest`` that controls a stage; with no ids at all it is the probe of a living stage."""
    message = _message(stage, "")
    if cancel or not renew:
        _add_strings(message, CANCEL, [item.encode() for item in cancel])
    if renew:
        _add_strings(message, RENEW, [item.encode() for item in renew])
    return message


def response_of(answer: Any) -> Any:
    """The ``ModelInferResponse`` in a ``ModelStreamInferResponse``.

    Raises:
        TriptychError: what the server or a stage reported instead.
    """
    if answer.error_message:
        raise TriptychError.from_wire(answer.error_message)
    return answer.infer_response


def delta_of(response: Any) -> Delta | None:
    """The delta in a ``ModelInferResponse``; None for the empty one that only says "final"."""
    if not response.outputs:
        return None
    found = {output.name: raw for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)}
    missing = [spec.name for spec in DELTA if spec.name not in found]
    if missing:
        raise TriptychError(
            ErrorKind.STAGE_FAILED, f"the server's answer lacks {', '.join(missing)}", stage="language_model"
        )
    return Delta.from_tensors({spec.name: _decode(spec, found[spec.name]) for spec in DELTA})


def settings_of(config_response: Any) -> Settings:
    """The deployment's settings, from the ``ModelConfigResponse`` of any stage.

    Raises:
        TriptychError: where the model carries none, so that it is no stage of this system.
    """
    parameters = config_response.config.parameters
    if "settings" not in parameters:
        raise TriptychError(
            ErrorKind.STAGE_FAILED,
            f"model {config_response.config.name!r} of the server has no parameter 'settings', so it is not a stage of "
            "this system; serve a model repository that `triptych serve` wrote",
        )
    return Settings.from_json(parameters["settings"].string_value)


def _message(model: str, request_id: str) -> Any:
    message = pb.ModelInferRequest(model_name=model, id=request_id)
    message.parameters["triton_enable_empty_final_response"].bool_param = True
    return message


def _add_strings(message: Any, spec: TensorSpec, values: Sequence[bytes]) -> None:
    message.inputs.add(name=spec.name, datatype="BYTES", shape=[len(values)])
    pieces: list[bytes] = []
    for value in values:
        pieces += (_LENGTH.pack(len(value)), value)
    message.raw_input_contents.append(b"".join(pieces))


def _decode(spec: TensorSpec, raw: bytes) -> Any:
    return list(_strings(raw)) if spec.dtype == "TYPE_STRING" else np.frombuffer(raw, _NUMPY[spec.dtype])


def _strings(raw: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(raw):
        (length,) = _LENGTH.unpack_from(raw, at)
        at += _LENGTH.size
        yield raw[at : at + length]
        at += length
