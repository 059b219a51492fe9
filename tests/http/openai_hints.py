"""The fields that a release of the openai package knows, read from its own type hints."""

from __future__ import annotations

import typing
from collections.abc import Collection, Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from typing_extensions import (
    NotRequired,
    Required,
    get_type_hints,
    is_typeddict,
)

# Names of models: any string is one.
_NO_LITERALS = ("model",)


def fields_of(kind: Any, stop: Collection[str] = ()) -> list[str]:
    """Dotted path of every field of a request's TypedDict, and ``path=value`` of every word that one may hold.

    Members of a list are written ``[]``, members of a union by what sets them apart (``messages[].user.content``).
    A kind of object is walked once, where it occurs first.

    Args:
        kind: the TypedDict.
        stop: paths not to look into.
    """
    return list(dict.fromkeys(_walk(kind, "", stop, set())))


def _walk(kind: Any, path: str, stop: Collection[str], seen: set[Any]) -> Iterator[str]:
    if path in stop:
        return
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Required, NotRequired, Annotated):
        yield from _walk(inner[0], path, stop, seen)
    elif origin is Literal:
        if path.rpartition(".")[2] not in _NO_LITERALS:
            yield from (f"{path}={value}" for value in inner)
    elif is_typeddict(kind):
        if kind in seen:
            return
        seen.add(kind)
        for name, hint in get_type_hints(kind, include_extras=True).items():
            field = f"{path}.{name}" if path else name
            yield field
            yield from _walk(hint, field, stop, seen)
    elif origin is typing.Union:
        for item in inner:
            mark = _mark(item)
            if mark and sum(is_typeddict(other) for other in inner) > 1:
                where = f"{path}.{mark}"
                yield where
                yield from _walk(item, where, stop, seen)
            else:
                yield from _walk(item, path, stop, seen)
    elif origin is dict:
        return
    elif inner:
        for item in inner:
            yield from _walk(item, f"{path}[]", stop, seen)


def _mark(kind: Any) -> str:
    """What sets an object apart from others in its place: its role or type, else its name."""
    if not is_typeddict(kind):
        return ""
    hints = get_type_hints(kind, include_extras=True)
    for name in ("role", "type"):
        hint = hints.get(name)
        while get_origin(hint) in (Required, NotRequired, typing.Union, Annotated):
            hint = get_args(hint)[0]
        if get_origin(hint) is Literal and len(get_args(hint)) == 1:
            return str(get_args(hint)[0])
    return str(kind.__name__)


def answer_fields(
    model: type[BaseModel], path: str = "", seen: frozenset[Any] = frozenset()
) -> Iterator[tuple[str, bool]]:
    """(dotted path, whether it must be there) of every field of an answer."""
    for name, field in model.model_fields.items():
        where = f"{path}.{name}" if path else name
        yield where, field.is_required()
        for inner in _models(field.annotation):
            if inner not in seen:
                yield from answer_fields(inner, where, seen | {inner})


def _models(kind: Any) -> Iterator[type[BaseModel]]:
    if isinstance(kind, type) and not get_args(kind) and issubclass(kind, BaseModel):
        yield kind
    for item in get_args(kind):
        yield from _models(item)
