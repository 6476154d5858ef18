"""Plain Hugging Face folders (config.json + safetensors) as megabts configurations and parameters, and back.

One table per family (`FAMILIES`) lists every megabts parameter with the tensors it is made of and their shapes; import,
export and the checks read the same table. Rows of a fused parameter lie one after another (q, k, v; gate, up); Hugging
Face's rotary order (two halves) is megabts' own, so nothing is permuted. Weights stream parameter by parameter from
memory mapped shards. A model this table does not describe exactly is refused by name, never loaded approximately.
Limit: safetensors only (a pickled `pytorch_model.bin` could run code).
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megabts.checkpoint.durable import hash_chunks, read_chunks
from megabts.checkpoint.hf_config import CONFIG, config_from_hf, family_of, read_config, read_json
from megabts.config.model import ModelConfig
from megabts.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDING = "embedding.weight"
HEAD = "head.weight"
COMPUTED_SUFFIX = ".rotary_emb.inv_freq"
"""Buffers that old checkpoints store although they follow from the configuration."""


@dataclass(frozen=True)
class Theirs:
    """One tensor of the other side: its name and shape, the shape in words that `_sizes` gives numbers."""

    name: str
    shape: tuple[str, ...]


Names = Mapping[str, tuple[Theirs, ...]]

LLAMA_NAMES: Names = {
    EMBEDDING: (Theirs("model.embed_tokens.weight", ("vocab", "hidden")),),
    "layers.{i}.attention_norm.weight": (Theirs("model.layers.{i}.input_layernorm.weight", ("hidden",)),),
    "layers.{i}.attention.qkv.weight": (
        Theirs("model.layers.{i}.self_attn.q_proj.weight", ("query", "hidden")),
        Theirs("model.layers.{i}.self_attn.k_proj.weight", ("key_value", "hidden")),
        Theirs("model.layers.{i}.self_attn.v_proj.weight", ("key_value", "hidden")),
    ),
    "layers.{i}.attention.out.weight": (Theirs("model.layers.{i}.self_attn.o_proj.weight", ("hidden", "query")),),
    "layers.{i}.mlp_norm.weight": (Theirs("model.layers.{i}.post_attention_layernorm.weight", ("hidden",)),),
    "layers.{i}.mlp.gate_up.weight": (
        Theirs("model.layers.{i}.mlp.gate_proj.weight", ("ffn", "hidden")),
        Theirs("model.layers.{i}.mlp.up_proj.weight", ("ffn", "hidden")),
    ),
    "layers.{i}.mlp.down.weight": (Theirs("model.layers.{i}.mlp.down_proj.weight", ("hidden", "ffn")),),
    "final_norm.weight": (Theirs("model.norm.weight", ("hidden",)),),
    HEAD: (Theirs("lm_head.weight", ("vocab", "hidden")),),
}


def _with_layer_names(more: Names) -> Names:
    """Llama's table with these layers' names added, or in place of its own."""
    keys = [*LLAMA_NAMES, *(key for key in more if key not in LLAMA_NAMES)]
    table = {**LLAMA_NAMES, **more}
    first = [key for key in keys if "{i}" not in key][:1]
    last = [key for key in keys if "{i}" not in key][1:]
    return {key: table[key] for key in [*first, *(key for key in keys if "{i}" in key), *last]}


def _norm_names(query: str, key: str) -> Names:
    return {
        "layers.{i}.attention.q_norm.weight": (Theirs("model.layers.{i}.self_attn.q_norm.weight", (query,)),),
        "layers.{i}.attention.k_norm.weight": (Theirs("model.layers.{i}.self_attn.k_norm.weight", (key,)),),
    }


QWEN2_NAMES = _with_layer_names(
    {
        "layers.{i}.attention.qkv.bias": (
            Theirs("model.layers.{i}.self_attn.q_proj.bias", ("query",)),
            Theirs("model.layers.{i}.self_attn.k_proj.bias", ("key_value",)),
            Theirs("model.layers.{i}.self_attn.v_proj.bias", ("key_value",)),
        )
    }
)
QWEN3_NAMES = _with_layer_names(_norm_names("head", "head"))
OLMO2_NAMES = _with_layer_names(
    {
        "layers.{i}.attention_norm.weight": (Theirs("model.layers.{i}.post_attention_layernorm.weight", ("hidden",)),),
        "layers.{i}.mlp_norm.weight": (Theirs("model.layers.{i}.post_feedforward_layernorm.weight", ("hidden",)),),
        **_norm_names("query", "key_value"),
    }
)
FAMILIES: Mapping[str, Names] = {
    "llama": LLAMA_NAMES,
    "mistral": LLAMA_NAMES,
    "qwen2": QWEN2_NAMES,
    "qwen3": QWEN3_NAMES,
    "olmo2": OLMO2_NAMES,
}


def weights_from_hf(
    hf_dir: Path, order: Iterable[str] = (), config: ModelConfig | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """All megabts parameters of a Hugging Face folder, by name, one at a time, in the stored type.

    `order`: all names in the order wanted. `config`: of `config_from_hf`, where the caller has asked already. All names
    and shapes are checked before the first one comes. Raises UserError.
    """
    hf_dir = Path(hf_dir)
    config = config or config_from_hf(hf_dir)
    names = _expand(FAMILIES[read_config(hf_dir)["model_type"]], config)
    sizes = _sizes(config)
    with ExitStack() as stack:
        source = _open_shards(hf_dir, stack)
        if config.tie_embeddings:
            head = names.pop(HEAD)
            if head[0].name in source:
                _check_complete(hf_dir, source, names | {HEAD: head}, sizes)
                _check_tied(hf_dir, source, names[EMBEDDING], head)
                del source[head[0].name]
        _check_complete(hf_dir, source, names, sizes)
        for ours in order or names:
            yield ours, _join(hf_dir, source, names[ours])


def weights_to_hf(
    config: ModelConfig, weights: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same table the other way: megabts parameters as the tensors (views) of the family that fits.

    Raises UserError for a name, or as `family_of` does.
    """
    family = family_of(config)
    names = _expand(FAMILIES[family], config)
    sizes = _sizes(config)
    for ours, tensor in weights:
        if ours not in names:
            raise UserError(f"parameter {ours} has no name in the {family} family; export it in another form")
        rows = tensor.split([sizes[part.shape[0]] for part in names[ours]])
        yield from zip([part.name for part in names[ours]], rows, strict=True)


def hf_content_hash(hf_dir: Path) -> str:
    """sha256 over `config.json` and all weight files of a Hugging Face folder. Reads them whole."""
    hf_dir = Path(hf_dir)
    files = [hf_dir / CONFIG, *_weight_files(hf_dir)]
    lines = [f"{path.name} {hash_chunks(read_chunks(path))}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _weight_files(hf_dir: Path) -> list[Path]:
    """The folder's safetensors files, sorted by name; every one the index lists must be there."""
    if (hf_dir / SINGLE).exists():
        return [hf_dir / SINGLE]
    if not (hf_dir / INDEX).exists():
        raise UserError(f"{hf_dir} has neither {SINGLE} nor {INDEX}; save the model in safetensors form")
    weight_map = read_json(hf_dir / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{hf_dir / INDEX} has no weight_map; fetch it again")
    files = [hf_dir / str(name) for name in sorted(set(weight_map.values()))]
    for path in files:
        if not path.exists() or path.parent != hf_dir:
            raise UserError(f"{hf_dir}: shard {path.name} is missing ({INDEX} lists it); fetch it again")
    return files


def _open_shards(hf_dir: Path, stack: ExitStack) -> dict[str, Any]:
    """The open file of every stored tensor, by tensor name."""
    source: dict[str, Any] = {}
    for path in _weight_files(hf_dir):
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}); fetch it again") from error
        twice = sorted(source.keys() & set(file.keys()))
        if twice:
            raise UserError(f"{hf_dir}: tensor {twice[0]} is in more than one shard; save the model again")
        source |= dict.fromkeys(file.keys(), file)
    return {name: file for name, file in source.items() if not name.endswith(COMPUTED_SUFFIX)}


def _check_tied(
    hf_dir: Path, source: Mapping[str, Any], embedding: tuple[Theirs, ...], head: tuple[Theirs, ...]
) -> None:
    if not torch.equal(_join(hf_dir, source, embedding), _join(hf_dir, source, head)):
        name = head[0].name
        raise UserError(f"{hf_dir}: tie_word_embeddings is true but {name} is not the embedding; correct the flag")


def _check_complete(hf_dir: Path, source: Mapping[str, Any], names: Names, sizes: Mapping[str, int]) -> None:
    parts = [part for made_of in names.values() for part in made_of]
    expected = {part.name for part in parts}
    missing = sorted(expected - source.keys())
    extra = sorted(source.keys() - expected)
    if missing or extra:
        kind, found = ("is missing", missing) if missing else ("is not part of this family", extra)
        raise UserError(f"{hf_dir}: tensor {found[0]} {kind} ({len(found)} such); use a complete, plain model")
    for part in parts:
        shape = source[part.name].get_slice(part.name).get_shape()
        want = [sizes[word] for word in part.shape]
        if shape != want:
            raise UserError(f"{hf_dir}: {part.name} has shape {shape}, {CONFIG} says {want}; correct one of them")


def _join(hf_dir: Path, source: Mapping[str, Any], parts: tuple[Theirs, ...]) -> torch.Tensor:
    tensors = [source[part.name].get_tensor(part.name) for part in parts]
    if len({tensor.dtype for tensor in tensors}) > 1:
        listed = ", ".join(part.name for part in parts)
        raise UserError(f"{hf_dir}: {listed} differ in type; save the model in one type")
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


def _expand(names: Names, config: ModelConfig) -> dict[str, tuple[Theirs, ...]]:
    """The table with every layer's number written out, in the model's order."""
    keys = list(names)
    first, last = _layer_span(keys)
    expanded = {key: names[key] for key in keys[:first]}
    for i in range(config.num_layers):
        for key in keys[first:last]:
            parts = tuple(Theirs(part.name.format(i=i), part.shape) for part in names[key])
            expanded[key.format(i=i)] = parts
    return expanded | {key: names[key] for key in keys[last:]}


def _layer_span(keys: list[str]) -> tuple[int, int]:
    inside = [place for place, key in enumerate(keys) if "{i}" in key]
    return inside[0], inside[-1] + 1


def _sizes(config: ModelConfig) -> dict[str, int]:
    return {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "query": config.num_heads * config.head_dim,
        "key_value": config.num_kv_heads * config.head_dim,
        "head": config.head_dim,
        "ffn": config.ffn_size,
    }
