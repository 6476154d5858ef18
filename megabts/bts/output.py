"""What a BTS model answers with when all its members speak: a mixture of their next-token probabilities.

Beyond the paper, whose output is the hub's alone (arXiv 2502.00075, section 2), so that whatever an expert's own head
knows must pass through the hub's. Here every member's stitched state goes through its own final norm and head, and

    p(token) = sum_i g_i p_i(token),   g = softmax over the n + 1 members of w_i . norm_hub(h_0),

with a trained vector w_i of D per member, zero at the start. Unlike the ensemble's posterior (`merge.ensemble`), g is
read off what the hub has seen so far, token by token, and the members' states have been stitched.

With `bts.evidence` W the gate's logits also have sum_j k_j l_i(t - j), j = 0..W-1, l_i(u) being the log-likelihood that
member i gave to the text's token u before it saw it, and k trained, 1 at the start. That is the ensemble's posterior
with a memory of W tokens that the training may shorten: a text may change its domain.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from megabts.bts.projection import Replicated
from megabts.model.attention import Context
from megabts.model.backend import Backend
from megabts.model.decoder import Decoder
from megabts.parallel.collectives import enter
from megabts.parallel.sharding import ParamMeta

HISTORY, NEXT = "history", "next"
"""In a generation's memory: log-likelihoods of the texts' last W tokens [b, members, W]; log-probabilities of the next
token [b, members, V]."""

Observer = Callable[[Tensor], None]
"""Is told the gates [members, s, b] of a pass: float32, they sum to 1 over members."""


class OutputMixture(nn.Module):
    """The mixture's gates; the heads belong to the members, hub first."""

    def __init__(self, members: Sequence[str], hidden_size: int, evidence: int, backend: Backend) -> None:
        super().__init__()
        self.tp, self.sequence, self.length = backend.tp, backend.sequence, evidence
        meta = ParamMeta((1, hidden_size), summed=True)
        self.gates = nn.ModuleDict({name: Replicated(meta, backend) for name in members})
        self.metas: dict[str, ParamMeta] = {}
        if evidence:
            self.metas["evidence"] = ParamMeta((evidence,), "constant", 1.0, summed=True)
            self.evidence = nn.Parameter(torch.empty(evidence, dtype=backend.dtype, device=backend.device))

    def loss(
        self,
        members: Sequence[Decoder],
        states: Tensor,
        labels: Tensor,
        mask: Tensor,
        context: Context | None,
        observe: Observer | None = None,
    ) -> Tensor:
        """States [members, s', b, D] and labels, mask [b, s] -> sum of the mixture's cross-entropy, nats.

        A label that the mask leaves out is evidence all the same. Evidence is data: the taps learn from it, and no
        gradient passes through it to the states, so this is not the whole gradient of the loss.
        """
        normed = [member.final_norm(state) for member, state in zip(members, states, strict=True)]
        pairs = zip(members, normed, strict=True)
        given = torch.stack([-member.head.losses(state, labels.T).T for member, state in pairs])
        evidence = None
        if self.length:
            known = pad(given.detach()[..., :-1], (1, 0))
            evidence = self._look_back(known, None if context is None else context.starts)
        gates = self._log_gates(normed[0], evidence, observe)
        return -((gates + given).logsumexp(0) * mask).sum()

    def logits(
        self,
        members: Sequence[Decoder],
        states: Tensor,
        context: Context | None,
        *,
        last: bool = False,
        observe: Observer | None = None,
    ) -> Tensor:
        """States [members, s', b, D] -> log-probabilities of the next token [b, s, V]; outside autograd over tp.

        Or [b, 1, V] after the `last` position (s' = s). `context` tells of tokens and of positions before these.
        `observe` sees the gates of all positions in both cases.
        """
        normed = [member.final_norm(state) for member, state in zip(members, states, strict=True)]
        evidence = None
        if self.length:
            assert context is not None, "evidence is read off the tokens"
            assert context.tokens is not None
            memory = context.memory
            predicted, before = (memory[key].transpose(0, 1) if key in memory else None for key in (NEXT, HISTORY))
            known = self._known(members, normed, context.tokens, predicted)
            evidence = self._look_back(known, context.starts, before)
            memory[HISTORY] = evidence[..., -1, :].flip(-1).transpose(0, 1)
        gates = self._log_gates(normed[0], evidence, observe)
        if last:
            normed, gates = [state[-1:] for state in normed], gates[..., -1:]
        mixed, following = None, []
        for gate, member, state in zip(gates, members, normed, strict=True):
            share = member.head.logits(state).transpose(0, 1).to(gate.dtype).log_softmax(-1)
            following.append(share[:, -1])
            share = share + gate.unsqueeze(-1)
            mixed = share if mixed is None else torch.logaddexp(mixed, share)
        if self.length and context is not None:
            context.memory[NEXT] = torch.stack(following, 1)
        assert mixed is not None
        return mixed

    def _known(
        self, members: Sequence[Decoder], normed: Sequence[Tensor], tokens: Tensor, predicted: Tensor | None
    ) -> Tensor:
        """Log-likelihood of the tokens [b, s] that these positions read, [members, b, s].

        `predicted` [members, b, V]: of the first one; None: nothing foretold it, and it counts 0.
        """
        shifted = tokens.roll(-1, 1).T
        given = [-member.head.losses(state, shifted).T for member, state in zip(members, normed, strict=True)]
        known = pad(torch.stack(given)[..., :-1], (1, 0))
        if predicted is not None:
            known[..., :1] = predicted.gather(-1, tokens[:, :1].expand(len(members), -1, -1))
        return known

    def _log_gates(self, normed: Tensor, evidence: Tensor | None, observe: Observer | None) -> Tensor:
        """The hub's normed state [s', b, D], and what `_look_back` gave -> log g [members, b, s]; float32 at least."""
        hub = enter(normed, self.tp, self.sequence)
        exact = torch.promote_types(hub.dtype, torch.float32)
        weight = torch.cat([gate.weight for gate in self.gates.values()]).to(exact)  # type: ignore[misc]
        logits = torch.einsum("sbd,nd->nbs", hub.to(exact), weight)
        if evidence is not None:
            logits = logits + evidence.to(exact) @ self.evidence.to(exact)
        # The ranks of tp compute the same, and gradients are summed over them: each takes its share.
        gates = torch.lerp(logits.detach(), logits, 1 / self.tp.size).log_softmax(0)
        if observe is not None:
            observe(gates.detach().exp().float().transpose(1, 2))
        return gates

    def _look_back(self, known: Tensor, starts: Tensor | None, before: Tensor | None = None) -> Tensor:
        """l(t - j) of every position t, [members, b, s, W], j = 0..W-1; 0 up to the first token of t's text.

        known [members, b, s]: l(t); `before` [members, b, W]: of the W tokens before the first position.
        """
        members, b, s = known.shape
        history = known.new_zeros(members, b, self.length) if before is None else before
        latest = torch.full((b, s), -self.length - 1, device=known.device)  # where t's text starts; else far before
        if starts is not None:
            latest = torch.where(starts, torch.arange(s, device=known.device), latest).cummax(1).values
        places = torch.arange(s, device=known.device).unsqueeze(1) - torch.arange(self.length, device=known.device)
        found = torch.cat([history, known], -1)[..., places + self.length]
        return found.masked_fill(places <= latest.unsqueeze(-1), 0)
