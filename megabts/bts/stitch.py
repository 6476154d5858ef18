"""One stitch layer: the maths of BTS, equations 1-4 (arXiv 2502.00075), on the members' hidden states.

h_0 is the hub's state, h_1..h_n the experts'. Gate logits are a linear map of the hub's raw state, one for every
hidden dimension: the gate is a vector per member and token.

    Experts-into-Hub   g = softmax over the n+1 members of dropout(W_gate h_0);  p_i = W_proj,i h_i
                       h_0 <- g_0 * h_0 + sum_i g_i * p_i;   h_i <- p_i (or h_i: `expert_stream: unchanged`)
    Hub-into-Experts   g = sigmoid(dropout(W_gate h_0));     h_0 unchanged
                       h_i <- (1 - g_i) * h_i + g_i * (W_proj,i h_0)

The functions are `mixing`'s; `Stitch` holds one layer's parameters, a projection and a gate slice per member, so that a
member can be removed, added or trained by itself. The hub's gate slice of a Hub-into-Experts layer is never read and
is not allocated. How members on several ranks meet is `placement`'s.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megabts.bts.flow import StitchFlow, gradient_flow
from megabts.bts.mixing import experts_into_hub, gate_dropout, sigmoid_mix, softmax_mix
from megabts.bts.placement import ALONE, Exchanges, Placement, broadcast
from megabts.bts.plan import Kind, StitchPoint
from megabts.bts.projection import make_gate, make_projection
from megabts.config.methods import HUB, BTSConfig
from megabts.model.backend import Backend
from megabts.parallel.collectives import all_gather, all_reduce, enter, from_hidden_slices, to_hidden_slices
from megabts.parallel.sharding import ParamMeta, name_seed


class Stitch(nn.Module):
    """One stitch layer of a BTS model with members (hub, *experts); on several ranks, this rank's part of it.

    Outside the paper's counts, of D parameters each: `hub_bias` on the hub's gate logit (start: hub_leaning), and
    `mix`, the a of h_0 + a * (mixed - h_0) (start: hub_preserving).

    A projection is where its member is. Gate slices are where their member is, except those of an Experts-into-Hub
    layer that gathers, which are all on the hub's rank, as hub_bias and mix always are. Over tensor-parallel ranks each
    mixes its slice of the hidden dimensions: gates are per dimension, so that takes no exchange.
    """

    def __init__(
        self,
        kind: Kind,
        hidden_size: int,
        config: BTSConfig,
        backend: Backend,
        placement: Placement | None = None,
        flow: StitchFlow | None = None,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.expert_stream = config.expert_stream
        self.dropout = config.gate_dropout
        self.placement = placement = placement or Placement.of(config.members, ALONE)
        self.flow = flow or gradient_flow([StitchPoint(0, kind)], config)[0]
        self.tp, self.sequence, self.fuse = backend.tp, backend.sequence, backend.fuse
        d, with_hub = hidden_size, kind == "experts_into_hub" and placement.has_hub
        self.normalised = config.gate_input == "normalised"
        self.projections = nn.ModuleDict({name: make_projection(d, config, backend) for name in placement.experts})
        self.gates = nn.ModuleDict({name: make_gate(d, config, backend) for name in placement.gated(kind)})
        self.metas: dict[str, ParamMeta] = {}
        self.hub_bias = self.mix = None
        if with_hub and config.start == "hub_leaning":
            self.hub_bias = self._vector("hub_bias", d, config.hub_bias, backend)
        if with_hub and config.start == "hub_preserving":
            self.mix = self._vector("mix", d, 0.0, backend)

    def _vector(self, name: str, size: int, value: float, backend: Backend) -> nn.Parameter:
        self.metas[name] = ParamMeta((size,), "constant", value, dim=0)
        shape = self.metas[name].local_shape(backend.tp)
        return nn.Parameter(torch.empty(shape, dtype=backend.dtype, device=backend.device))

    def forward(
        self,
        states: Sequence[Tensor],
        dropout_seeds: Sequence[int] | None = None,
        *,
        last: bool = False,
        exchanges: Exchanges | None = None,
        with_gates: bool = True,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """States of this rank's members, each [s', b, D], hub first -> (new states, gates).

        s' is s / tp under sequence parallelism, else s. Gates, each [s, b, D / tp], belong to (hub, *experts) at an
        Experts-into-Hub layer and to the experts at a Hub-into-Experts layer; a rank has those of its own members, or
        the hub's rank has all. They need not all be formed unless `with_gates`. `dropout_seeds`: one per sample; None:
        no dropout. `last`: nothing reads the experts any more, and the hub's new state alone is returned, by its rank.
        """
        seeds = dropout_seeds if self.training else None
        exchanges = exchanges or Exchanges(self.placement.ep)
        if self.kind == "hub_into_experts":
            return self._into_experts(states, seeds, exchanges, with_gates)
        experts = states[self.placement.has_hub :]
        projected = [
            project(self._enter(state)) for project, state in zip(self.projections.values(), experts, strict=True)
        ]
        if self.placement.exchange == "gather":
            hub, gates = self._gathered(states[0], projected, seeds, exchanges, with_gates)
        else:
            hub, gates = self._reduced(states[0], projected, seeds, exchanges, with_gates)
        new = [self._leave(hub)] if hub is not None else []
        if last:
            return new, gates
        if self.expert_stream == "unchanged":
            return [*new, *experts], gates
        return [*new, *(self._leave(state) for state in projected)], gates

    def _into_experts(
        self, states: Sequence[Tensor], seeds: Sequence[int] | None, exchanges: Exchanges, with_gates: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        hub = exchanges.broadcast(states[0], HUB in self.flow.before)
        held = self.placement.has_hub
        if len(states) == held:  # the hub alone
            return list(states), []
        read = self._enter(hub)
        logits = self._gate_logits(read, seeds)
        mixed = [
            self._leave(sigmoid_mix(logit, self._slice(expert), project(read), self.fuse))
            for expert, project, logit in zip(states[held:], self.projections.values(), logits, strict=True)
        ]
        return [*states[:held], *mixed], [logit.detach().sigmoid() for logit in logits] if with_gates else []

    def _gathered(
        self,
        hub: Tensor,
        projected: list[Tensor],
        seeds: Sequence[int] | None,
        exchanges: Exchanges,
        with_gates: bool,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """(the hub's new state, a slice; all gates) on the hub's rank, which alone mixes; (None, none) elsewhere."""
        projected = self._meet(hub, projected, exchanges)
        if not self.placement.has_hub:
            return None, []
        logits, own = self._gate_logits(self._enter(hub), seeds), self._slice(hub)
        gates = list(torch.stack(logits).detach().softmax(0).unbind(0)) if with_gates else []
        mixed = softmax_mix(logits, [own, *projected], self.fuse)
        if self.mix is None:
            return mixed, gates
        return torch.lerp(own, mixed, self.mix), _diluted(gates, self.mix) if with_gates else []

    def _meet(self, hub: Tensor, projected: list[Tensor], exchanges: Exchanges) -> list[Tensor]:
        """All projected states, on the hub's rank."""
        placement = self.placement
        if placement.ep.size == 1:
            return projected
        counts = placement.expert_counts
        needing, start, returns = self.flow.trained | self.flow.before, 1, []
        for count in counts:
            returns.append(not needing.isdisjoint(placement.members[start : start + count]))
            start += count
        stacked = torch.stack(projected) if projected else hub.new_empty(0, *self._slice_shape(hub))
        return list(exchanges.gather(stacked, counts, returns).unbind(0))

    def _reduced(
        self,
        state: Tensor,
        projected: list[Tensor],
        seeds: Sequence[int] | None,
        exchanges: Exchanges,
        with_gates: bool,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """As `_gathered`, but every rank forms its members' part of the softmax and of the sum; gates are its own's.

        exp(logit - maximum over all members) of each, times its state: the sum of these over the sum of those.
        """
        placement, flow = self.placement, self.flow
        hub = exchanges.broadcast(state, HUB in flow.before)
        logits = torch.stack(self._gate_logits(self._enter(hub), seeds))
        weights = (logits - exchanges.maximum(logits.detach().amax(0))).exp()
        sources = [self._slice(hub), *projected] if placement.has_hub else projected
        numerator = experts_into_hub(sources[0], sources[1:], weights)
        total = exchanges.add(torch.stack([numerator, weights.sum(0)]), bool(flow.trained or flow.before))
        mixed = None
        if placement.has_hub:
            mixed = total[0] / total[1]
            mixed = mixed if self.mix is None else torch.lerp(sources[0], mixed, self.mix)
        return mixed, self._shares(weights, total[1], exchanges) if with_gates else []

    @torch.no_grad()
    def _shares(self, weights: Tensor, total: Tensor, exchanges: Exchanges) -> list[Tensor]:
        """This rank's gates: its weights, divided by the hub rank's `total`."""
        scale = total.reciprocal() if self.mix is None else self.mix / total
        gates = list((weights * broadcast(scale, self.placement.ep)).float().unbind(0))
        if self.mix is not None:
            gates[0] += 1 - self.mix.float()
        return gates

    @torch.no_grad()
    def mean_gates(self, gates: Sequence[Tensor], state: Tensor) -> Tensor:
        """Means over the hidden dimensions, [members gated, s, b] in float32, on every rank; `state`: any it read."""
        placement, (s, b, _) = self.placement, self._slice_shape(state)
        means = [all_reduce(gate.float().mean(-1), self.tp) / self.tp.size for gate in gates]
        stacked = torch.stack(means) if means else torch.zeros(0, s, b, device=state.device)
        counts = placement.counts if self.kind == "experts_into_hub" else placement.expert_counts
        if self.kind == "experts_into_hub" and placement.exchange == "gather":
            counts = [len(placement.members)] + [0] * (placement.ep.size - 1)
        return all_gather(stacked, placement.ep, 0, counts)

    def _gate_logits(self, hub: Tensor, seeds: Sequence[int] | None) -> list[Tensor]:
        """Of each gate slice here, [s, b, D / tp], from the hub's whole state."""
        logits, width = [], hub.shape[-1] // self.tp.size
        read = F.rms_norm(hub, hub.shape[-1:]) if self.normalised else hub
        for name, gate in self.gates.items():
            mine = None if seeds is None else [name_seed(name, seed) for seed in seeds]
            logit = gate(read)
            split = self.tp if logit.shape[-1] == width else ALONE  # else: a number per token, the same on every rank
            logits.append(gate_dropout(logit, self.dropout, mine, split, self.fuse).expand(*hub.shape[:-1], width))
        if self.hub_bias is not None:
            logits[0] = logits[0] + self.hub_bias
        return logits

    def _enter(self, state: Tensor) -> Tensor:
        return enter(state, self.tp, self.sequence)

    def _slice(self, state: Tensor) -> Tensor:
        return to_hidden_slices(state, self.tp, self.sequence)

    def _leave(self, state: Tensor) -> Tensor:
        return from_hidden_slices(state, self.tp, self.sequence)

    def _slice_shape(self, state: Tensor) -> tuple[int, int, int]:
        s, b, d = state.shape
        return s * self.tp.size if self.sequence else s, b, d // self.tp.size


@torch.no_grad()
def _diluted(gates: Sequence[Tensor], mix: Tensor) -> list[Tensor]:
    """The weights that members really have in h_0 + mix * (mixed - h_0), in fp32."""
    diluted = [gate.float() * mix.float() for gate in gates]
    diluted[0] += 1 - mix.float()
    return diluted
