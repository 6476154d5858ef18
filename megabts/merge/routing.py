"""Expert routing: a linear router reads the beginning of a text and gives all of it to one member.

A baseline of the BTS paper (arXiv 2502.00075, section 4). The router, D -> members, reads the mean input embedding of
the first t tokens, by the embedding of the first member: it is one fixed reading of the text, and the seed's, where
the seed is listed first. In training t is uniform in `min_tokens`..`max_tokens`, drawn from the run's seed and
the sample's number, and the target is the member with the lowest loss on the sequence. An evaluation window is
judged by its first `max_tokens` tokens (all, if it is shorter), a prompt by all of it.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megabts.config.methods import RoutingConfig
from megabts.config.model import ModelConfig
from megabts.merge.members import SideBySide, log_likelihoods
from megabts.model.attention import Context, LayerCache
from megabts.model.backend import Backend
from megabts.model.decoder import Decoder
from megabts.parallel.sharding import ParamMeta, name_seed

SCORES, CHOICE = "scores", "choice"
"""In a forward pass's memory: the router's logits [b, members] and the member of each row [b]."""


class Router(nn.Module):
    """Mean embeddings [b, D] -> logits [b, members], in float32 at least; starts at zero."""

    def __init__(self, num_members: int, hidden_size: int, backend: Backend) -> None:
        super().__init__()
        self.metas = {"weight": ParamMeta((num_members, hidden_size))}
        self.weight = nn.Parameter(torch.empty(num_members, hidden_size, dtype=backend.dtype, device=backend.device))

    def forward(self, means: Tensor) -> Tensor:
        """[b, D] -> [b, members]."""
        return F.linear(means, self.weight.to(means.dtype))


class Routing(SideBySide):
    """Frozen members and a router.

    Hidden is [members, s, b, D] before the first layer and in training, where all members judge every sequence;
    elsewhere it is [s, b, D] of the members chosen, row by row. `context.dropout_seeds` tells that it is training.
    """

    def __init__(self, config: ModelConfig, routing: RoutingConfig, backend: Backend) -> None:
        super().__init__(config, list(routing.members), backend)
        self.routing = routing
        self.router = Router(len(routing.members), config.hidden_size, backend)

    def run_layers(
        self, first: int, last: int, hidden: Tensor, context: Context, cache: Sequence[LayerCache] | None = None
    ) -> Tensor:
        """Layers [first, last): of all members in training, else of each row's member on its rows."""
        if first == 0 and CHOICE not in context.memory:
            context.memory[SCORES] = scores = self.router(self._means(hidden[0], context))
            context.memory[CHOICE] = scores.argmax(-1)
        if context.dropout_seeds is not None:
            with torch.no_grad():
                states = zip(self.decoders(), hidden, strict=True)
                return torch.stack([member.run_layers(first, last, state, context) for member, state in states])
        if first == 0:
            choice = context.memory[CHOICE]
            hidden = hidden[choice, :, torch.arange(len(choice), device=choice.device)].transpose(0, 1).contiguous()
        out = torch.empty_like(hidden)
        for index, member, rows in self._shares(context):
            if rows is None:
                return member.run_layers(first, last, hidden, context, cache[index : index + 1] if cache else None)
            caches = [cache[index].of_rows(rows)] if cache else None
            out[:, rows] = member.run_layers(first, last, hidden[:, rows], context.of_rows(rows), caches)
        return out

    def logits(self, hidden: Tensor, context: Context, *, last: bool = False) -> Tensor:
        """[s, b, D] -> logits [b, s, V] of each row's member, or [b, 1, V] after the last position."""
        hidden = hidden[-1:] if last else hidden
        out = hidden.new_empty(hidden.shape[1], hidden.shape[0], self.config.vocab_size)
        for _, member, rows in self._shares(context):
            if rows is None:
                return member.logits(hidden)
            out[rows] = member.logits(hidden[:, rows])
        return out

    def loss(self, hidden: Tensor, labels: Tensor, mask: Tensor, context: Context) -> Tensor:
        """Evaluation: [s, b, D] -> sum of the cross-entropy of each row's member, nats.

        Training: [members, s, b, D] -> the router's cross-entropy, each sequence's times its tokens that count, since
        a step divides by the tokens: nats per sequence. Among equals the first member is the target.
        """
        if context.dropout_seeds is not None:
            chosen = F.cross_entropy(context.memory[SCORES], self._targets(hidden, labels, mask), reduction="none")
            return (chosen * mask.sum(1)).sum()
        losses = []
        for _, member, rows in self._shares(context):
            mine = slice(None) if rows is None else rows
            losses.append(member.loss(hidden[:, mine], labels[mine], mask[mine]))
        return torch.stack(losses).sum()

    @torch.no_grad()
    def _targets(self, hidden: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """The member with the lowest loss on each sequence, [b]."""
        pairs = zip(self.decoders(), hidden, strict=True)
        losses = [-(log_likelihoods(member, state, labels) * mask).sum(1) for member, state in pairs]
        return torch.stack(losses).argmin(0)

    def _means(self, embedding: Tensor, context: Context) -> Tensor:
        """Mean over the positions that the router may read of [s, b, D]: [b, D]."""
        s, b, _ = embedding.shape
        least, most = self.routing.min_tokens, self.routing.max_tokens
        seeds = context.dropout_seeds
        if seeds is not None:
            lengths = [least + name_seed("router", seed) % (most - least + 1) for seed in seeds]
        else:
            lengths = [most if context.prompt_length is None else context.prompt_length] * b
        read = torch.arange(s, device=embedding.device) < torch.tensor(lengths, device=embedding.device).unsqueeze(1)
        if context.starts is not None:  # before its text starts a row is padding
            read &= context.starts.cumsum(1) > 0
        exact = torch.promote_types(embedding.dtype, torch.float32)
        shares = read.to(exact) / read.sum(1, keepdim=True)
        return torch.einsum("bs,sbd->bd", shares, embedding.to(exact))

    def _shares(self, context: Context) -> Iterator[tuple[int, Decoder, Tensor | None]]:
        """(number, member, its rows) of each member that was chosen; rows None: all."""
        choice, members = context.memory[CHOICE], self.decoders()
        chosen = choice.unique().tolist()
        for index in chosen:
            yield index, members[index], None if len(chosen) == 1 else (choice == index).nonzero().squeeze(1)
