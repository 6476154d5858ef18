"""Tiny random models of every family, saved by transformers, 4 or 5."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
    "bos_token_id": None,
    "pad_token_id": None,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"head_dim": 6, "rms_norm_eps": 1e-5}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 4}),
    "qwen2": ("Qwen2", {"sliding_window": 4096, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {"head_dim": 6, "num_key_value_heads": 1}),
    "olmo2": ("Olmo2", {"rms_norm_eps": 1e-6}),
}
"""Names of transformers' classes, and what of the sizes is the family's own."""
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
VERSION_4 = transformers.__version__.startswith("4.")
"""Whether the library knows the older keys of `config.json` alone."""


def make(
    folder: Path, family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, shard: str = "5GB", **options: Any
) -> Any:
    """A model whose every parameter is random, saved to `folder`; options are named as in version 5."""
    name, own = FAMILIES[family]
    if VERSION_4 and "rope_parameters" in options:
        options |= _older_rope(options.pop("rope_parameters"))
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **own, **options})
    model: Any = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + (parameter.dim() == 1))
    model.to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def edit(folder: Path, **changes: Any) -> None:
    """Change keys of `config.json`; "remove" removes one."""
    raw = json.loads((folder / "config.json").read_text())
    raw = {key: value for key, value in {**raw, **changes}.items() if value != "remove"}
    (folder / "config.json").write_text(json.dumps(raw))


def as_version_4(folder: Path) -> None:
    """Give `config.json` the keys that transformers 4 wrote."""
    raw = json.loads((folder / "config.json").read_text())
    if not VERSION_4:
        older = {**_older_rope(raw["rope_parameters"]), "torch_dtype": raw["dtype"]}
        edit(folder, **dict.fromkeys(["rope_parameters", "dtype", "layer_types"], "remove"), **older)


def _older_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` in the keys of version 4."""
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
    }
