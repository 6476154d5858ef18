"""YAML with the rules a configuration needs: lines are kept, keys are text, a key stands once, 5e-6 is a number.

Only plain data is built (PyYAML's safe constructors); tags that would make Python objects are errors. Limits: no
merge keys (`<<`), and a setting is at most `section.key` deep - whatever lies below is the setting's value.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import yaml

from megabts.errors import UsageError

_FLOAT = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")

_T = TypeVar("_T")
_KINDS = {yaml.SequenceNode: "a list", yaml.ScalarNode: "a single value"}


@dataclass(frozen=True)
class Setting:
    """One value a user gave, and where: `file:line` or `command line`."""

    value: Any
    where: str


class _Loader(yaml.SafeLoader):
    """Safe loader whose mappings have text keys, each at most once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        return {key: self.construct_object(child, deep=True) for key, _, child in pairs(node)}


class _Dumper(yaml.SafeDumper):
    """Safe dumper that quotes text which `_Loader` would read as a number."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


# YAML 1.1 wants a dot in every float; people write 5e-6.
for _resolving in (_Loader, _Dumper):
    _resolving.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def pairs(node: yaml.MappingNode) -> list[tuple[str, int, yaml.Node]]:
    """Keys (their text as written), line numbers from 1, and value nodes of a mapping.

    Raises yaml.MarkedYAMLError for a key that is not a scalar or stands twice.
    """
    found: dict[str, tuple[str, int, yaml.Node]] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key must be plain text", problem_mark=key.start_mark)
        if key.value in found:
            first = found[key.value][1]
            raise yaml.MarkedYAMLError(
                problem=f"duplicate key {key.value}, first on line {first}", problem_mark=key.start_mark
            )
        found[key.value] = (key.value, key.start_mark.line + 1, value)
    return list(found.values())


def read_settings(text: str, source: str, sections: set[str]) -> dict[str, Setting]:
    """Read a configuration into `{"section.key": Setting}`; keys are not checked here, except that none stands twice.

    Args:
        source: name of the text in messages, usually the file's path.
        sections: top-level keys that hold a mapping of settings. An empty section holds none.

    Raises:
        UsageError: bad YAML, or not a mapping.
    """

    def read(loader: _Loader, root: yaml.Node | None) -> dict[str, Setting]:
        if root is None:
            raise UsageError(f"{source} is empty; it must hold sections of settings")
        if not isinstance(root, yaml.MappingNode):
            raise UsageError(f"{source} must hold a mapping of sections, not {_KINDS[type(root)]}")
        settings: dict[str, Setting] = {}
        for name, line, node in pairs(root):
            if name not in sections:
                settings[name] = Setting(loader.construct_object(node, deep=True), f"{source}:{line}")
            elif isinstance(node, yaml.MappingNode):
                for key, key_line, child in pairs(node):
                    value = loader.construct_object(child, deep=True)
                    settings[f"{name}.{key}"] = Setting(value, f"{source}:{key_line}")
            elif loader.construct_object(node) is not None:
                raise UsageError(f"{name} ({source}:{line}) is a section; give it keys, one per line below it")
        return settings

    return _parsed(text, source, read)


def read_value(text: str, source: str) -> Any:
    """Read one value, such as `{code: 0.5}` or `[a, b]` from a command line. Raises UsageError for bad YAML."""
    return _parsed(
        text, source, lambda loader, node: None if node is None else loader.construct_object(node, deep=True)
    )


def dump(data: dict[str, Any]) -> str:
    """Write plain data as YAML that `read_settings` reads back unchanged."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _parsed(text: str, source: str, read: Callable[[_Loader, yaml.Node | None], _T]) -> _T:
    """Apply `read(loader, root node)`, turning every YAML failure into one line."""
    try:
        loader = _Loader(text)
        return read(loader, loader.get_single_node())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}" if mark else source
        raise UsageError(f"{place}: not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UsageError(f"{source}: not valid YAML: nested too deeply") from error
