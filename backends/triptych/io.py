"""Triton tensors <-> what stages take and give, by the specs of the contract."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray
from torch.utils.dlpack import from_dlpack

from triptych.python_models.contract.errors import ErrorKind, TriptychError, invalid
from triptych.python_models.contract.tensors import EMBEDDING, STRING, StageSpec, TensorSpec

_NUMPY = {
    "TYPE_UINT8": np.dtype(np.uint8),
    "TYPE_INT32": np.dtype(np.int32),
    "TYPE_UINT32": np.dtype(np.uint32),
    "TYPE_BOOL": np.dtype(np.bool_),
    "TYPE_FP32": np.dtype(np.float32),
}
_TORCH = {"TYPE_FP32": torch.float32, "TYPE_BF16": torch.bfloat16, "TYPE_FP16": torch.float16}


def read_inputs(request: Any, spec: StageSpec) -> dict[str, Any]:
    """The input tensors that are present, in memory of our own: the server takes its buffers back after ``execute``.

    STRING becomes list[bytes]; tensors that may live on the GPU become torch tensors where they are; others numpy.

    Raises:
        TriptychError: INVALID_REQUEST for a tensor that cannot be read.
    """
    inputs: dict[str, Any] = {}
    for tensor_spec in spec.inputs:
        tensor = pb_utils.get_input_tensor_by_name(request, tensor_spec.name)
        if tensor is None:
            continue
        try:
            inputs[tensor_spec.name] = _read(tensor, tensor_spec)
        except Exception as error:
            raise invalid(f"input {tensor_spec.name} cannot be read: {error}", tensor_spec.name) from error
    return inputs


def make_outputs(tensors: Mapping[str, Any], spec: StageSpec, dtypes: Mapping[str, str]) -> list[Any]:
    """What a stage sends -> Triton tensors.

    Args:
        tensors: STRING as sequences of str or bytes, others as numpy arrays or torch tensors.
        spec: the stage.
        dtypes: {output: config.pbtxt dtype} of this deployment, which resolves EMBEDDING.

    Raises:
        TriptychError: STAGE_FAILED for a tensor that the spec does not allow: a bug of the stage.
    """
    specs = {item.name: item for item in spec.outputs}
    outputs = []
    for name, value in tensors.items():
        if name not in specs:
            raise _bug(f"it sent {name!r}; its outputs are {', '.join(specs)}")
        outputs.append(_write(value, specs[name], dtypes[name]))
    return outputs


def _read(tensor: Any, spec: TensorSpec) -> Any:
    if spec.dtype == STRING:
        return tensor.as_numpy().reshape(-1).tolist()
    if not spec.device_ok:
        # as_numpy() has copied out of shared memory already
        return tensor.as_numpy() if tensor.is_cpu() else from_dlpack(tensor).cpu().numpy()
    # BF16 has no numpy type, so as_numpy() raises on it
    copy = from_dlpack(tensor).clone()
    if copy.is_cuda:
        # the copy must be done before the server may reuse the buffer
        torch.cuda.current_stream(copy.device).synchronize()
    return copy


def _write(value: Any, spec: TensorSpec, dtype: str) -> Any:
    if spec.dtype == STRING:
        return pb_utils.Tensor(spec.name, _strings(value, spec))
    if isinstance(value, torch.Tensor):
        value = value.detach()
    if not isinstance(value, (np.ndarray, torch.Tensor)):
        raise _bug(f"{spec.name} is a {type(value).__name__}, not an array")
    _check_shape(tuple(value.shape), spec)
    if spec.dtype == EMBEDDING:
        rows = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        if not rows.is_floating_point():
            raise _bug(f"{spec.name} has dtype {rows.dtype}, which is no floating-point type")
        return pb_utils.Tensor.from_dlpack(spec.name, rows.to(_TORCH[dtype]).contiguous())
    if isinstance(value, torch.Tensor):
        value = value.cpu().numpy()
    if value.dtype != _NUMPY[dtype]:
        raise _bug(f"{spec.name} has dtype {value.dtype}, not {_NUMPY[dtype]}")
    return pb_utils.Tensor(spec.name, np.ascontiguousarray(value))


def _strings(value: Any, spec: TensorSpec) -> NDArray[np.object_]:
    if isinstance(value, (str, bytes)):
        raise _bug(f"{spec.name} is a bare string, not a list of strings")
    # filled one by one: numpy would cut NUL bytes off, or make a matrix of equal lengths
    items = [item.encode("utf-8", "replace") if isinstance(item, str) else bytes(item) for item in value]
    array = np.empty((len(items),), dtype=np.object_)
    for position, item in enumerate(items):
        array[position] = item
    _check_shape(array.shape, spec)
    return array


def _check_shape(shape: tuple[int, ...], spec: TensorSpec) -> None:
    if len(shape) != len(spec.dims) or any(want not in (-1, have) for want, have in zip(spec.dims, shape, strict=True)):
        raise _bug(f"{spec.name} has shape {list(shape)}, not {list(spec.dims)}")


def _bug(message: str) -> TriptychError:
    return TriptychError(ErrorKind.STAGE_FAILED, f"the stage gave a wrong answer: {message}")
