"""The `config.json` of a Hugging Face folder as megabts' model configuration, and the reverse.

Reads what transformers 4 wrote (`rope_theta`, `rope_scaling`, `torch_dtype`) and 5 writes (`rope_parameters`, `dtype`);
writes both. A feature that megabts does not compute is refused by its key, because ignoring it would give a slightly
wrong model.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megabts.checkpoint.hf_rope import rope_from_hf, rope_to_hf
from megabts.config.model import ModelConfig
from megabts.errors import UserError

CONFIG = "config.json"
STITCHED = "megabts_bts"
"""Model type of BTS models in this form; they leave, and do not come back."""
REQUIRED_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "ffn_size": "intermediate_size",
}


@dataclass(frozen=True)
class Family:
    """What a model type's `config.json` means to transformers."""

    architecture: str
    """The class that its `AutoModelForCausalLM` is."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Model settings that are not the default's."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What a key that is left out means, where it is not what `DEFAULTS` says."""
    false_keys: tuple[str, ...] = ()
    """Keys that may only be false."""


DEFAULTS: Mapping[str, Any] = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
_OLMO2 = {"qk_norm": True, "qk_norm_span": "full", "norm_position": "post"}
_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768}
FAMILY: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM", false_keys=("attention_bias", "mlp_bias")),
    "mistral": Family(
        "MistralForCausalLM",
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    ),
    "qwen2": Family("Qwen2ForCausalLM", {"qkv_bias": True}, _QWEN),
    "qwen3": Family("Qwen3ForCausalLM", {"qk_norm": True}, {**_QWEN, "head_dim": 128}, ("attention_bias",)),
    "olmo2": Family("Olmo2ForCausalLM", _OLMO2, {"rms_norm_eps": 1e-5}, ("attention_bias",)),
}
"""By model type. Of two that fit a model alike, the first one is what it is exported as."""
ONLY_VALUES: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1.0),
}
"""Keys that may be absent in every family; where present, only these values are what megabts computes."""


def is_hf_folder(path: Path) -> bool:
    """Whether a folder is in Hugging Face's form (a `config.json`, and not a megabts checkpoint)."""
    return (Path(path) / CONFIG).is_file() and not (Path(path) / "manifest.json").exists()


def config_from_hf(hf_dir: Path, max_seq_len: int | None = None) -> ModelConfig:
    """The model configuration of a Hugging Face folder; reads the `config.json` of transformers 4 and 5.

    `max_seq_len`: the longest sequence asked for, None: the folder's. Raises UserError naming the first key or value
    that megabts does not compute, among them an attention window that is shorter than that.
    """
    raw = read_config(hf_dir)
    where = Path(hf_dir) / CONFIG
    family = FAMILY[raw["model_type"]]
    for key, allowed in {**ONLY_VALUES, **dict.fromkeys(family.false_keys, (False,))}.items():
        if key in raw and raw[key] not in allowed:
            raise UserError(f"{where}: {key} = {raw[key]!r} is not supported (only {allowed[-1]!r}); use another model")
    missing = [key for key in REQUIRED_KEYS.values() if not isinstance(raw.get(key), int)]
    if missing:
        raise UserError(f"{where}: {', '.join(missing)} missing or not a whole number; restore the file")
    sizes = {ours: raw[theirs] for ours, theirs in REQUIRED_KEYS.items()}
    meant = {**DEFAULTS, **family.defaults, **raw}
    longest = max_seq_len or meant["max_position_embeddings"]
    _check_window(meant, longest, where)
    theta, scaling = rope_from_hf(raw, where)
    return ModelConfig(
        **sizes,
        num_kv_heads=meant.get("num_key_value_heads") or sizes["num_heads"],
        head_dim=meant.get("head_dim") or sizes["hidden_size"] // sizes["num_heads"],
        max_seq_len=longest,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=meant["rms_norm_eps"],
        tie_embeddings=raw.get("tie_word_embeddings", False),
        **family.options,
    )


def family_of(config: ModelConfig) -> str:
    """The model type that a dense model is exported as. Raises UserError naming the options that no family has."""
    options = {name for family in FAMILY.values() for name in family.options}
    plain = ModelConfig()
    for model_type, family in FAMILY.items():
        if all(getattr(config, name) == family.options.get(name, getattr(plain, name)) for name in options):
            return model_type
    given = [f"model.{name} {getattr(config, name)}" for name in sorted(options)]
    raise UserError(
        f"no Hugging Face family has {', '.join(given)} together ({', '.join(FAMILY)}); it stays in megabts"
    )


def config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` of a dense model whose weights are stored in `dtype` (`bfloat16`), for transformers 4 and 5.

    Raises UserError as `family_of` does.
    """
    model_type = family_of(config)
    family = FAMILY[model_type]
    return {
        "architectures": [family.architecture],
        "model_type": model_type,
        **{theirs: getattr(config, ours) for ours, theirs in REQUIRED_KEYS.items()},
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        **dict.fromkeys(family.false_keys, False),
        "attention_dropout": 0.0,
        "initializer_range": config.init_std,
        "use_cache": True,
        **({"use_sliding_window": False, "sliding_window": None} if model_type.startswith("qwen") else {}),
        **rope_to_hf(config),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def dtype_from_hf(hf_dir: Path) -> str | None:
    """The type the weights were saved in (`bfloat16`, ...) as the configuration says; None where it says nothing."""
    raw = read_config(hf_dir)
    return raw.get("dtype", raw.get("torch_dtype"))


def read_config(hf_dir: Path) -> dict[str, Any]:
    """The raw `config.json` of a supported model type."""
    raw = read_json(Path(hf_dir) / CONFIG)
    if raw.get("model_type") == STITCHED:
        raise UserError(f"{hf_dir} is a stitched model exported for transformers; give the run it was exported from")
    if raw.get("model_type") not in FAMILY:
        kinds = ", ".join(FAMILY)
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


def _check_window(meant: Mapping[str, Any], longest: int, where: Path) -> None:
    """Refuse a model in which some layer's attention reaches back less far than its sequences are long."""
    kinds = set(meant.get("layer_types") or ())
    if kinds - {"full_attention", "sliding_attention"}:
        raise UserError(f"{where}: layer_types {', '.join(sorted(kinds))} are not supported; use another model")
    window = meant.get("sliding_window")
    if meant["model_type"].startswith("qwen"):
        slides = (
            "sliding_attention" in kinds if kinds else meant.get("max_window_layers", 28) < meant["num_hidden_layers"]
        )
        window = meant.get("sliding_window", 4096) if meant.get("use_sliding_window") and slides else None
    elif kinds == {"full_attention"} and meant["model_type"] != "mistral":  # whose layers slide whatever this says
        window = None
    if window is not None and window < longest:
        raise UserError(
            f"{where}: sliding_window {window} is shorter than the {longest} tokens of its sequences, and there are "
            f"no attention windows here; for shorter ones: tools/convert_checkpoint.py import --max-seq-len {window}"
        )
