"""Load one part of a checkpoint, through the class's own ``from_pretrained``, without reading the rest.

``from_pretrained`` knows how a checkpoint's keys map to modules (renames, fused experts, ties). A throw-away subclass
removes the modules of other stages right after construction, which happens on the meta device: their weights become
unexpected keys, and those are never read. Weights go one by one from the mapped files to the stage's device, quantised
ones as what they stand for (see :mod:`.quantised`).
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..contract.errors import ErrorKind, TriptychError
from ..contract.settings import Settings
from . import torchvision_fix
from .checkpoint import Checkpoint
from .files import Tensors, unfit, whole
from .quantised import open_tensors
from .weights import strangers

logger = logging.getLogger(__name__)


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
        TriptychError: STAGE_FAILED naming weights that are missing or of another shape, MODEL_NOT_FOUND where there are
            no weight files, UNSUPPORTED for a quantisation that cannot be read.
    """
    if dummy:
        return _random_part(cls, config, keep, device, dtype)
    try:
        model, info = _loading_class(cls, keep, folder, device, dtype).from_pretrained(
            folder,
            config=_plain(config),
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    except TriptychError:
        raise
    except OSError as error:
        raise TriptychError(
            ErrorKind.MODEL_NOT_FOUND, f"the weights of {folder} cannot be loaded: {error}", "settings.model"
        ) from None
    except Exception as error:
        raise TriptychError(
            ErrorKind.STAGE_FAILED, f"the {part} of {folder} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    if info["mismatched_keys"]:
        found = [f"{name} is {list(has)}, not {list(wants)}" for name, has, wants in sorted(info["mismatched_keys"])]
        raise unfit(folder, f"has weights of another shape than the {part}'s", found)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    missing = {name for name, tensor in tensors if tensor.device.type == "meta"} | set(info["missing_keys"])
    if missing:
        raise unfit(folder, f"lacks weights of the {part}", missing)
    return model.eval().requires_grad_(False).to(device)


def warn_of_strangers(cls: Any, config: Any, folder: Path) -> None:
    """Log a warning that names the tensors of a checkpoint which no stage of the model reads.

    Args: as `load_part`; of a quantised checkpoint, the names are those of plain weights.
    """
    names = strangers(meta_model(cls, config), open_tensors(folder, "cpu", torch.float32).keys())
    if not names:
        return
    kinds = sorted({re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names})
    shown = ", ".join(kinds[:8]) + (f" and {len(kinds) - 8} more" if len(kinds) > 8 else "")
    logger.warning("the checkpoint %s has %d weights that no stage reads: %s", folder, len(names), shown)


def _plain(config: Any) -> Any:
    """A copy of a configuration that says nothing of quantisation: the weights that are loaded are plain."""
    copied = copy.deepcopy(config)
    for part in (copied, *(getattr(copied, name, None) for name in getattr(copied, "sub_configs", ()))):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    return copied


class _Unread:
    """A tensor that is read when all of it is asked for, as transformers does with slices of safetensors."""

    def __init__(self, files: Tensors, key: str) -> None:
        self._files, self._key = files, key

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._files.read(self._key, whole(self._files.shape(self._key)))


def _loading_class(
    cls: Any, keep: Callable[[Any], Sequence[str]], folder: Path, device: str, dtype: torch.dtype
) -> Any:
    files = open_tensors(folder, device, dtype)

    class Loading(_partial_class(cls, keep)):  # type: ignore[misc]
        @staticmethod
        def _load_pretrained_model(
            model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None
        ) -> Any:
            # from_pretrained itself takes a device only where accelerate is installed
            placed = replace(load_config, device_map={"": torch.device(device)})
            unread = {key: _Unread(files, key) for key in files.keys()}  # noqa: SIM118 - it is no dictionary
            # Of expected keys, memory would be reserved in one block; what fused layers leave of it could not be freed.
            info, rest = cls._load_pretrained_model(model, unread, None, placed, expected_keys=[])
            if info.conversion_errors:
                # a traceback, the message of the error, and a line about the conversion
                why = [f"{name} ({text.splitlines()[-2:][0]})" for name, text in info.conversion_errors.items()]
                raise unfit(folder, "has weights that cannot be put together", why)
            return info, rest

    return _named_as(Loading, cls)


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

    return _named_as(Partial, cls)


def _named_as(derived: Any, cls: Any) -> Any:
    # transformers looks up key conversions by class name, and skips them for classes from elsewhere.
    derived.__name__, derived.__qualname__, derived.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    return derived


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
