"""What a preset of the comparison says beside its runs' configurations: `scale.yaml` in its folder."""

from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

from megabts.errors import UsageError

PRESETS = Path(__file__).resolve().parents[2] / "examples" / "configs" / "compare"
FILE = "scale.yaml"


@dataclass(frozen=True)
class Scale:
    """How large a comparison is; all are whole numbers above 0."""

    minutes: int
    """Of one seed, that the step counts of the configurations are made for."""
    vocab_size: int
    """Of the tokenizer that is trained."""
    tokenizer_bytes: int
    """Text of each domain that the tokenizer is trained on."""
    windows: int
    """Windows per domain that losses are measured on."""


def preset_names() -> list[str]:
    """The presets there are, by name."""
    return sorted(path.parent.name for path in PRESETS.glob(f"*/{FILE}"))


def check_preset(preset: str) -> None:
    """Raises UsageError when there is no such preset. Needs Python alone, as scripts ask before they install."""
    if preset not in preset_names():
        raise UsageError(f"--preset {preset} is none of {', '.join(preset_names())}")


@cache
def read_scale(preset: str) -> Scale:
    """The scale of a preset. Raises UsageError when there is no such preset, or its file does not hold a scale."""
    check_preset(preset)
    path = PRESETS / preset / FILE
    return parse_scale(path.read_text(), path)


def parse_scale(text: str, path: Path) -> Scale:
    """The scale in the text of a file; `path` names it. Raises UsageError."""
    import yaml

    names = [field.name for field in fields(Scale)]
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = None
    whole = isinstance(found, dict) and all(type(value) is int and value > 0 for value in found.values())
    if not whole or set(found) != set(names):
        raise UsageError(f"{path} must give {', '.join(names)}, each a whole number above 0, and nothing else")
    return Scale(**found)
