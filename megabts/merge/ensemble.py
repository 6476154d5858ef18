"""Branch-Train-Merge's ensemble (Li et al., arXiv 2208.03306, section 3): members' next-token probabilities, mixed.

The weight of a member at a position is its posterior given all that the position can see, by Bayes' rule with a
uniform prior: softmax over the members of the log-likelihood each gave to the tokens so far. Probabilities are
mixed, not logits. Where attention does not cross documents, the posterior too starts anew with each document. There is
no training.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from megabts.config.methods import BTMConfig
from megabts.config.model import ModelConfig
from megabts.merge.members import SideBySide, log_likelihoods, log_probabilities
from megabts.model.attention import Context, LayerCache
from megabts.model.backend import Backend

EVIDENCE, NEXT = "evidence", "next"
"""In a generation's memory: log-likelihoods of the texts so far [b, members], log-probabilities of the next token
[b, members, V]."""


class Ensemble(SideBySide):
    """Members run side by side on the same tokens; their outputs meet after the heads."""

    def __init__(self, config: ModelConfig, btm: BTMConfig, backend: Backend) -> None:
        super().__init__(config, list(btm.members), backend)
        self.top_k = btm.top_k

    def run_layers(
        self, first: int, last: int, hidden: Tensor, context: Context, cache: Sequence[LayerCache] | None = None
    ) -> Tensor:
        """Layers [first, last) of every member, on [members, s, b, D]."""
        states = [
            member.run_layers(first, last, state, context, cache[index : index + 1] if cache else None)
            for index, (member, state) in enumerate(zip(self.decoders(), hidden, strict=True))
        ]
        return torch.stack(states)

    def logits(self, hidden: Tensor, context: Context, *, last: bool = False) -> Tensor:
        """[members, s, b, D] -> log-probabilities of the next token [b, s, V], or [b, 1, V] after the last position.

        `context.memory` tells of the positions before these, and is brought up to date.
        """
        tokens, memory, members = context.tokens, context.memory, self.decoders()
        assert tokens is not None
        known = [
            log_likelihoods(member, state[:-1], tokens[:, 1:])
            for member, state in zip(members, hidden, strict=True)
            if len(state) > 1
        ]
        predicted, before = (memory[key].transpose(0, 1) if key in memory else None for key in (NEXT, EVIDENCE))
        first = tokens[:, 0].expand(len(members), -1).unsqueeze(-1)
        # Of the first token here, by what came before.
        start = torch.zeros(first.shape, device=hidden.device) if predicted is None else predicted.gather(-1, first)
        evidence = _evidence(torch.cat([start, torch.stack(known)], -1) if known else start, context.starts, before)
        weights = self._log_weights(evidence)
        if last:
            hidden, weights = hidden[:, -1:], weights[..., -1:]
        mixed, following = None, []
        for member, state, weight in zip(members, hidden, weights, strict=True):
            share = log_probabilities(member.logits(state))
            following.append(share[:, -1])
            share = share + weight.unsqueeze(-1).to(share.dtype)
            mixed = share if mixed is None else torch.logaddexp(mixed, share)
        memory[EVIDENCE], memory[NEXT] = evidence[..., -1].T, torch.stack(following, 1)
        assert mixed is not None
        return mixed

    def loss(self, hidden: Tensor, labels: Tensor, mask: Tensor, context: Context) -> Tensor:
        """[members, s, b, D] and labels, mask [b, s] -> sum of the mixture's cross-entropy, nats.

        A label that the mask leaves out is read all the same: it counts as evidence for later positions.
        """
        given = torch.stack(
            [log_likelihoods(member, state, labels) for member, state in zip(self.decoders(), hidden, strict=True)]
        )
        weights = self._log_weights(_evidence(pad(given[..., :-1], (1, 0)), context.starts, None))
        mixed = (weights + given).logsumexp(0)
        return -(mixed * mask).sum().to(given.dtype)

    def _log_weights(self, evidence: Tensor) -> Tensor:
        """Log posterior [members, b, s]; of the `top_k` likeliest members where asked for, earlier ones first."""
        if 0 < self.top_k < len(evidence):
            ranks = evidence.argsort(stable=True, dim=0, descending=True).argsort(0)
            evidence = evidence.masked_fill(ranks >= self.top_k, -torch.inf)
        return evidence.log_softmax(0)


def _evidence(known: Tensor, starts: Tensor | None, before: Tensor | None) -> Tensor:
    """Log-likelihood of all tokens that a position sees, itself included, float64 [members, b, s].

    known [members, b, s]: log-likelihood of each position's token given those before it, whatever it is where a text
    starts; before [members, b]: the evidence at the position before the first.
    """
    total = known.double().cumsum(-1)
    if before is not None:
        total = total + before.unsqueeze(-1)
    if starts is None:
        return total
    places = torch.arange(starts.shape[1], device=starts.device)
    latest = torch.where(starts, places, -1).cummax(-1).values  # where this position's text starts; -1: before these
    base = total.gather(-1, latest.clamp(min=0).expand_as(total))
    return total - base.masked_fill(latest < 0, 0)
