"""Make a CUDA-built torchvision wheel importable beside a CPU torch.

The package registry's default torchvision wheel is built for CUDA; beside a CPU torch its compiled extension cannot be
loaded, and ``import torchvision`` (which transformers' video processors need) dies with "operator torchvision::nms
does not exist" where it registers fake kernels for two of its operators. Declaring the schemas of those two before
the import is enough: the transforms that processors use are plain torch code.
"""

from __future__ import annotations

import sys
import threading

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_lock = threading.Lock()
_done = False
# A Library takes its schemas back when it is garbage collected.
_library: torch.library.Library | None = None


def install() -> None:
    """Import torchvision, with the two schemas declared where its extension does not load.

    Call before the first import of transformers. Does nothing the second time, where torchvision is absent, or where
    it imports as it is.

    Raises:
        RuntimeError: torchvision fails to import for another reason.
    """
    global _done, _library
    with _lock:
        if _done:
            return
        try:
            import torchvision
        except ModuleNotFoundError:
            pass
        except RuntimeError as error:
            if "torchvision::" not in str(error):
                raise
            for name in [n for n in sys.modules if n == "torchvision" or n.startswith("torchvision.")]:
                del sys.modules[name]
            _library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
            for schema in _SCHEMAS:
                _library.define(schema)  # type: ignore[no-untyped-call]
            import torchvision  # noqa: F401
        _done = True
