"""Reading a request's JSON, strictly: every field is known by name and held against its type and range."""

import json
import math
from collections.abc import Iterable
from typing import Any, NoReturn

from megabts.serving.errors import ApiError, refuse

MAX_DEPTH = 16
"""Lists and objects inside one another; the interface needs 5."""


def read_json(body: bytes) -> dict[str, Any]:
    """The object that a request's body holds. Raises ApiError."""
    try:
        content = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise refuse(f"the body is not UTF-8 (byte {error.start}); send JSON in UTF-8") from None
    except json.JSONDecodeError as error:
        raise refuse(f"the body is not JSON: {error.msg}, line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise refuse(f"the body is nested more than {MAX_DEPTH} deep; send less") from None
    except ValueError as error:  # NaN, or an integer of thousands of digits
        raise refuse(f"the body is not JSON: {str(error).partition(';')[0]}") from None
    if not isinstance(content, dict):
        raise refuse(f"the body is {_kind(content)}; send a JSON object")
    _check_depth(content)
    return content


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _check_depth(content: object) -> None:
    level: list[object] = [content]
    for _ in range(MAX_DEPTH):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [item for items in inner for item in items]
        if not level:
            return
    raise refuse(f"the body is nested more than {MAX_DEPTH} deep; send less")


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


def check_text(text: object, name: str) -> str:
    """A string that may become tokens. Raises ApiError for another type, a null character or half a character."""
    if not isinstance(text, str):
        raise refuse(f"{name} is {_kind(text)}; send a string", name)
    if "\0" in text:
        raise refuse(f"{name} has a null character at {text.index(chr(0))}; leave it out", name)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise refuse(f"{name} has half of a surrogate pair; send whole characters", name)
    return text


class Fields:
    """An object's fields; null counts as absent. Every method raises ApiError.

    `neutral`: fields of the interface that do nothing here: they are accepted with these values alone.
    """

    def __init__(self, content: dict[str, Any], known: Iterable[str], neutral: dict[str, tuple[Any, ...]]) -> None:
        names = {*known, *neutral}
        for name in content:
            if name not in names:
                raise refuse(f"there is no field {name[:80]!r}; known are {', '.join(sorted(names))}", name[:80])
        self._content = {name: value for name, value in content.items() if value is not None}
        for name, values in neutral.items():
            if values and name in self._content and self._content[name] not in values:
                raise refuse(f"{name} is not supported here; leave it out", name)

    def get(self, name: str) -> Any:
        """The value as it came; None where absent."""
        return self._content.get(name)

    def integer(self, name: str, default: int | None, least: int, most: int) -> int | None:
        """A whole number in [least, most]."""
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise refuse(f"{name} is {_show(value)}; send a whole number", name)
        if not least <= value <= most:
            raise refuse(f"{name} is {_show(value)}; it must lie in {least}..{most}", name)
        return value

    def number(self, name: str, default: float, least: float, most: float) -> float:
        """A number in [least, most]."""
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise refuse(f"{name} is {_show(value)}; send a number", name)
        if not least <= value <= most:
            raise refuse(f"{name} is {_show(value)}; it must lie in {least:g}..{most:g}", name)
        return float(value)

    def flag(self, name: str) -> bool:
        """True or false; false where absent."""
        value = self.get(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise refuse(f"{name} is {_show(value)}; send true or false", name)
        return value

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """A string, or a list of up to `most`; none of them empty."""
        value = self.get(name)
        values = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(values, list) or len(values) > most:
            raise refuse(f"{name} is {_show(value)}; send a string or a list of up to {most}", name)
        if "" in values:
            raise refuse(f"{name} has an empty string; leave it out", name)
        return tuple(check_text(text, name) for text in values)


def _show(value: object) -> str:
    """A value for a message, cut short."""
    if isinstance(value, list | dict):
        return f"{_kind(value)} of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**18:
        return "a number beyond all measure"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def too_large(size: int) -> ApiError:
    """A body of more than `size` bytes."""
    return ApiError(413, f"the body is larger than {size} bytes; send less", None, "request_too_large")
