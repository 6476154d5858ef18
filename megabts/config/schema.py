"""The keys of a configuration, read off its dataclasses: types, defaults, documentation, and help for typos.

jsonargparse turns text into typed values and lays out `--help`; the dataclasses stay the only place where a setting
is declared. A key is `section.name`, or `name` for the settings that stand beside the sections.
"""

import argparse
import dataclasses
import json
import math
import reprlib
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from docstring_parser import parse_from_object
from jsonargparse import ArgumentParser

from megabts.errors import UsageError

_WORDS: dict[Any, str] = {str: "text", int: "a whole number", float: "a number", bool: "true or false", Any: "anything"}
_NEAR = 0.6


@dataclass(frozen=True)
class Field:
    """One setting."""

    key: str
    hint: Any
    default: Any

    @property
    def is_mapping(self) -> bool:
        """Whether single items may be set, as in `data.train.PREFIX`."""
        return get_origin(self.hint) is dict

    @property
    def wants_yaml(self) -> bool:
        """Whether a command line gives the value as YAML or JSON and not as plain text."""
        return get_origin(self.hint) in (dict, list)


class Schema:
    """All settings below the dataclass `root`, whose fields are settings or sections (dataclasses of settings)."""

    def __init__(self, root: type) -> None:
        self.root = root
        self.sections: dict[str, type] = {}
        self.fields: dict[str, Field] = {}
        for field in self._fields_of(root, ""):
            if isinstance(field.hint, type) and dataclasses.is_dataclass(field.hint):
                self.sections[field.key] = field.hint
                self.fields.update((inner.key, inner) for inner in self._fields_of(field.hint, f"{field.key}."))
            else:
                self.fields[field.key] = field

    @staticmethod
    def _fields_of(cls: Any, prefix: str) -> list[Field]:
        hints = get_type_hints(cls)
        fields = []
        for item in dataclasses.fields(cls):
            made = item.default_factory
            default = item.default if made is dataclasses.MISSING else made()
            fields.append(Field(prefix + item.name, hints[item.name], default))
        return fields

    def help_parser(self) -> ArgumentParser:
        """The parser of all settings, for its help: reading all docstrings takes a tenth of a second."""
        parser = ArgumentParser(
            usage="%(prog)s [--config FILE ...] [--section.key VALUE ...]",
            description="Defaults give way to the preset's sizes (model.preset), these to the YAML files in the order "
            "given, and these to the command line. Mappings are given as YAML or JSON, or item by item: "
            "--bts.experts.code DIR.",
            exit_on_error=False,
            formatter_class=argparse.HelpFormatter,
        )
        parser.add_argument("--config", metavar="FILE", help="YAML file of settings; may be given several times.")
        groups: dict[str, Any] = {"": parser.add_argument_group("run")}
        docs: dict[str, str] = {}
        for name, cls in {"": self.root, **self.sections}.items():
            found = parse_from_object(cls)
            if name:
                groups[name] = parser.add_argument_group(name, found.short_description)
            docs |= {f"{name}.{each.arg_name}".lstrip("."): each.description or "" for each in found.params}
        for key, field in self.fields.items():
            doc = " ".join(docs.get(key, "").split())
            action = groups[key.rpartition(".")[0]].add_argument(
                f"--{key}",
                type=field.hint,
                default=argparse.SUPPRESS,
                metavar=_metavar(field.hint),
                help=f"{doc} (default: {show(field.default)})".strip().replace("%", "%%"),
            )
            action.option_strings[:] = [f"--{key}"]
        return parser

    def field(self, key: str, where: str) -> tuple[Field, str]:
        """The field a dotted key names, and the item below it (`PREFIX` of `data.train.PREFIX`), else "".

        Raises UsageError for an unknown key, with the nearest known one.
        """
        if key in self.fields:
            return self.fields[key], ""
        name = ".".join(key.split(".")[:2])
        if name in self.fields and self.fields[name].is_mapping and key[len(name) + 1 :]:
            return self.fields[name], key[len(name) + 1 :]
        if key in self.sections:
            raise UsageError(f"{key} ({where}) is a section; set its keys, such as {self._first_key(key)}")
        near = nearest(key, [*self.fields, *self.sections])
        advice = f"did you mean {near}?" if near else "--help lists all keys"
        raise UsageError(f"unknown key {key} ({where}); {advice}")

    def _first_key(self, section: str) -> str:
        return next(key for key in self.fields if key.startswith(f"{section}."))

    def typed(self, field: Field, value: Any, where: str) -> Any:
        """`value` in the field's type, text being converted. Raises UsageError naming key, value and type."""
        wrong = UsageError(f"{field.key} is {reprlib.repr(value)} ({where}); expected {describe(field.hint)}")
        if value is None:
            raise wrong
        if _is_typed(field.hint, value):
            return value
        try:
            result = _parser_of(field.hint).parse_object({"value": value}, defaults=False)["value"]
        except (argparse.ArgumentError, TypeError, ValueError, OverflowError) as error:
            raise wrong from error
        numbers = result.values() if isinstance(result, dict) else [result]
        if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
            raise wrong
        return result


@cache
def _parser_of(hint: Any) -> ArgumentParser:
    """What converts one value to a type."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint, default=argparse.SUPPRESS)
    return parser


def _is_typed(hint: Any, value: Any) -> bool:
    """Whether a value needs no conversion and no further look, as nearly all of a file that `to_yaml` wrote."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is list:
        return type(value) is list and all(_is_typed(inner[0], item) for item in value)
    if origin is dict:
        return type(value) is dict and all(_is_typed(str, k) and _is_typed(inner[1], v) for k, v in value.items())
    return type(value) is hint and (not isinstance(value, float) or math.isfinite(value))


def nearest(word: str, known: list[str]) -> str:
    """The known key most like `word`, compared whole and by its last part; "" when none is near."""

    def likeness(candidate: str) -> float:
        whole = SequenceMatcher(None, word, candidate).ratio()
        last = SequenceMatcher(None, word.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return max(whole, 0.9 * last)

    best = max(known, key=likeness, default="")
    return best if best and likeness(best) >= _NEAR else ""


def describe(hint: Any) -> str:
    """A type in words."""
    arguments = get_args(hint)
    if get_origin(hint) is Literal:
        return " or ".join(map(str, arguments))
    if get_origin(hint) is dict:
        return f"a mapping of names to {_WORDS.get(arguments[1], str(arguments[1]))}"
    if get_origin(hint) is list:
        word = _WORDS.get(arguments[0], str(arguments[0]))
        return f"a list of {word.removeprefix('a ')}s" if word.startswith("a ") else f"a list of {word}"
    return _WORDS.get(hint, str(hint)) + (" (quote it)" if hint is str else "")


def show(value: Any) -> str:
    """A value as one would type it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False)
    return str(value) if value != "" else '""'


def _metavar(hint: Any) -> str:
    origin = get_origin(hint)
    if origin is Literal:
        return "{" + ",".join(map(str, get_args(hint))) + "}"
    if origin is dict:
        return "{NAME: VALUE}"
    if origin is list:
        return "[ITEM, ...]"
    return {str: "TEXT", int: "INT", float: "NUMBER", bool: "{true,false}"}.get(hint, "VALUE")
