"""Multipart forms, read whole and in memory, with every part as it was sent."""

from __future__ import annotations

from dataclasses import dataclass, field

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from transfusion.errors import shown
from transfusion.serve.errors import ApiError, MediaTypeError

# More than any client of ours sends.
_MOST_PARTS, _MOST_HEADERS = 64, 8


@dataclass(slots=True)
class FormPart:
    """A field of a form.

    Attributes:
        name: Of the field.
        is_file: Whether it has a file name.
        data: What was sent.
    """

    name: str = ""
    is_file: bool = False
    data: bytearray = field(default_factory=bytearray)


def read_form(content_type: str, body: bytes) -> list[FormPart]:
    """The parts of a form.

    Raises:
        ApiError: For what is no form, is cut off, or has too many parts.
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind.lower() != b"multipart/form-data":
        raise MediaTypeError("the body must be multipart/form-data, with the image as a file")
    if not boundary:
        raise ApiError("the form cannot be read: it has no boundary; let the client make the form")
    reader = _Reader()
    parser = MultipartParser(boundary, reader.callbacks())  # type: ignore[arg-type]
    try:
        parser.write(body)
        parser.finalize()
    except (MultipartParseError, ValueError) as error:
        raise ApiError(f"the form cannot be read: {shown(error)}; let the client make the form") from None
    if not reader.has_ended:
        raise ApiError("the form is cut off: its last boundary is missing; send it again")
    return reader.parts


class _Reader:
    """Puts parts together from what the parser tells."""

    def __init__(self) -> None:
        self.parts: list[FormPart] = []
        self.has_ended = False
        self._headers: dict[bytes, bytes] = {}
        self._name, self._value = bytearray(), bytearray()

    def callbacks(self) -> dict[str, object]:
        """By the parser's names."""
        return {
            "on_part_begin": self._begin,
            "on_part_data": self._take,
            "on_header_field": lambda data, start, end: self._name.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        if len(self.parts) == _MOST_PARTS:
            raise ApiError(f"the form has more than {_MOST_PARTS} parts; send fewer")
        self.parts.append(FormPart())
        self._headers.clear()

    def _take(self, data: bytes, start: int, end: int) -> None:
        self.parts[-1].data += data[start:end]

    def _end_header(self) -> None:
        if len(self._headers) == _MOST_HEADERS:
            raise ApiError(f"a part of the form has more than {_MOST_HEADERS} headers; send fewer")
        self._headers[bytes(self._name).lower()] = bytes(self._value)
        self._name.clear()
        self._value.clear()

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if b"name" not in options:
            raise ApiError("a part of the form has no name; let the client make the form")
        part = self.parts[-1]
        part.name, part.is_file = options[b"name"].decode("utf-8", "replace"), b"filename" in options

    def _end(self) -> None:
        self.has_ended = True
