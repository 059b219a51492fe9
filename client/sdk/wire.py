"""The contract's dataclasses as gRPC messages of the KServe v2 protocol, for the SDK and the OpenAI shim alike.

Raw protobuf rather than tritonclient's high-level classes: the asynchronous one of those drops the parameter that asks
for an empty final response, and both copy every blob once more.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tritonclient.grpc import service_pb2 as pb

from triptych.python_models.contract.delta import Delta
from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.request import ChatRequest
from triptych.python_models.contract.settings import Settings
from triptych.python_models.contract.tensors import (
    ABOUT,
    CANCEL,
    CHAT,
    CHAT_TEXT,
    DELTA,
    DETOKENIZE,
    FLUSH,
    INPUT_IDS,
    MEDIA,
    PREPROCESS,
    RENEW,
    REQUEST,
    STRING,
    TEXT,
    TOKEN_STRINGS,
    TOKENS_ONLY,
    TensorSpec,
)

# The server is often on the loopback interface, where a proxy of the environment would be in the way.
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),
)

_LENGTH = struct.Struct("<I")


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


def tokens_message(request_id: str, request: ChatRequest, media: Sequence[bytes]) -> Any:
    """A ``ModelInferRequest`` for the token ids of a request, which nothing is generated for; see :func:`ids_of`."""
    message = _message(PREPROCESS.name, request_id)
    _add_strings(message, REQUEST, [request.to_json().encode()])
    if media:
        _add_strings(message, MEDIA, media)
    _add_raw(message, TOKENS_ONLY, "BOOL", 1, b"\x01")
    return message


def spell_message(ids: Sequence[int], request_id: str = "") -> Any:
    """A ``ModelInferRequest`` for the text of token ids; see :func:`spelling_of`."""
    message = _message(PREPROCESS.name, request_id)
    _add_raw(message, DETOKENIZE, "INT32", len(ids), struct.pack(f"<{len(ids)}i", *ids))
    return message


def flush_message(stage: str) -> Any:
    """A ``ModelInferRequest`` that empties the caches of a stage."""
    message = _message(stage, "")
    _add_raw(message, FLUSH, "BOOL", 1, b"\x01")
    return message


@dataclass(frozen=True)
class Spelling:
    """What preprocess says of token ids and of its checkpoint.

    Attributes:
        text: of the ids.
        strings: the vocabulary's spelling of each.
        about: context_length, model_type, architectures, modalities.
    """

    text: str
    strings: tuple[str, ...]
    about: Mapping[str, Any]


def ids_of(response: Any) -> tuple[int, ...]:
    """Token ids in the answer to :func:`tokens_message`."""
    return _integers(_outputs(response)[INPUT_IDS.name])


def spelling_of(response: Any) -> Spelling:
    """The answer to :func:`spell_message`."""
    found = _outputs(response)
    (text,), (about,) = _strings(found[TEXT.name]), _strings(found[ABOUT.name])
    strings = _strings(found[TOKEN_STRINGS.name])
    return Spelling(text.decode(), tuple(item.decode() for item in strings), json.loads(about))


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
    found = _outputs(response)
    try:
        return Delta.from_tensors({name: decode(found[name]) for name, decode in _DECODERS})
    except KeyError:
        missing = ", ".join(name for name, _ in _DECODERS if name not in found)
        raise TriptychError(
            ErrorKind.STAGE_FAILED, f"the server's answer lacks {missing}", stage="language_model"
        ) from None


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


def _add_raw(message: Any, spec: TensorSpec, datatype: str, count: int, raw: bytes) -> None:
    message.inputs.add(name=spec.name, datatype=datatype, shape=[count])
    message.raw_input_contents.append(raw)


def _outputs(response: Any) -> dict[str, bytes]:
    return {output.name: raw for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)}


def _strings(raw: bytes) -> list[bytes]:
    """The elements of a STRING tensor."""
    found, start = [], 0
    while start < len(raw):
        (size,) = _LENGTH.unpack_from(raw, start)
        start += _LENGTH.size
        found.append(raw[start : start + size])
        start += size
    return found


def _string(raw: bytes) -> list[bytes]:
    """The one element of a STRING tensor."""
    return [raw[_LENGTH.size :]]


def _integers(raw: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(raw) // 4}i", raw)


# once per message of every stream, so no numpy on the way
_DECODERS = tuple((spec.name, _string if spec.dtype == STRING else _integers) for spec in DELTA)
