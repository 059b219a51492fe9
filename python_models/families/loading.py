"""Load one part of a checkpoint, through the class's own ``from_pretrained``, without reading the rest.

``from_pretrained`` knows how a checkpoint's keys map to modules (renames, fused experts, ties). A throw-away subclass
removes the modules of other stages right after construction, which happens on the meta device: their weights become
unexpected keys, and those are never read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..contract.errors import ErrorKind, TriptychError
from ..contract.settings import Settings
from . import torchvision_fix
from .checkpoint import Checkpoint


class Absent(nn.Module):
    """Stands for a module that belongs to another stage: fails loudly when it is called.

    It keeps the plain attributes (numbers, config) of the module it replaces, because others read them.
    """

    def __init__(self, path: str, original: nn.Module) -> None:
        super().__init__()
        self.path = path
        for name, value in vars(original).items():
            if name == "config" or (not name.startswith("_") and isinstance(value, (int, float, str, tuple, list))):
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Always raises."""
        raise RuntimeError(f"module {self.path} is not part of this stage")


def stage_dtype(checkpoint: Checkpoint, settings: Settings, device: str) -> torch.dtype:
    """The dtype a stage on ``device`` computes in (see :meth:`Checkpoint.dtype_for`)."""
    name = checkpoint.dtype_for(settings, gpu=torch.device(device).type == "cuda")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def model_class(name: str) -> Any:
    """A model, processor or config class of transformers, imported so that torchvision cannot break it."""
    torchvision_fix.install()
    import transformers

    return getattr(transformers, name)


def meta_model(cls: Any, config: Any) -> Any:
    """The model of a configuration without any weights: for what needs no more than that."""
    with torch.device("meta"):
        return cls(config).eval()


def load_part(
    cls: Any,
    config: Any,
    folder: Path,
    keep: Callable[[Any], Sequence[str]],
    *,
    part: str,
    device: str,
    dtype: torch.dtype,
    dummy: bool = False,
) -> Any:
    """A model with only some of its modules, on ``device`` in ``dtype``, in evaluation mode.

    Args:
        cls: the model class, of transformers or derived from one.
        config: its configuration.
        folder: the checkpoint.
        keep: (model on the meta device) -> dotted paths of the modules to load; others with weights are left out.
        part: what is loaded, for messages.
        device: torch device.
        dtype: of the weights.
        dummy: draw random weights instead of reading the files.

    Raises:
        TriptychError: STAGE_FAILED naming weights that are missing, MODEL_NOT_FOUND where there are no weight files.
    """
    if dummy:
        return _random_part(cls, config, keep, device, dtype)
    try:
        model, info = _partial_class(cls, keep).from_pretrained(
            folder, config=config, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except OSError as error:
        raise TriptychError(
            ErrorKind.MODEL_NOT_FOUND, f"the weights of {folder} cannot be loaded: {error}", "settings.model"
        ) from None
    except Exception as error:
        raise TriptychError(
            ErrorKind.STAGE_FAILED, f"the {part} of {folder} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    tensors = [*model.named_parameters(), *model.named_buffers()]
    missing = {name for name, tensor in tensors if tensor.device.type == "meta"} | set(info["missing_keys"])
    if missing:
        names = sorted(missing)
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise TriptychError(
            ErrorKind.STAGE_FAILED, f"the checkpoint {folder} lacks weights of the {part}: {shown}", "settings.model"
        )
    return model.eval().requires_grad_(False).to(device)


def outline(cls: Any, config: Any, keep: Callable[[Any], Sequence[str]], dtype: torch.dtype) -> Any:
    """The model that `load_part` would load, without its weights: on the meta device, but for rotary frequencies.

    Args: as `load_part`.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = _partial_class(cls, keep)(_of_dtype(config, dtype))
    finally:
        torch.set_default_dtype(before)
    for path, module in list(model.named_modules()):
        # no checkpoint stores these buffers, of which there may be one for each type of layer
        if any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False)):
            model.set_submodule(path, type(module)(module.config))
    return model.eval().requires_grad_(False)


def _random_part(cls: Any, config: Any, keep: Callable[[Any], Sequence[str]], device: str, dtype: torch.dtype) -> Any:
    """As `load_part`, with random weights drawn on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # the constructor also computes what no checkpoint stores, such as the frequencies of rotary embeddings
        with torch.device(device):
            model = _partial_class(cls, keep)(_of_dtype(config, dtype))
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def _of_dtype(config: Any, dtype: torch.dtype) -> Any:
    """A copy of a configuration whose parts name another dtype; models make their parts by it."""
    copied = copy.deepcopy(config)

    def put(part: Any) -> None:
        part.dtype = dtype
        for name in getattr(part, "sub_configs", ()):
            if (sub := getattr(part, name, None)) is not None:
                put(sub)

    put(copied)
    return copied


def _partial_class(cls: Any, keep: Callable[[Any], Sequence[str]]) -> Any:
    class Partial(cls):  # type: ignore[misc]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            paths = _others(self, keep(self))
            for path in paths:
                parent, _, leaf = path.rpartition(".")
                owner = self.get_submodule(parent)
                setattr(owner, leaf, Absent(path, getattr(owner, leaf)))
            _forget_ties(self, tuple(f"{path}." for path in paths))
            # All weights of this part are checked by name below; what is left over belongs to other stages.
            self._keys_to_ignore_on_load_unexpected = {".*"}

    # transformers looks up key conversions by class name, and skips them for classes from elsewhere.
    Partial.__name__, Partial.__qualname__, Partial.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    return Partial


def _others(model: nn.Module, keep: Sequence[str]) -> list[str]:
    """Paths of the largest modules that have weights and hold nothing of what is kept."""
    found: list[str] = []

    def walk(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            path = prefix + name
            if path in keep:
                continue
            if any(kept.startswith(f"{path}.") for kept in keep):
                walk(child, f"{path}.")
            elif next(child.parameters(), None) is not None:
                found.append(path)

    for path in keep:
        # Raises where there is no such module.
        model.get_submodule(path)
    walk(model, "")
    return found


def _forget_ties(model: Any, gone: tuple[str, ...]) -> None:
    """Drop weight ties that point into removed modules."""
    for module in model.modules():
        if ties := getattr(module, "all_tied_weights_keys", None):
            module.all_tied_weights_keys = {
                key: value for key, value in ties.items() if not (key.startswith(gone) or value.startswith(gone))
            }
