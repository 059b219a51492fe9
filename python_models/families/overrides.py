"""``json_model_override_args``: values of config.json that an operator replaces, in every stage alike. Torch-free."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from ..contract.errors import TriptychError, invalid

_WHERE = "settings.json_model_override_args"


def parse(text: str) -> dict[str, Any]:
    """The option's value; "" is none.

    Raises:
        TriptychError: INVALID_REQUEST for what is no JSON object.
    """
    try:
        given = json.loads(text) if text else {}
    except ValueError as error:
        raise invalid(f"json_model_override_args is not JSON: {error}", _WHERE) from None
    if not isinstance(given, dict):
        raise invalid(f"json_model_override_args must be a JSON object, not {text}", _WHERE)
    return given


def merged(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A config with values replaced; objects in both are merged key by key."""
    out = dict(config)
    for key, value in overrides.items():
        old = out.get(key)
        out[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return out


def apply(config: Any, overrides: Mapping[str, Any], raw: Mapping[str, Any]) -> None:
    """Replace values of a configuration object of transformers, in place.

    Args:
        config: the object.
        overrides: as parsed.
        raw: config.json as it is on disk: a published format may be translated, so a key that only it has is done.

    Raises:
        TriptychError: INVALID_REQUEST naming a key that neither has, and the nearest one there is.
    """
    for path, value in _leaves(overrides):
        owner, in_raw = config, _has(raw, path)
        for key in path[:-1]:
            owner = owner.get(key) if isinstance(owner, dict) else getattr(owner, key, None)
        if isinstance(owner, dict) and path[-1] in owner:
            owner[path[-1]] = value
        elif owner is not None and not isinstance(owner, dict) and hasattr(owner, path[-1]):
            setattr(owner, path[-1], value)
        elif not in_raw:
            raise _unknown(path, owner, raw)


def _leaves(overrides: Mapping[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in overrides.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*before, key))
        else:
            yield (*before, key), value


def _has(raw: Any, path: tuple[str, ...]) -> bool:
    for key in path:
        if not isinstance(raw, dict) or key not in raw:
            return False
        raw = raw[key]
    return True


def _unknown(path: tuple[str, ...], owner: Any, raw: Mapping[str, Any]) -> TriptychError:
    known = set(owner if isinstance(owner, dict) else getattr(owner, "__dict__", ())) | (
        set(raw) if len(path) == 1 else set()
    )
    near = difflib.get_close_matches(path[-1], sorted(str(key) for key in known), 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return invalid(f"json_model_override_args: the model's config has no {'.'.join(path)!r}{hint}", _WHERE)
