"""A multipart body: its fields and files, checked as a JSON body is. Nothing of it is written to a disk."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from triptych.python_models.contract import _check as check
from triptych.python_models.contract.errors import invalid

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

# A body is some fields and a file or a few.
_MAX_PARTS = 64


@dataclass(frozen=True)
class Form:
    """A checked form.

    Attributes:
        fields: name -> texts, in order; ``name[]`` counts as ``name``.
        files: name -> contents.
    """

    fields: Mapping[str, list[str]]
    files: Mapping[str, list[bytes]]

    def text(self, name: str) -> str | None:
        """A field that may be given once; None where it is left out or empty.

        Raises:
            TriptychError: it is given several times.
        """
        found = self.fields.get(name, [])
        if len(found) > 1:
            raise invalid(f"{name} is given {len(found)} times; give it once", name)
        return found[0] if found and found[0] else None

    def file(self, name: str) -> bytes:
        """A file that must be given once.

        Raises:
            TriptychError: it is missing, empty or given several times.
        """
        found = self.files.get(name, [])
        if len(found) != 1:
            what = f"is given {len(found)} times" if found else "is missing"
            raise invalid(f"{name} {what}; send one as a part of the form that has a filename", name)
        if not found[0]:
            raise invalid(f"{name} is empty", name)
        return found[0]

    def number(self, name: str, low: float, high: float) -> float | None:
        """A field that is a number."""
        if (text := self.text(name)) is None:
            return None
        try:
            value = float(text)
        except ValueError:
            raise invalid(f"{name} must be a number, got {text!r}", name) from None
        return check.number(value, name, low, high)

    def integer(self, name: str, low: float, high: float) -> int | None:
        """A field that is an integer."""
        if (text := self.text(name)) is None:
            return None
        if not text.removeprefix("-").isdecimal() or not text.isascii() or len(text) > 20:
            raise invalid(f"{name} must be an integer, got {text!r}", name)
        return check.integer(int(text), name, low, high)

    def boolean(self, name: str) -> bool:
        """A field that is true, or false as where it is left out."""
        text = self.text(name)
        if text is None or text.lower() in ("false", "0"):
            return False
        if text.lower() in ("true", "1"):
            return True
        raise invalid(f"{name} must be true or false, got {text!r}", name)


def parse(body: bytes, content_type: str, fields: Collection[str], files: Collection[str]) -> Form:
    """Read a ``multipart/form-data`` body.

    Args:
        body: the whole of it.
        content_type: the header, with the boundary.
        fields, files: names that are allowed.

    Raises:
        TriptychError: it is none, or has a part that is not allowed.
    """
    _, options = parse_options_header(content_type)
    if not (boundary := options.get(b"boundary")):
        raise invalid("the header Content-Type has no boundary; send the body as multipart/form-data")
    reader = _Reader()
    try:
        parser = MultipartParser(boundary, reader.callbacks())
        parser.write(body)
        parser.finalize()
    except (FormParserError, ValueError) as error:
        raise invalid(f"the request body is not multipart/form-data: {error}") from None
    if not reader.ended:
        raise invalid("the request body is not multipart/form-data: its last boundary is missing")
    texts: dict[str, list[str]] = {}
    contents: dict[str, list[bytes]] = {}
    for name, is_file, data in reader.parts:
        check.known_keys({name: None}, (*fields, *files), "")
        if is_file != (name in files):
            raise invalid(f"{name} must be a {'file' if name in files else 'field'} of the form", name)
        if is_file:
            contents.setdefault(name, []).append(data)
        else:
            texts.setdefault(name, []).append(_decoded(data, name))
    return Form(texts, contents)


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise invalid(f"{name} is not valid UTF-8", name) from None


class _Reader:
    """Collects (name, has a filename, content) of every part."""

    def __init__(self) -> None:
        self.parts: list[tuple[str, bool, bytes]] = []
        self.ended = False
        self._pieces: list[bytes] = []
        self._headers: dict[bytes, bytes] = {}
        self._name = self._value = b""

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_part_data": self._data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        if len(self.parts) == _MAX_PARTS:
            raise invalid(f"the form has more than {_MAX_PARTS} parts")
        self._pieces, self._headers = [], {}

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name = self._value = b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._pieces.append(data[start:end])

    def _part_end(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if b"name" not in options:
            raise invalid("a part of the form has no name")
        name = options[b"name"].decode("utf-8", "replace").removesuffix("[]")
        self.parts.append((name, b"filename" in options, b"".join(self._pieces)))

    def _end(self) -> None:
        self.ended = True
