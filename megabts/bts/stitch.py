"""One stitch layer: the maths of BTS, equations 1-4 (arXiv 2502.00075), on the members' hidden states.

h_0 is the hub's state, h_1..h_n the experts'. Gate logits are a linear map of the hub's raw state, one for every
hidden dimension: the gate is a vector per member and token.

    Experts-into-Hub   g = softmax over the n+1 members of dropout(W_gate h_0);  p_i = W_proj,i h_i
                       h_0 <- g_0 * h_0 + sum_i g_i * p_i;   h_i <- p_i (or h_i: `expert_stream: unchanged`)
    Hub-into-Experts   g = sigmoid(dropout(W_gate h_0));     h_0 unchanged
                       h_i <- (1 - g_i) * h_i + g_i * (W_proj,i h_0)

The functions are pure; `Stitch` holds one layer's parameters, a projection and a gate slice per member, so that a
member can be removed, added or trained by itself. The hub's gate slice of a Hub-into-Experts layer is never read and
is not allocated.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megabts.bts.plan import Kind
from megabts.config.methods import HUB, BTSConfig
from megabts.model.backend import Backend
from megabts.parallel.sharding import ParamMeta, name_seed


def experts_into_hub(hub: Tensor, projected: Sequence[Tensor], gates: Tensor) -> Tensor:
    """The hub's new state: sum of gates [n+1, .., D] times (hub, *projected), each [.., D]."""
    mixed = gates[0] * hub
    for gate, state in zip(gates[1:], projected, strict=True):
        mixed = torch.addcmul(mixed, gate, state)
    return mixed


def hub_into_experts(expert: Tensor, projected_hub: Tensor, gate: Tensor) -> Tensor:
    """An expert's new state: (1 - gate) * expert + gate * projected hub, each [.., D]."""
    return torch.lerp(expert, projected_hub, gate)


def gate_dropout(logits: Tensor, probability: float, seeds: Sequence[int] | None) -> Tensor:
    """Dropout on gate logits [s, b, D]; the mask of sample j depends on seeds[j] alone. None or 0 changes nothing."""
    if seeds is None or probability == 0:
        return logits
    keep = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    for sample, seed in enumerate(seeds):
        keep[:, sample].bernoulli_(1 - probability, generator=torch.Generator(logits.device).manual_seed(seed))
    return (logits * keep.div_(1 - probability)).to(logits.dtype)


class Stitch(nn.Module):
    """One stitch layer of a BTS model with members (hub, *experts).

    Outside the paper's counts, of D parameters each: `hub_bias` on the hub's gate logit (start: hub_leaning), and
    `mix`, the a of h_0 + a * (mixed - h_0) (start: hub_preserving).
    """

    def __init__(self, kind: Kind, hidden_size: int, config: BTSConfig, backend: Backend) -> None:
        super().__init__()
        self.kind = kind
        self.expert_stream = config.expert_stream
        self.dropout = config.gate_dropout
        experts = list(config.experts)
        d, into_hub = hidden_size, kind == "experts_into_hub"
        projection, gate = ParamMeta((d, d), "identity", dim=0), ParamMeta((d, d), "constant", dim=0)
        self.projections = nn.ModuleDict({name: backend.column_linear(projection) for name in experts})
        self.gates = nn.ModuleDict({name: backend.column_linear(gate) for name in [HUB] * into_hub + experts})
        self.metas: dict[str, ParamMeta] = {}
        self.hub_bias = self.mix = None
        if into_hub and config.start == "hub_leaning":
            self.hub_bias = self._vector("hub_bias", d, config.hub_bias, backend)
        if into_hub and config.start == "hub_preserving":
            self.mix = self._vector("mix", d, 0.0, backend)

    def _vector(self, name: str, size: int, value: float, backend: Backend) -> nn.Parameter:
        self.metas[name] = ParamMeta((size,), "constant", value, dim=0)
        shape = self.metas[name].local_shape(backend.tp)
        return nn.Parameter(torch.empty(shape, dtype=backend.dtype, device=backend.device))

    def forward(
        self, states: Sequence[Tensor], dropout_seeds: Sequence[int] | None = None, *, last: bool = False
    ) -> tuple[list[Tensor], list[Tensor]]:
        """States of (hub, *experts), each [s, b, D] -> (new states, gates).

        Gates, each [s, b, D], are those of (hub, *experts) at an Experts-into-Hub layer and of the experts at a
        Hub-into-Experts layer. `dropout_seeds`: one per sample; None: no dropout. `last`: nothing reads the experts any
        more, and the hub's new state alone is returned.
        """
        logits = self._gate_logits(states[0], dropout_seeds if self.training else None)
        projections = list(self.projections.values())
        if self.kind == "hub_into_experts":
            gates = [logit.sigmoid() for logit in logits]
            mixed = [
                hub_into_experts(expert, project(states[0]), gate)
                for expert, project, gate in zip(states[1:], projections, gates, strict=True)
            ]
            return [states[0], *mixed], gates
        softmax = torch.stack(logits).softmax(0)
        projected = [project(expert) for project, expert in zip(projections, states[1:], strict=True)]
        hub = experts_into_hub(states[0], projected, softmax)
        gates = list(softmax.unbind(0))
        if self.mix is not None:
            hub = torch.lerp(states[0], hub, self.mix)
            gates = _diluted(gates, self.mix)
        if last:
            return [hub], gates
        return [hub, *(projected if self.expert_stream == "projected" else states[1:])], gates

    def _gate_logits(self, hub: Tensor, seeds: Sequence[int] | None) -> list[Tensor]:
        logits = []
        for name, gate in self.gates.items():
            mine = None if seeds is None else [name_seed(name, seed) for seed in seeds]
            logits.append(gate_dropout(gate(hub), self.dropout, mine))
        if self.hub_bias is not None:
            logits[0] = logits[0] + self.hub_bias
        return logits


@torch.no_grad()
def _diluted(gates: Sequence[Tensor], mix: Tensor) -> list[Tensor]:
    """The weights that members really have in h_0 + mix * (mixed - h_0), in fp32."""
    diluted = [gate.float() * mix.float() for gate in gates]
    diluted[0] += 1 - mix.float()
    return diluted
