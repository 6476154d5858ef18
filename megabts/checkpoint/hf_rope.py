"""Rotary positions in a Hugging Face `config.json`: `rope_parameters` (transformers 5), `rope_theta` and `rope_scaling`
(4)."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megabts.config.model import ModelConfig
from megabts.errors import UserError

ROPE_KEYS: Mapping[str, Mapping[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position": "original_max_position_embeddings",
    },
    "yarn": {"factor": "factor", "original_max_position": "original_max_position_embeddings"},
}
"""By type: the numbers that must be there, ours and theirs."""
YARN_KEYS = ("beta_fast", "beta_slow", "attention_factor", "truncate")
"""What YaRN may have besides; named alike on both sides."""


def rope_from_hf(raw: Mapping[str, Any], where: Path) -> tuple[float, dict[str, Any]]:
    """Base and scaling, for `ModelConfig`. Raises UserError for a kind that is not supported."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_KEYS or any(isinstance(value, dict) for value in rope.values()):
        raise UserError(
            f"{where}: rope type {kind!r} is not supported (only {', '.join(ROPE_KEYS)}); use another model"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"{where}: partial_rotary_factor {rope['partial_rotary_factor']} is not supported; use another model"
        )
    keys = ROPE_KEYS[kind]
    missing = [theirs for theirs in keys.values() if rope.get(theirs) is None]
    if missing:
        raise UserError(f"{where}: rope type {kind!r} needs {', '.join(missing)}; restore the file")
    scaling = {ours: rope[theirs] for ours, theirs in keys.items()}
    if kind == "yarn":
        scaling |= _yarn(rope)
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    return float(theta), {"type": kind, **scaling} if scaling else {}


def rope_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The keys of `config.json`, in both forms."""
    scaling = config.rope_scaling
    kind = scaling.get("type", "default")
    names = dict(ROPE_KEYS[kind]) | ({key: key for key in YARN_KEYS} if kind == "yarn" else {})
    values = {theirs: scaling[ours] for ours, theirs in names.items()}
    return {
        "rope_parameters": {"rope_type": kind, "rope_theta": config.rope_theta, **values},
        "rope_theta": config.rope_theta,
        "rope_scaling": {"rope_type": kind, **values} if scaling else None,
    }


def _yarn(rope: Mapping[str, Any]) -> dict[str, Any]:
    """What may be left out, as transformers works it out."""
    factor, attention = rope["factor"], rope.get("attention_factor")
    if attention is None:
        over, below = rope.get("mscale"), rope.get("mscale_all_dim")
        attention = _mscale(factor, over) / _mscale(factor, below) if over and below else _mscale(factor, 1)
    return {
        "beta_fast": float(rope.get("beta_fast") or 32),
        "beta_slow": float(rope.get("beta_slow") or 1),
        "attention_factor": float(attention),
        "truncate": bool(rope.get("truncate", True)),
    }


def _mscale(factor: float, weight: float) -> float:
    """How much longer queries and keys are made for a `factor` times longer context."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
