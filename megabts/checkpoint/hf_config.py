"""The `config.json` of a Hugging Face folder as megabts' model configuration.

Reads what transformers 4 wrote (`rope_theta`, `rope_scaling`, `torch_dtype`) and 5 writes (`rope_parameters`, `dtype`).
A feature that megabts does not compute is refused by its key, because ignoring it would give a slightly wrong model.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megabts.config.model import ModelConfig
from megabts.errors import UserError

CONFIG = "config.json"
REQUIRED_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "ffn_size": "intermediate_size",
}
ONLY_VALUES: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "llama": {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "sliding_window": (None,),
        "quantization_config": (None,),
        "partial_rotary_factor": (None, 1.0),
    },
}
"""By model type: keys that may be absent; where present, only these values are what megabts computes."""

ROPE_KEYS = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position": "original_max_position_embeddings",
    },
}


def is_hf_folder(path: Path) -> bool:
    """Whether a folder is in Hugging Face's form (a `config.json`, and not a megabts checkpoint)."""
    return (Path(path) / CONFIG).is_file() and not (Path(path) / "manifest.json").exists()


def config_from_hf(hf_dir: Path) -> ModelConfig:
    """The model configuration of a Hugging Face folder; reads the `config.json` of transformers 4 and 5.

    Raises UserError naming the first key or value that megabts does not compute.
    """
    raw = read_config(hf_dir)
    where = Path(hf_dir) / CONFIG
    for key, allowed in ONLY_VALUES[raw["model_type"]].items():
        if key in raw and raw[key] not in allowed:
            raise UserError(f"{where}: {key} = {raw[key]!r} is not supported (only {allowed[-1]!r}); use another model")
    missing = [key for key in REQUIRED_KEYS.values() if not isinstance(raw.get(key), int)]
    if missing:
        raise UserError(f"{where}: {', '.join(missing)} missing or not a whole number; restore the file")
    sizes = {ours: raw[theirs] for ours, theirs in REQUIRED_KEYS.items()}
    theta, scaling = _rope(raw, where)
    return ModelConfig(
        **sizes,
        num_kv_heads=raw.get("num_key_value_heads") or sizes["num_heads"],
        head_dim=raw.get("head_dim") or sizes["hidden_size"] // sizes["num_heads"],
        max_seq_len=raw.get("max_position_embeddings", 2048),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        tie_embeddings=raw.get("tie_word_embeddings", False),
        qkv_bias=False,
        qk_norm=False,
    )


def dtype_from_hf(hf_dir: Path) -> str | None:
    """The type the weights were saved in (`bfloat16`, ...) as the configuration says; None where it says nothing."""
    raw = read_config(hf_dir)
    return raw.get("dtype", raw.get("torch_dtype"))


def read_config(hf_dir: Path) -> dict[str, Any]:
    """The raw `config.json` of a supported model type."""
    raw = read_json(Path(hf_dir) / CONFIG)
    if raw.get("model_type") not in ONLY_VALUES:
        kinds = ", ".join(ONLY_VALUES)
        raise UserError(f"{hf_dir}: model_type {raw.get('model_type')!r} is not supported; use a model of type {kinds}")
    return raw


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file. Raises UserError."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a Hugging Face model folder") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); restore the file") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} is not a JSON object; restore the file")
    return raw


def _rope(raw: Mapping[str, Any], where: Path) -> tuple[float, dict[str, Any]]:
    """Base and scaling from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
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
    keys: Mapping[str, str] = ROPE_KEYS[kind]
    missing = [theirs for theirs in keys.values() if theirs not in rope]
    if missing:
        raise UserError(f"{where}: rope type {kind!r} needs {', '.join(missing)}; restore the file")
    scaling = {ours: rope[theirs] for ours, theirs in keys.items()}
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    return float(theta), {"type": kind, **scaling} if scaling else {}
