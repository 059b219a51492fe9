"""What config.json says of a checkpoint's quantisation; those that cannot be read are refused at start. Torch-free.

The tensors themselves say most: which modules are quantised, into how many bits, in groups of which size. They are
read by :mod:`.quantised`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..contract.errors import ErrorKind, TriptychError

_PARTS = ("thinker_config", "text_config", "language_config", "llm_config", "llm_cfg")
_METHODS = ("fp8", "fbgemm_fp8", "modelopt", "compressed-tensors", "gptq", "awq", "auto-round", "mxfp4", "bitsandbytes")
_COMPRESSED = ("dense", "float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "mixed-precision")


@dataclass(frozen=True)
class Quantisation:
    """How the weights of a checkpoint are stored.

    Attributes:
        method: ``quant_method`` of config.json; for auto-round, whose packing it uses.
        declared: what config.json says.
        block: rows and columns of a weight that share a scale, where config.json says so.
        group_size: inputs that share a scale; 0: all, or config.json does not say.
        zero_offset: what is added to a stored zero point.
    """

    method: str
    declared: str = ""
    block: tuple[int, int] | None = None
    group_size: int = 0
    zero_offset: int = 0

    @staticmethod
    def of(config: Mapping[str, Any]) -> Quantisation | None:
        """The quantisation that a parsed config.json declares; None: none.

        Raises:
            TriptychError: UNSUPPORTED, naming the method or the variant of it.
        """
        found = _declared(config)
        if found is None:
            return None
        method = str(found.get("quant_method") or "")
        if not method and (found.get("load_in_4bit") or found.get("load_in_8bit")):
            method = "bitsandbytes"
        if method not in _METHODS:
            raise _refused(f"quant_method {method!r} is none of {', '.join(_METHODS)}")
        if method == "compressed-tensors":
            _check_compressed(found)
        elif method == "modelopt" and (algorithm := _of_modelopt(found)) != "FP8":
            raise _refused(f"modelopt's quant_algo must be FP8, not {algorithm!r}")
        elif method == "auto-round":
            packing = str(found.get("packing_format") or "auto_round:auto_gptq")
            method = next((name for name in ("awq", "gptq") if name in packing), "")
            if not method:
                raise _refused(f"auto-round's packing_format must be one of gptq or awq, not {packing!r}")
        zero_offset = 0
        if method == "awq":
            if (version := str(found.get("version") or "gemm").lower()) != "gemm":
                raise _refused(f"awq's version must be gemm, not {version!r}")
            if (bits := found.get("bits", found.get("w_bit", 4))) != 4:
                raise _refused(f"awq's bits must be 4, not {bits}")
        elif method == "gptq":
            layout = str(found.get("checkpoint_format") or "gptq")
            if layout not in ("gptq", "gptq_v2"):
                raise _refused(f"gptq's checkpoint_format must be gptq or gptq_v2, not {layout!r}")
            if (bits := found.get("bits", 4)) not in (2, 4, 8):
                raise _refused(f"gptq's bits must be 2, 4 or 8, not {bits}")
            # zero points are stored less one in the first layout
            zero_offset = 1 if layout == "gptq" else 0
        block = found.get("weight_block_size")
        return Quantisation(
            method,
            declared=str(found.get("quant_method") or method),
            block=None if block is None else (int(block[0]), int(block[1])),
            group_size=max(int(found.get("group_size", found.get("q_group_size", 0)) or 0), 0),
            zero_offset=zero_offset,
        )


def _declared(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Of the whole, else of the part that describes the language model."""
    for name in ("quantization_config", "compression_config"):
        if isinstance(found := config.get(name), Mapping):
            return found
    for part in _PARTS:
        if isinstance(inner := config.get(part), Mapping) and (found := _declared(inner)) is not None:
            return found
    return None


def _check_compressed(found: Mapping[str, Any]) -> None:
    """Groups of modules may each have a format of their own."""
    groups = found.get("config_groups") or {}
    for holder in (found, *(group for group in groups.values() if isinstance(group, Mapping))):
        if (name := holder.get("format")) is not None and name not in _COMPRESSED:
            raise _refused(f"compressed-tensors' format must be one of {', '.join(_COMPRESSED)}, not {name!r}")
    if (sparse := (found.get("sparsity_config") or {}).get("format", "dense")) != "dense":
        raise _refused(f"compressed-tensors' sparsity format must be dense, not {sparse!r}")
    if (found.get("transform_config") or {}).get("config_groups"):
        raise _refused("compressed-tensors' transform_config is not supported")


def _of_modelopt(found: Mapping[str, Any]) -> str:
    inner = found.get("quantization")
    return str(found.get("quant_algo") or (inner.get("quant_algo") if isinstance(inner, Mapping) else None) or "")


def _refused(why: str) -> TriptychError:
    return TriptychError(
        ErrorKind.UNSUPPORTED, f"the checkpoint's quantisation cannot be read: {why}", "settings.model"
    )
