"""What a BTS model answers with when all its members speak: a mixture of their next-token probabilities.

Beyond the paper, whose output is the hub's alone (arXiv 2502.00075, section 2), so that whatever an expert's own head
knows must pass through the hub's. Here every member's stitched state goes through its own final norm and head, and

    p(token) = sum_i g_i p_i(token),   g = softmax over the n + 1 members of w_i . norm_hub(h_0),

with a trained vector w_i of D per member, zero at the start. Unlike the ensemble's posterior (`merge.ensemble`), g is
read off what the hub has seen so far, token by token, and the members' states have been stitched.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megabts.bts.projection import Replicated
from megabts.model.backend import Backend
from megabts.model.decoder import Decoder
from megabts.parallel.collectives import enter
from megabts.parallel.sharding import ParamMeta


class OutputMixture(nn.Module):
    """The mixture's gates; the heads belong to the members, hub first."""

    def __init__(self, members: Sequence[str], hidden_size: int, backend: Backend) -> None:
        super().__init__()
        self.tp, self.sequence = backend.tp, backend.sequence
        meta = ParamMeta((1, hidden_size), summed=True)
        self.gates = nn.ModuleDict({name: Replicated(meta, backend) for name in members})

    def loss(self, members: Sequence[Decoder], states: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """States [members, s', b, D] and labels, mask [b, s] -> sum of the mixture's cross-entropy, nats."""
        normed = [member.final_norm(state) for member, state in zip(members, states, strict=True)]
        pairs = zip(members, normed, strict=True)
        given = torch.stack([-member.head.losses(state, labels.T) for member, state in pairs])
        return -((self._log_gates(normed[0]) + given).logsumexp(0) * mask.T).sum()

    def logits(self, members: Sequence[Decoder], states: Tensor) -> Tensor:
        """States [members, s', b, D] -> log-probabilities of the next token [b, s, V]; outside autograd over tp."""
        normed = [member.final_norm(state) for member, state in zip(members, states, strict=True)]
        mixed = None
        for gate, member, state in zip(self._log_gates(normed[0]), members, normed, strict=True):
            logits = member.head.logits(state)
            share = logits.to(gate.dtype).log_softmax(-1) + gate.unsqueeze(-1)
            mixed = share if mixed is None else torch.logaddexp(mixed, share)
        assert mixed is not None
        return mixed.transpose(0, 1)

    def _log_gates(self, normed: Tensor) -> Tensor:
        """The hub's normed state [s', b, D] -> log g [members, s, b], in float32 at least."""
        hub = enter(normed, self.tp, self.sequence)
        exact = torch.promote_types(hub.dtype, torch.float32)
        weight = torch.cat([gate.weight for gate in self.gates.values()]).to(exact)  # type: ignore[misc]
        logits = torch.einsum("sbd,nd->nsb", hub.to(exact), weight)
        # The ranks of tp compute the same, and gradients are summed over them: each takes its share.
        return torch.lerp(logits.detach(), logits, 1 / self.tp.size).log_softmax(0)
