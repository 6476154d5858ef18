"""Branch-Train-MiX and sparse upcycled checkpoints as mixtures of experts that transformers and its readers know.

    members like     class                  names of a layer's router and ffn experts
    Llama, Mistral   MixtralForCausalLM     block_sparse_moe.gate, .experts.E.{w1, w3, w2}
    Qwen3            Qwen3MoeForCausalLM    mlp.gate, mlp.experts.E.{gate,up,down}_proj
    OLMo-2           FlexOlmoForCausalLM    the same

They choose the k largest of softmax(logits) and divide by their sum, which is megabts' softmax over the k largest
logits; soft routing is that with k = N. Split and blended ffn experts are ffn experts like others. Mixtral's names on
disk are those that transformers 4 and 5 read alike. Whatever else an ffn expert is chosen by, or does, is refused.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megabts.build import open_model
from megabts.checkpoint.hf import weights_to_hf
from megabts.checkpoint.hf_config import config_to_hf, family_of
from megabts.checkpoint.manifest import MODEL_FILE
from megabts.checkpoint.reader import TensorReader
from megabts.config.methods import MoEConfig
from megabts.config.model import ModelConfig
from megabts.convert.folder import check_free, write_hf_folder
from megabts.convert.options import Options
from megabts.convert.tokenizer import hf_tokenizer
from megabts.convert.verify import check_models, check_stored
from megabts.errors import UserError
from megabts.runtime.extras import require
from megabts.tokenizers.build import find_tokenizer


@dataclass(frozen=True)
class MoEFamily:
    """A mixture of experts of transformers."""

    model_type: str
    architecture: str
    block: str
    """What a layer's feed-forward is called."""
    matrices: tuple[str, str, str]
    """What an ffn expert's gate, up and down are called."""
    number: str
    """The configuration's key for the number of ffn experts."""
    settings: Mapping[str, Any]
    """More keys of the configuration."""


_PLAIN = ("gate_proj", "up_proj", "down_proj")
MOE_FAMILIES: Mapping[str, MoEFamily] = {
    "llama": MoEFamily(
        "mixtral",
        "MixtralForCausalLM",
        "block_sparse_moe",
        ("w1", "w3", "w2"),
        "num_local_experts",
        {"sliding_window": None, "router_jitter_noise": 0.0},
    ),
    "qwen3": MoEFamily(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "mlp",
        _PLAIN,
        "num_experts",
        {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "olmo2": MoEFamily("flex_olmo", "FlexOlmoForCausalLM", "mlp", _PLAIN, "num_experts", {"norm_topk_prob": True}),
}
"""By the family of a dense model of the same settings."""


def moe_family(model: ModelConfig, moe: MoEConfig) -> MoEFamily:
    """What the model is exported as. Raises UserError naming what has no form in transformers, and what to do."""
    if moe.attention_experts:
        raise UserError(
            "moe.attention_experts (bam) has no Hugging Face form; upcycle the members with --method btx instead"
        )
    if moe.routing not in ("topk", "soft"):
        weight = "its probability" if moe.routing == "switch" else "a first layer that is soft, or sampled"
        raise UserError(
            f"moe.routing {moe.routing} (one ffn expert, with {weight}) has no Hugging Face form; train on with "
            "--moe.routing topk --moe.top_k 2"
        )
    if moe.active(0) < 2:
        raise UserError("moe.top_k 1 has no Hugging Face form that all readers share; train on with --moe.top_k 2")
    family = family_of(model)
    if family not in MOE_FAMILIES:
        raise UserError(
            f"members of the {family} family have no Hugging Face mixture without a shared expert (only "
            f"{', '.join(MOE_FAMILIES)}); export the members one by one"
        )
    return MOE_FAMILIES[family]


def moe_config(model: ModelConfig, moe: MoEConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` of a mixture whose weights are stored in `dtype`. Raises UserError as `moe_family` does."""
    family, width = moe_family(model, moe), moe.ffn_width(model.ffn_size)
    config = config_to_hf(model, dtype)
    if family.model_type == "mixtral":
        config = {key: value for key, value in config.items() if key not in ("attention_bias", "mlp_bias")}
    elif family.model_type == "qwen3_moe":
        config["moe_intermediate_size"] = width
    return {
        **config,
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "intermediate_size": width,
        family.number: moe.num_ffn_experts,
        "num_experts_per_tok": moe.active(0),
        "router_aux_loss_coef": moe.balance,
        "output_router_logits": False,
        **family.settings,
    }


def moe_tensors(
    model: ModelConfig, moe: MoEConfig, weights: Iterator[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """megabts' parameters as the family's tensors (views)."""
    family = moe_family(model, moe)
    for name, tensor in weights:
        layer, _, kind = name.partition(".mlp.")
        block = f"model.{layer}.{family.block}"
        gate, up, down = family.matrices
        if kind == "router.weight":
            yield f"{block}.gate.weight", tensor
        elif kind == "experts.gate_up":
            for number, expert in enumerate(tensor):
                rows = expert.chunk(2)
                yield f"{block}.experts.{number}.{gate}.weight", rows[0]
                yield f"{block}.experts.{number}.{up}.weight", rows[1]
        elif kind == "experts.down":
            yield from ((f"{block}.experts.{number}.{down}.weight", expert) for number, expert in enumerate(tensor))
        else:
            yield from weights_to_hf(model, [(name, tensor)])


def export_moe(checkpoint: Path, out: Path, options: Options) -> None:
    """Write the Hugging Face folder `out` of a MoE checkpoint, in the family that fits it.

    Raises UserError (it exists, no family routes so, transformers computes something else), before anything has the
    name `out`.
    """
    check_free(out)
    if options.check == "logits":
        require("hf")
    stored = open_model(checkpoint)
    model, moe = stored.config.model, stored.config.moe
    family = moe_family(model, moe)
    tokenizer = hf_tokenizer(find_tokenizer(stored.folder))
    if tokenizer.note:
        options.say(tokenizer.note)
    with TensorReader(stored.folder, MODEL_FILE) as reader:
        dtype = options.dtype or reader.read(next(iter(reader.shapes))).dtype
        config = moe_config(model, moe, str(dtype).removeprefix("torch."))

        def tensors() -> Iterator[tuple[str, Tensor]]:
            return moe_tensors(model, moe, reader.items())

        def check(folder: Path) -> None:
            if options.check == "logits":
                check_models(stored.folder, folder, model, options, out, dtype=dtype)
            else:
                check_stored(folder, tensors, options, out)

        write_hf_folder(out, config, tensors(), options, tokenizer=tokenizer, check=check)
    options.say(f"wrote {out}: {family.architecture}, {config['dtype']}")
