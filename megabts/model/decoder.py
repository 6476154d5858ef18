"""A Llama-family decoder, and the interface that every kind of model here satisfies.

Anything with `embed`, `run_layers`, `logits` and `loss` is a `Model`: trainer, evaluator, generator and pipeline are
written against these and nothing else. What passes between them, `hidden`, is one tensor: [s', b, D] for a dense
decoder, [members, s', b, D] for a stitched one. s' is s / tp under sequence parallelism, else s.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from megabts.config.model import ModelConfig
from megabts.model.attention import Context, LayerCache, make_context
from megabts.model.backend import Backend, Recompute
from megabts.model.layer import Layer, MakeRouted
from megabts.model.part import Part
from megabts.parallel.sharding import ParamMeta, named_metas

EMBEDDING = "embedding.weight"
"""What the first and the last part of a decoder with tied embeddings both hold."""


class Model(Protocol):
    """What trainer, evaluator and generator need."""

    config: ModelConfig
    dtype: torch.dtype
    part: Part
    """What of the model this rank holds."""
    num_local_members: int
    """Members (or attention experts) on this rank, each with a cache of its own in generation."""

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [b, s] -> hidden."""
        ...

    def run_layers(
        self, first: int, last: int, hidden: Tensor, context: Context, cache: Sequence[LayerCache] | None = None
    ) -> Tensor:
        """Layers [first, last), and what stands between them, on hidden; one cache per member."""
        ...

    def logits(self, hidden: Tensor, context: Context, *, last: bool = False) -> Tensor:
        """Hidden -> logits [b, s, V], or [b, 1, V] after the last position; `context` as in `run_layers`."""
        ...

    def loss(self, hidden: Tensor, labels: Tensor, mask: Tensor, context: Context) -> Tensor:
        """Sum over positions of the cross-entropy in nats; labels and mask [b, s]; `context` as in `run_layers`."""
        ...

    def wire_shape(self, depth: int, s: int, b: int) -> tuple[int, ...]:
        """Shape, on this rank, of hidden after `depth` layers, for b whole sequences of s tokens."""
        ...

    def trains(self, layers: range) -> bool:
        """Whether anything trains in one of this part's chunks, with the embedding or head that belong to it."""
        ...

    def own_parameters(self) -> Iterator[tuple[str, nn.Parameter, ParamMeta]]:
        """What this model's checkpoint holds: everything but members that are kept elsewhere."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """All that is here, members' too."""
        ...

    def train(self, mode: bool = True) -> object:
        """Training (dropout on) or evaluation mode."""
        ...


class Decoder(nn.Module):
    """Embedding, L layers, final norm and head; or the `part` of them that one pipeline rank holds.

    Names do not depend on the part. The part with the head of tied embeddings has `embedding.weight` too, which starts
    alike on both; the matrix's gradient is the sum of theirs. `with_head=False` leaves final norm and head away: an
    expert inside a BTS model never runs them. `make_routed` makes every layer's feed-forward, `make_attention` its
    attentions (see `Layer`): then there is a cache for each of them.
    """

    num_local_members = 1

    def __init__(
        self,
        config: ModelConfig,
        backend: Backend,
        *,
        part: Part | None = None,
        recompute: Recompute = "none",
        with_head: bool = True,
        make_routed: MakeRouted | None = None,
        make_attention: MakeRouted | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        self.dtype = backend.dtype
        self.part = part or Part.whole(config.num_layers)
        self.num_slices = backend.tp.size if backend.sequence else 1
        self.many_attentions = make_attention is not None
        with_head = with_head and self.part.head
        v, d = config.vocab_size, config.hidden_size
        if self.part.embedding or (with_head and config.tie_embeddings):
            self.embedding = backend.vocabulary(v, d, config.init_std)
        self.layers = nn.ModuleDict(
            {str(i): Layer(config, backend, recompute, make_routed, make_attention) for i in self.part.layers}
        )
        if with_head:
            self.final_norm = backend.norm(d, config.norm_eps, summed=backend.sequence)
            self.head = self.embedding if config.tie_embeddings else backend.vocabulary(v, d, config.init_std)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [b, s] -> [s', b, D]."""
        hidden: Tensor = self.embedding(tokens.T)
        return hidden

    def run_layers(
        self, first: int, last: int, hidden: Tensor, context: Context, cache: Sequence[LayerCache] | None = None
    ) -> Tensor:
        """Layers [first, last) on [s', b, D]."""
        caches = cache[0] if cache and not self.many_attentions else cache
        with self.backend.forward_context(hidden.shape[:2].numel()):
            for index in range(first, last):
                hidden = self.layers[str(index)](hidden, context, index, caches)
        return hidden

    def logits(self, hidden: Tensor, context: Context | None = None, *, last: bool = False) -> Tensor:
        """[s', b, D] -> logits [b, s, V], or [b, 1, V] after the last position (s' = s)."""
        return self.head.logits(self.final_norm(hidden[-1:] if last else hidden)).transpose(0, 1)

    def loss(self, hidden: Tensor, labels: Tensor, mask: Tensor, context: Context | None = None) -> Tensor:
        """[s', b, D] and labels, mask [b, s] -> sum of the cross-entropy, nats."""
        return self.head.loss(self.final_norm(hidden), labels.T, mask.T)

    def wire_shape(self, depth: int, s: int, b: int) -> tuple[int, ...]:
        """[s', b, D], after any number of layers."""
        assert s % self.num_slices == 0, f"{s} positions do not divide among {self.num_slices} ranks"
        return s // self.num_slices, b, self.config.hidden_size

    def trains(self, layers: range) -> bool:
        """Whether any parameter of the chunk `layers` requires a gradient."""
        modules = [self.layers[str(index)] for index in layers]
        if layers.start == 0 and self.part.embedding:
            modules.append(self.embedding)
        if layers.stop == self.config.num_layers and self.part.head:
            modules += [self.final_norm, self.head]
        return any(parameter.requires_grad for module in modules for parameter in module.parameters())

    def own_parameters(self) -> Iterator[tuple[str, nn.Parameter, ParamMeta]]:
        """All of them."""
        return named_metas(self)


def sequence_loss(
    model: Model,
    tokens: Tensor,
    labels: Tensor,
    mask: Tensor,
    *,
    document_ids: Tensor | None = None,
    dropout_seeds: Sequence[int] | None = None,
) -> Tensor:
    """Sum of the cross-entropy of whole sequences from position 0, in nats; all arguments [b, s]."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    context = make_context(model.config, positions, model.dtype, document_ids=document_ids, dropout_seeds=dropout_seeds)
    hidden = model.run_layers(0, model.config.num_layers, model.embed(tokens), context)
    return model.loss(hidden, labels, mask, context)
