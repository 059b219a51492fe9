"""Low-rank adapters that a checkpoint brings along and each request chooses one of (Hu et al. 2021, arXiv:2106.09685).

Tokens of requests with different adapters stand in one batch. Every adapted layer multiplies its input by the down
projections of all adapters at once, sets to zero what belongs to others than the token's own, and adds the up
projections of the rest: the same launches whatever the batch holds, and exactly nothing for a token without adapter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from ..contract.errors import ErrorKind, TriptychError

_PREFIX = "base_model.model."


class Switch:
    """Which adapter each token of the step that is computed takes.

    Attributes:
        gate: [..., T, ranks of all adapters], 1 for the token's own, else 0; None where nothing was said.
    """

    def __init__(self, ranks: Mapping[str, int]) -> None:
        """Args: adapter -> rank; they are numbered from 1 in this order."""
        self.ranks = dict(ranks)
        self.gate: torch.Tensor | None = None
        self._owners = torch.cat(
            [torch.full((rank,), k, dtype=torch.int64) for k, rank in enumerate(ranks.values(), 1)]
        )

    def follow(self, decoder: nn.Module) -> None:
        """Take the decoder's keyword argument ``adapter``, int64 [1, T], in every call: 0 is none."""
        self._owners = self._owners.to(next(decoder.parameters()).device)
        decoder.register_forward_pre_hook(self._choose, with_kwargs=True)

    def _choose(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        chosen = kwargs.pop("adapter")
        self.gate = (chosen[..., None] == self._owners).to(kwargs["inputs_embeds"].dtype)
        return args, kwargs


class AdaptedLinear(nn.Linear):
    """A linear layer with the adapters of one checkpoint; names of weights as `peft` has them."""

    def __init__(self, base: nn.Linear, switch: Switch) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device=base.weight.device)
        self.weight, self.bias = base.weight, base.bias
        make: dict[str, Any] = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A = nn.ModuleDict({name: nn.Linear(base.in_features, r, **make) for name, r in switch.ranks.items()})
        self.lora_B = nn.ModuleDict({name: nn.Linear(r, base.out_features, **make) for name, r in switch.ranks.items()})
        self._switch = switch
        self.down: torch.Tensor | None = None
        self.up: torch.Tensor | None = None

    def stack(self, scales: Mapping[str, float]) -> None:
        """Put the adapters' loaded weights side by side. Args: adapter -> factor on what it adds, in the switch's
        order."""
        down = [self.lora_A.get_submodule(name).get_parameter("weight").data for name in scales]
        up = [self.lora_B.get_submodule(name).get_parameter("weight") * scale for name, scale in scales.items()]
        self.down, self.up = torch.cat(down).detach(), torch.cat(up, dim=1).detach()
        del self.lora_A, self.lora_B

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., T, inputs] -> [..., T, outputs]."""
        if self.down is None or self.up is None or self._switch.gate is None:
            raise RuntimeError("the adapters of this layer are not in place")
        added = F.linear(F.linear(hidden, self.down) * self._switch.gate, self.up)
        return F.linear(hidden, self.weight, self.bias) + added


def adapt(layers: nn.Module, names: frozenset[str], switch: Switch) -> None:
    """Replace linear layers of a decoder by adapted ones. Args: its layers; last part of their names; the switch."""
    for path, module in list(layers.named_modules()):
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in names:
            layers.set_submodule(path, AdaptedLinear(module, switch))


def adapted(layers: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """The adapted layers with their paths."""
    for path, module in layers.named_modules():
        if isinstance(module, AdaptedLinear):
            yield path, module


class AdapterFolder:
    """An adapter in a folder of its own, as `peft` saves it.

    Attributes:
        rank: of all its layers.
        scale: factor on what it adds.
    """

    def __init__(self, folder: Path) -> None:
        """Read adapter_config.json.

        Raises:
            TriptychError: UNSUPPORTED where it is of a kind that is not known here.
        """
        self._folder = folder
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        unusual = [key for key in ("use_dora", "rank_pattern", "alpha_pattern", "use_rslora") if config.get(key)]
        if config.get("bias", "none") != "none":
            unusual.append("bias")
        if unusual:
            raise TriptychError(
                ErrorKind.UNSUPPORTED, f"the adapter {folder} has {', '.join(unusual)}: not supported", "settings.model"
            )
        self.rank = int(config["r"])
        self.scale = float(config["lora_alpha"]) / self.rank

    def load(self, name: str, decoder: nn.Module, prefix: str) -> None:
        """Copy the weights into the decoder's adapted layers.

        Args:
            name: of the adapter.
            decoder: whose layers are adapted.
            prefix: of the decoder's modules in the whole model, such as ``model.``.

        Raises:
            TriptychError: STAGE_FAILED naming weights that are missing or that no layer takes.
        """
        from safetensors.torch import load_file

        found = load_file(self._folder / "adapter_model.safetensors")
        wanted: dict[str, nn.Parameter] = {}
        for path, layer in adapted(decoder):
            for half in ("lora_A", "lora_B"):
                wanted[f"{_PREFIX}{prefix}{path}.{half}.weight"] = getattr(layer, half)[name].weight
        # written by peft the names begin with the model's place in it, cut out of a larger file they do not
        found = {key if key.startswith(_PREFIX) else _PREFIX + key: value for key, value in found.items()}
        if wrong := sorted(wanted.keys() ^ found.keys()):
            names = ", ".join(wrong[:8]) + (f" and {len(wrong) - 8} more" if len(wrong) > 8 else "")
            raise TriptychError(
                ErrorKind.STAGE_FAILED, f"the adapter {self._folder} lacks weights or has others: {names}"
            )
        with torch.no_grad():
            for key, parameter in wanted.items():
                parameter.copy_(found[key])
