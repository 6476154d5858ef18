"""What a stitched model is made of in transformers: members, stitch layers and the mixture of all heads."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, DynamicCache

from .configuration_megabts import MegaBTSConfig

LSE_POSITIONS = 256
"""Positions whose logits exist at one time where only their normalisers are needed."""


class Member(nn.Module):
    """One member's embedding and layers; its final norm and head where they are read.

    Attributes:
        implementation: transformers' name of what computes its attention.
    """

    def __init__(self, raw: dict[str, Any], stream: int, with_head: bool, implementation: str | None) -> None:
        super().__init__()
        config = AutoConfig.for_model(**raw)
        model = AutoModel.from_config(config, attn_implementation=implementation)
        self.implementation = model.config._attn_implementation
        self.embed_tokens, self.layers, self.rotary_emb = model.embed_tokens, model.layers, model.rotary_emb
        for place, layer in enumerate(self.layers):
            layer.self_attn.layer_idx = stream * len(self.layers) + place
        accepted = inspect.signature(self.layers[0].forward).parameters
        self.cache_argument = "past_key_values" if "past_key_values" in accepted else "past_key_value"
        if with_head:
            self.norm = model.norm
            tied = bool(config.tie_word_embeddings)
            self.lm_head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """[V, D]."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def run(
        self, first: int, last: int, hidden: Tensor, mask: Tensor | None, positions: Tensor, cache: DynamicCache | None
    ) -> Tensor:
        """Layers [first, last) on [b, s, D]."""
        rope = self.rotary_emb(hidden, positions)
        shared: dict[str, Any] = {self.cache_argument: cache, "use_cache": cache is not None}
        for place in range(first, last):
            out = self.layers[place](
                hidden, attention_mask=mask, position_ids=positions, position_embeddings=rope, **shared
            )
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden


class LowRank(nn.Module):
    """x + U (V x)."""

    def __init__(self, size: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(size, rank, bias=False)
        self.up = nn.Linear(rank, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[.., D] -> the same."""
        low: Tensor = self.up(self.down(x))
        return x + low


class Stitch(nn.Module):
    """One stitch layer; the gates' softmax, or sigmoid, is taken for each hidden dimension.

    Experts-into-Hub: g = softmax over the members of W_gate h_0; p_i = W_proj,i h_i; h_0 <- g_0 h_0 + sum_i g_i p_i;
    h_i <- p_i, or h_i. Hub-into-Experts: g = sigmoid(W_gate h_0); h_i <- (1 - g_i) h_i + g_i W_proj,i h_0.
    """

    def __init__(self, kind: str, config: MegaBTSConfig) -> None:
        super().__init__()
        size, rank, experts = config.hidden_size, config.projection_rank, config.member_names[1:]
        self.into_hub = kind == "experts_into_hub"
        self.projected_stream = config.expert_stream == "projected"
        self.normalised = config.gate_input == "normalised"
        gated = config.member_names if self.into_hub else experts
        width = 1 if config.gate == "token" else size
        self.projections = nn.ModuleDict(
            {name: LowRank(size, rank) if rank else nn.Linear(size, size, bias=False) for name in experts}
        )
        self.gates = nn.ModuleDict({name: nn.Linear(size, width, bias=False) for name in gated})
        leaning, preserving = (self.into_hub and config.start == start for start in ("hub_leaning", "hub_preserving"))
        self.hub_bias = nn.Parameter(torch.empty(size)) if leaning else None
        self.mix = nn.Parameter(torch.empty(size)) if preserving else None

    def forward(self, states: list[Tensor], hub_alone: bool) -> list[Tensor]:
        """Members' states [b, s, D] -> the new ones; of the hub alone where nothing reads the others any more."""
        hub, experts = states[0], states[1:]
        read = F.rms_norm(hub, hub.shape[-1:]) if self.normalised else hub
        logits = [gate(read).expand_as(hub) for gate in self.gates.values()]
        projections = list(self.projections.values())
        if not self.into_hub:
            pairs = zip(experts, projections, logits, strict=True)
            return [hub, *(torch.lerp(expert, project(hub), logit.sigmoid()) for expert, project, logit in pairs)]
        if self.hub_bias is not None:
            logits[0] = logits[0] + self.hub_bias
        gates = torch.stack(logits).softmax(0)
        projected = [project(expert) for project, expert in zip(projections, experts, strict=True)]
        mixed = gates[0] * hub
        for gate, state in zip(gates[1:], projected, strict=True):
            mixed = torch.addcmul(mixed, gate, state)
        new = mixed if self.mix is None else torch.lerp(hub, mixed, self.mix)
        if hub_alone:
            return [new]
        return [new, *(projected if self.projected_stream else experts)]


class OutputMixture(nn.Module):
    """p = sum_i g_i p_i of the members' next-token probabilities; g = softmax of w_i . norm_hub(h_0) + evidence.

    The evidence of a position t is sum_j k_j l_i(t - j), j = 0..W-1, l_i(u) being the log-likelihood that member i gave
    to the text's token u; that of its first token counts 0.
    """

    def __init__(self, config: MegaBTSConfig) -> None:
        super().__init__()
        self.length, self.slot = config.evidence, config.num_hidden_layers - 1
        self.gates = nn.ModuleDict({name: nn.Linear(config.hidden_size, 1, bias=False) for name in config.member_names})
        if config.evidence:
            self.evidence = nn.Parameter(torch.empty(config.evidence))

    def forward(
        self,
        members: list[Member],
        states: list[Tensor],
        tokens: Tensor,
        real: Tensor | None,
        cache: DynamicCache | None,
        keep: slice,
    ) -> Tensor:
        """States, each [b, s, D] -> log-probabilities [b, kept, V] of the positions `keep`, the last ones.

        `real` [b, t]: which of all tokens so far are no padding; None: all.
        """
        normed = [member.norm(state) for member, state in zip(members, states, strict=True)]
        shares, totals = [], []
        for member, state in zip(members, normed, strict=True):
            logits = _exact(F.linear(state[:, keep], member.head_weight))
            total = logits.logsumexp(-1)
            shares.append(logits - total.unsqueeze(-1))
            if self.length:
                totals.append(total if total.shape == state.shape[:2] else _normalisers(member, state))
        kept = shares[0].shape[1]
        gates = torch.stack([_exact(gate(normed[0][:, keep])).squeeze(-1) for gate in self.gates.values()])
        if self.length:
            foretold = torch.stack([_exact(state) for state in normed], 1)  # [b, members, s, D]
            foretold = torch.cat([foretold, torch.stack(totals, 1).unsqueeze(-1)], -1)
            known = self._known(members, foretold, tokens, real, cache, kept)
            gates = gates + self._look_back(known, kept)
        mixed = None
        for gate, share in zip(gates.log_softmax(0), shares, strict=True):
            part = share + gate.unsqueeze(-1)
            mixed = part if mixed is None else torch.logaddexp(mixed, part)
        assert mixed is not None
        return mixed

    def _known(
        self,
        members: list[Member],
        foretold: Tensor,
        tokens: Tensor,
        real: Tensor | None,
        cache: DynamicCache | None,
        kept: int,
    ) -> Tensor:
        """l(u) of the last kept + W - 1 tokens, [members, b, ..]; 0 of a text's first one and before it.

        `foretold` [b, members, s, D + 1]: of the position's next token, the normed state and the logits' normaliser.
        """
        ids = tokens[:, None, :, None].to(foretold.dtype)  # exact up to 2^24
        if cache is not None:
            ids, foretold = cache.update(ids, foretold, self.slot)
        span = kept + self.length - 1
        read = ids[:, 0, -span:, 0].long() if ids.shape[2] > span else ids[:, 0, 1:, 0].long()
        before = foretold[:, :, -read.shape[1] - 1 : -1] if read.shape[1] else foretold[:, :, :0]
        each = []
        for stream, member in enumerate(members):
            rows = _exact(F.embedding(read, member.head_weight))  # [b, u, D]
            each.append((rows * before[:, stream, :, :-1]).sum(-1) - before[:, stream, :, -1])
        known = torch.stack(each)
        if real is not None and read.shape[1]:
            inside = (real[:, 1:] & real[:, :-1])[:, -read.shape[1] :]
            known = known.masked_fill(~inside, 0)
        return F.pad(known, (span - read.shape[1], 0))

    def _look_back(self, known: Tensor, kept: int) -> Tensor:
        windows = known.unfold(-1, self.length, 1)  # [members, b, kept, W], the latest token last
        assert windows.shape[2] == kept
        taps: Tensor = _exact(self.evidence).flip(0).to(windows.dtype)
        return windows @ taps


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normalisers(member: Member, normed: Tensor) -> Tensor:
    """The logits' logsumexp [b, s], of some positions at a time."""
    parts = [_exact(F.linear(part, member.head_weight)).logsumexp(-1) for part in normed.split(LSE_POSITIONS, 1)]
    return torch.cat(parts, 1)
