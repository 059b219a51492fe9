"""Small helpers to turn JSON into dataclasses with errors that name the field and what is allowed."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import invalid


def mapping(value: Any, param: str) -> Mapping[str, Any]:
    """``value`` if it is a JSON object, else a 400."""
    if not isinstance(value, Mapping):
        raise invalid(f"{param} must be an object, not {json_type(value)}", param)
    return value


def known_keys(value: Mapping[str, Any], allowed: Iterable[str], param: str) -> None:
    """Refuse a key that is not in ``allowed``, naming the nearest one that is."""
    names = sorted(allowed)
    for key in value:
        if key not in names:
            where = f"{param}.{key}" if param else str(key)
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; allowed: {', '.join(names)}"
            raise invalid(f"unknown field {where!r}{hint}", where)


def number(value: Any, param: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number within [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise invalid(f"{param} must be a number, not {json_type(value)}", param)
    # An integer may be too large for a float, which isfinite() and the "g" format cannot take.
    if isinstance(value, float) and not math.isfinite(value):
        raise invalid(f"{param} must be a finite number, got {value}", param)
    if not low <= value <= high:
        raise invalid(f"{param} must be {_range(low, high)}, got {_plain(value)}", param)
    return float(value)


def integer(value: Any, param: str, low: float = -math.inf, high: float = math.inf) -> int:
    """An integer within [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise invalid(f"{param} must be an integer, not {json_type(value)}", param)
    if not low <= value <= high:
        raise invalid(f"{param} must be {_range(low, high)}, got {value}", param)
    return value


def boolean(value: Any, param: str) -> bool:
    """A JSON true or false."""
    if not isinstance(value, bool):
        raise invalid(f"{param} must be true or false, not {json_type(value)}", param)
    return value


def string(value: Any, param: str) -> str:
    """A JSON string."""
    if not isinstance(value, str):
        raise invalid(f"{param} must be a string, not {json_type(value)}", param)
    return value


def json_type(value: Any) -> str:
    """The JSON name of a Python value's type."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, Mapping):
        return "an object"
    return "a list" if isinstance(value, (list, tuple)) else type(value).__name__


def _range(low: float, high: float) -> str:
    if math.isinf(high):
        return f"at least {_plain(low)}"
    if math.isinf(low):
        return f"at most {_plain(high)}"
    return f"between {_plain(low)} and {_plain(high)}"


def _plain(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"
