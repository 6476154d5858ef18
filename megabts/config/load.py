"""Read a run's configuration from YAML files and command-line overrides, and write it back.

    --config FILE               YAML with one mapping per section; several files allowed, a later one wins key by key
    --section.key VALUE         one setting; also --section.key=VALUE; a true/false setting alone means true
    --section.key.NAME VALUE    one item of a mapping; all after the key is the name: --data.train.data/a.b 0.5

Precedence: defaults < sizes of `model.preset` < YAML < command line, whatever the order on the command line. A mapping
given whole replaces the earlier one; an item is added to it. Every mistake is a `UsageError` of one line that names the
key, the place and what would do. Paths stay as they are given: relative ones count from the working directory.
"""

import dataclasses
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

from megabts.config.model import PRESETS, ModelConfig
from megabts.config.run import RunConfig
from megabts.config.schema import Field, Schema, nearest, show
from megabts.config.yaml_text import Setting, dump, read_settings, read_value
from megabts.errors import UsageError

_SIZES = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_size")
_COMMAND_LINE = "command line"


def load_config(args: list[str]) -> RunConfig:
    """The configuration that command-line arguments (without the program's name) describe.

    `-h` or `--help` prints all settings and leaves with SystemExit(0). Raises UsageError.
    """
    schema = _schema()
    if "-h" in args or "--help" in args:
        schema.help_parser().print_help()
        raise SystemExit(0)
    return _build(schema, _collect(schema, args))


def explicit_keys(args: list[str]) -> set[str]:
    """Keys that the user gave in YAML or on the command line: `{"optimizer.lr", "bts.experts"}`.

    An item of a mapping counts as its field. `model.preset` stands for what it decides: it is replaced by the sizes
    of the model, so that a comparison of `model.*` with a checkpoint's sizes is not about the preset's name.
    """
    settings = _collect(_schema(), args)
    keys = set(settings)
    if "model.preset" in keys:
        keys.remove("model.preset")
        keys.update(f"model.{name}" for name in (*_SIZES, *_preset(settings)))
    return keys


def from_yaml(text: str, source: str = "configuration") -> RunConfig:
    """Read the text of one YAML configuration; `source` names it in messages. Raises UsageError."""
    schema = _schema()
    return _build(schema, _typed(schema, read_settings(text, source, set(schema.sections))))


def to_yaml(config: RunConfig) -> str:
    """The whole configuration, defaults included, as YAML that `from_yaml` reads back to an equal one."""
    text = dump(dataclasses.asdict(config))
    assert from_yaml(text) == config, "a configuration must survive being written"
    return text


def difference(config: RunConfig) -> str:
    """What differs from the defaults, one `section.key: value   (default x)` per line, mappings item by item.

    With a preset, the model's other settings are compared with the preset's.
    """
    schema = _schema()
    preset = PRESETS.get(config.model.preset, {})
    base = RunConfig(model=ModelConfig(**preset))
    rows: list[tuple[str, str]] = []
    for field in schema.fields.values():
        value, default = _get(config, field.key), _get(base, field.key)
        if value == default:
            continue
        origin = "preset" if field.key.startswith("model.") and preset and field.key != "model.preset" else "default"
        if isinstance(value, dict) and value:
            rows += [(f"{field.key}.{name}: {show(item)}", "") for name, item in value.items()]
        else:
            rows.append((f"{field.key}: {show(value)}", f"   ({origin} {show(default)})"))
    width = min(48, max((len(left) for left, _ in rows), default=0))
    return "\n".join(f"{left:<{width}}{right}".rstrip() for left, right in rows) or "all settings at their defaults"


def differing_keys(old: RunConfig, new: RunConfig) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of every setting in which two configurations differ."""
    keys = _schema().fields
    values = [(key, _get(old, key), _get(new, key)) for key in keys]
    return [(key, before, after) for key, before, after in values if before != after]


@cache
def _schema() -> Schema:
    """The one schema: it is the same for every configuration."""
    return Schema(RunConfig)


def _collect(schema: Schema, args: list[str]) -> dict[str, Setting]:
    """All settings the arguments give, by field key, typed."""
    options = list(_options(schema, args))
    settings: dict[str, Setting] = {}
    for file in (text for key, text in options if key == "config"):
        settings.update(_typed(schema, read_settings(_read(file), file, set(schema.sections))))
    for key, text in options:
        if key == "config":
            continue
        field, item = schema.field(key, _COMMAND_LINE)
        value = _override(field, item, text)
        if item:
            before = settings[field.key].value if field.key in settings else field.default
            typed = {**before, **schema.typed(field, value, _COMMAND_LINE)}
        else:
            typed = schema.typed(field, value, _COMMAND_LINE)
        settings[field.key] = Setting(typed, _COMMAND_LINE)
    return settings


def _options(schema: Schema, args: list[str]) -> Iterator[tuple[str, str]]:
    """Split arguments into (key, text) pairs."""
    position = 0
    while position < len(args):
        option = args[position]
        position += 1
        if not option.startswith("--") or option == "--":
            raise UsageError(f"unexpected argument {option!r}; settings are given as --section.key VALUE")
        key, equals, text = option[2:].partition("=")
        if not equals:
            given = position < len(args) and not args[position].startswith("--")
            if given:
                text = args[position]
                position += 1
            elif key != "config" and schema.field(key, _COMMAND_LINE)[0].hint is bool:
                text = "true"
            else:
                raise UsageError(f"--{key} needs a value; write --{key}=VALUE for one that begins with --")
        yield key, text


def _override(field: Field, item: str, text: str) -> Any:
    """The value a command line's text stands for, before typing."""
    if item:
        return {item: text if get_args(field.hint)[1] is str else read_value(text, _COMMAND_LINE)}
    return read_value(text, f"--{field.key}") if field.wants_yaml else text


def _typed(schema: Schema, settings: dict[str, Setting]) -> dict[str, Setting]:
    typed = {}
    for key, setting in settings.items():
        field, item = schema.field(key, setting.where)
        if item:
            raise UsageError(f"{key} ({setting.where}): in YAML, put {item} below {field.key}")
        typed[key] = Setting(schema.typed(field, setting.value, setting.where), setting.where)
    return typed


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"config file {file} is not UTF-8 text") from error
    except OSError as error:
        raise UsageError(f"cannot read config file {file}: {error.strerror}") from error


def _preset(settings: dict[str, Setting]) -> dict[str, Any]:
    """Sizes of the preset the settings name, {} for none. Raises UsageError for an unknown one."""
    setting = settings.get("model.preset", Setting("", ""))
    if not setting.value:
        return {}
    if setting.value not in PRESETS:
        near = nearest(setting.value, list(PRESETS))
        advice = f"did you mean {near}? " if near else ""
        raise UsageError(
            f"model.preset {setting.value!r} ({setting.where}) is unknown; {advice}(known: {', '.join(PRESETS)})"
        )
    return PRESETS[setting.value]


def _build(schema: Schema, settings: dict[str, Setting]) -> RunConfig:
    values = {f"model.{name}": value for name, value in _preset(settings).items()}
    values |= {key: setting.value for key, setting in settings.items()}
    sections: dict[str, dict[str, Any]] = {name: {} for name in schema.sections}
    top: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (sections[section] if section else top)[name] = value
    return RunConfig(**top, **{name: schema.sections[name](**given) for name, given in sections.items()})


def _get(config: RunConfig, key: str) -> Any:
    section, _, name = key.rpartition(".")
    return getattr(getattr(config, section) if section else config, name)
