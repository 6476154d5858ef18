"""A Branch-Train-Stitch model (arXiv 2502.00075) in transformers: members side by side, stitch layers between them.

Every member is made of the layers of its own transformers class and reads the same tokens; hidden states are [b, s, D].
A member's layer j has the cache's layer stream * L + j. Where the output reads evidence one more layer of the cache
holds, instead of keys, the tokens, and instead of values what each member foretold after each of them, so that whatever
reorders, repeats or crops a cache does so to the evidence too.

Limit: one device; caches that grow (DynamicCache), whose layers forget nothing; the model is for inference.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_megabts import MegaBTSConfig
from .parts_megabts import Member, OutputMixture, Stitch


class MegaBTSForCausalLM(PreTrainedModel, GenerationMixin):
    """The stitched model; of a mixture the logits are log-probabilities."""

    config_class = MegaBTSConfig
    base_model_prefix = ""
    _auto_class = "AutoModelForCausalLM"  # so that save_pretrained copies this code, in every version
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_cache_class = True
    _supports_static_cache = False

    def __init__(self, config: MegaBTSConfig) -> None:
        super().__init__(config)
        self.mixes = config.output == "mixture"
        self.members = nn.ModuleDict(
            {
                name: Member(raw, stream, self.mixes or stream == 0, config._attn_implementation)
                for stream, (name, raw) in enumerate(zip(config.member_names, config.member_configs, strict=True))
            }
        )
        self.stitches = nn.ModuleDict(
            {str(index): Stitch(kind, config) for index, (_, kind) in enumerate(config.stitch_points)}
        )
        self.output = OutputMixture(config) if self.mixes else None
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """As transformers does; where the configuration names the members' folders, their weights come from there.

        Raises ValueError when one of them is missing or has changed.
        """
        where = pretrained_model_name_or_path
        if not isinstance(config, PretrainedConfig):  # transformers may hold this class twice
            config = MegaBTSConfig.from_pretrained(config or where)
        if not config.member_folders or kwargs.get("state_dict") is not None:
            return super().from_pretrained(where, *args, config=config, **kwargs)
        folder = Path(where)
        if not folder.is_dir():
            raise ValueError(f"{where} names members kept elsewhere; download it to a folder beside them and load that")
        weights = _tensors(folder)
        for stream in range(len(config.member_names)):
            weights |= _member_weights(config, stream)
        config.member_folders = config.member_hashes = None  # what is saved from here on is whole
        result = super().from_pretrained(None, *args, config=config, state_dict=weights, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return result

    def get_input_embeddings(self) -> nn.Module:
        """The hub's; every member has its own."""
        return next(iter(self.members.values())).embed_tokens  # type: ignore[return-value]

    def get_output_embeddings(self) -> None:
        """None: heads are their members' own."""
        return

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ValueError: members' vocabularies are fixed."""
        raise ValueError("the members' vocabularies cannot be resized; resize each member and stitch them anew")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Token ids [b, s] -> logits [b, s or the last `logits_to_keep`, V], and with `labels` the mean cross-entropy.

        `attention_mask` [b, all tokens so far]: 0 where there is padding, on either side. Raises ValueError for another
        shape of it, a cache that does not grow, and positions to keep that are not the last ones.
        """
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache()
        if past_key_values is not None and type(past_key_values) is not DynamicCache:
            raise ValueError(f"a {type(past_key_values).__name__} cannot hold the members' states; use a DynamicCache")
        past, length = past_key_values.get_seq_length() if past_key_values is not None else 0, input_ids.shape[1]
        real = _real(attention_mask, past + length)
        if position_ids is None:
            position_ids = _positions(real, past, input_ids)
        decoders: list[Member] = list(self.members.values())  # type: ignore[arg-type]
        mask = self._mask(real, past, input_ids, decoders[0])
        states = [member.embed_tokens(input_ids) for member in decoders]
        depth, total = 0, self.config.member_layers
        for (after, _), stitch in zip(self.config.stitch_points, self.stitches.values(), strict=True):
            states = [
                member.run(depth, after, state, mask, position_ids, past_key_values)
                for member, state in zip(decoders, states, strict=True)
            ]
            states, depth = stitch(states, hub_alone=after == total and not self.mixes), after
        if isinstance(logits_to_keep, Tensor):
            raise ValueError("logits_to_keep must be a number of last positions")
        keep = slice(-logits_to_keep if logits_to_keep else None, None)
        if self.output is not None:
            logits = self.output(decoders, states, input_ids, real, past_key_values, keep)
        else:
            hub = decoders[0]
            logits = F.linear(hub.norm(states[0][:, keep]), hub.head_weight)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def _mask(self, real: Tensor | None, past: int, tokens: Tensor, member: Member) -> Tensor | None:
        """What attention adds to its scores, [b or 1, 1, s, t]; None where plain causal attention is the same."""
        length, dtype = tokens.shape[1], member.embed_tokens.weight.dtype
        if real is None and member.implementation == "sdpa" and (past == 0 or length == 1):
            return None
        keys = torch.arange(past + length, device=tokens.device)
        allowed = (keys <= keys[past:].unsqueeze(1)).unsqueeze(0)  # [1, s, t]
        if real is not None:
            allowed = allowed & real.unsqueeze(1)
        mask = torch.zeros(allowed.shape, dtype=dtype, device=tokens.device)
        return mask.masked_fill(~allowed, torch.finfo(dtype).min).unsqueeze(1)


def _real(attention_mask: Tensor | None, total: int) -> Tensor | None:
    """Which tokens are no padding, bool [b, t]; None where there is no padding."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[1] != total:
        raise ValueError(f"attention_mask must be [batch, {total}], one column for every token so far")
    return None if bool(attention_mask.all()) else attention_mask.bool()


def _positions(real: Tensor | None, past: int, tokens: Tensor) -> Tensor:
    """Each row's positions, counted from its own first token."""
    if real is None:
        return torch.arange(past, past + tokens.shape[1], device=tokens.device).unsqueeze(0)
    return (real.long().cumsum(1) - 1).clamp(min=0)[:, past:]


def _member_weights(config: MegaBTSConfig, stream: int) -> dict[str, Tensor]:
    """The weights in a member's folder by this model's names, those alone that it reads."""
    name, raw = config.member_names[stream], config.member_configs[stream]
    assert config.member_folders is not None
    assert config.member_hashes is not None
    folder = Path(config.member_folders[stream])
    if not (folder / "config.json").is_file():
        raise ValueError(f"member {name} is not at {folder}; put it back, or export the model again")
    if _content_hash(folder) != config.member_hashes[stream]:
        raise ValueError(f"member {name} at {folder} has changed; restore it, or export the model again")
    unread = {"lm_head.weight"} if raw.get("tie_word_embeddings") else set()
    if stream > 0 and config.output != "mixture":
        unread = {"lm_head.weight", "model.norm.weight"}
    found = {key: tensor for key, tensor in _tensors(folder).items() if key not in unread}
    return {
        f"members.{name}.{key.removeprefix('model.')}": tensor
        for key, tensor in found.items()
        if not key.endswith(".rotary_emb.inv_freq")
    }


def _weight_files(folder: Path) -> list[Path]:
    single = folder / "model.safetensors"
    if single.exists():
        return [single]
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    return [folder / name for name in sorted(set(index["weight_map"].values()))]


def _tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        with safe_open(path, framework="pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dictionary
    return found


def _content_hash(folder: Path) -> str:
    """sha256 over the names and sha256 of `config.json` and all weight files."""
    lines = []
    for path in [folder / "config.json", *_weight_files(folder)]:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
        lines.append(f"{path.name} {digest.hexdigest()}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
