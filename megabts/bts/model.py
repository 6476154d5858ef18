"""A BTS model: frozen members running side by side, stitch layers between them.

Every member keeps its own embedding and layers and reads the same tokens; at a stitch point they meet. The model's
output is the hub's, so final norm and head of the experts are not even built; with `bts.output` mixture it is that of
all (see `output`). Members are frozen: autograd records nothing before the first trainable stitch, and downstream of it
computes activation gradients only.

Members may lie on several ranks (`ep`, see `placement`), and a rank may hold a part of the layers of its members
(`part`, a pipeline's). A rank then builds only what it runs; names do not depend on it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from megabts.bts.flow import gradient_flow, needs_gradient
from megabts.bts.output import OutputMixture
from megabts.bts.placement import ALONE, Exchange, Exchanges, Placement, broadcast
from megabts.bts.plan import stitch_plan
from megabts.bts.stitch import Stitch
from megabts.config.methods import HUB, BTSConfig
from megabts.config.model import ModelConfig
from megabts.errors import UsageError
from megabts.model.attention import Context, LayerCache
from megabts.model.backend import Backend, Recompute
from megabts.model.decoder import Decoder
from megabts.model.part import Part
from megabts.parallel.mesh import Axis
from megabts.parallel.sharding import ParamMeta, name_seed, named_metas
from megabts.parallel.tensor import freeze

GateObserver = Callable[[int, Tensor], None]


class BTSModel(nn.Module):
    """Members (hub first), frozen, and K stitch layers.

    Hidden is [members, s', b, D] of this rank's members, s' being s / tp under sequence parallelism, else s. After
    layer L it is [1, s', b, D] on the hub's rank and [0, s', b, D] on others, which then only follow: their loss is 0.
    Where the output is a mixture it stays [members, s', b, D].

    Raises UsageError for a member's name that a module cannot have, stitch layers that `stitch_plan` refuses, or a
    mixture of members that lie on several ranks.
    """

    def __init__(
        self,
        config: ModelConfig,
        bts: BTSConfig,
        backend: Backend,
        *,
        ep: Axis = ALONE,
        part: Part | None = None,
        exchange: Exchange = "auto",
        recompute: Recompute = "none",
    ) -> None:
        super().__init__()
        _check_names(bts)
        self.mixes = bts.output == "mixture"
        if self.mixes and ep.size > 1:
            raise UsageError(
                f"bts.output mixture needs all members' heads on one rank; set parallel.expert 1, not {ep.size}"
            )
        self.config = config
        self.bts = bts
        self.backend = backend
        frozen = backend.frozen()
        self.dtype = frozen.dtype
        """Of hidden states, as members make them; a stitch computes in its own."""
        self.stitch_dtype = backend.dtype
        self.num_slices = backend.tp.size if backend.sequence else 1
        self.placement = Placement.of(bts.members, ep, exchange)
        self.num_members = len(bts.members)
        self.num_local_members = len(self.placement.local)
        self.part = part = part or Part.whole(config.num_layers)
        self.members = nn.ModuleDict(
            {
                name: Decoder(config, frozen, part=part, recompute=recompute, with_head=self.mixes or name == HUB)
                for name in self.placement.local
            }
        )
        freeze(self.members.parameters())
        self.plan = stitch_plan(config.num_layers, bts)
        self.flows = gradient_flow(self.plan, bts)
        self.stitches = nn.ModuleDict(
            {
                str(index): Stitch(flow.point.kind, config.hidden_size, bts, backend, self.placement, flow)
                for index, flow in enumerate(self.flows)
                if any(chunk.start < flow.point.after <= chunk.stop for chunk in part.chunks)
            }
        )
        self.output = None
        if self.mixes and part.head:
            self.output = OutputMixture(bts.members, config.hidden_size, bts.evidence, backend)
        if "*" not in bts.trainable:
            freeze(p for name, p, _ in self.own_parameters() if member_of(name) not in bts.trainable)
        self._observers: list[GateObserver] = []

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [b, s] -> [members, s', b, D]."""
        return torch.stack([member.embed(tokens) for member in self._decoders()])

    def run_layers(
        self, first: int, last: int, hidden: Tensor, context: Context, cache: Sequence[LayerCache] | None = None
    ) -> Tensor:
        """Layers [first, last) of this rank's members, and the stitches after them, on [members, s', b, D]."""
        with self.backend.forward_context(hidden.shape[1:3].numel()):
            return self._run_layers(first, last, hidden, context, cache)

    def _run_layers(
        self, first: int, last: int, hidden: Tensor, context: Context, cache: Sequence[LayerCache] | None
    ) -> Tensor:
        exchanges, needs = Exchanges(self.placement.ep), needs_gradient(self.flows, first)
        shape = hidden.shape[1:]
        states = [  # what needs no gradient here is not to be recorded because another member's state does
            state if name in needs else state.detach()
            for name, state in zip(self.placement.local, exchanges.enter(hidden).unbind(0), strict=False)
        ]
        begin = first
        for index, point in enumerate(self.plan):
            if first < point.after <= last:
                states = self._run_members(begin, point.after, states, context, cache)
                states, begin = self.stitch(index, states, context, exchanges), point.after
        states = self._run_members(begin, last, states, context, cache)
        return exchanges.leave(torch.stack(states) if states else hidden.new_empty(0, *shape))

    def stitch(self, index: int, states: list[Tensor], context: Context, exchanges: Exchanges) -> list[Tensor]:
        """States [s', b, D] of this rank's members after stitch layer `index`, or the hub's alone after the last."""
        stitch, flow = self.stitches[str(index)], self.flows[index]
        assert isinstance(stitch, Stitch)
        seeds = context.dropout_seeds and [name_seed(f"stitch {index}", seed) for seed in context.dropout_seeds]
        new, gates = stitch(
            [state.to(self.stitch_dtype) for state in states],
            seeds,
            last=flow.point.after == self.config.num_layers and not self.mixes,
            exchanges=exchanges,
            with_gates=self.observed,
        )
        if flow.after:
            exchanges.begin_backward(states[0])
        if self._observers:
            self._tell(index, stitch.mean_gates(gates, states[0]))
        return [state.to(self.dtype) for state in new]

    def _tell(self, place: int, gates: Tensor) -> None:
        for observer in self._observers:
            observer(place, gates)

    def _output_observer(self) -> Callable[[Tensor], None] | None:
        return partial(self._tell, len(self.plan)) if self._observers else None

    def _run_members(
        self, first: int, last: int, states: list[Tensor], context: Context, cache: Sequence[LayerCache] | None
    ) -> list[Tensor]:
        if first == last:
            return states
        return [
            member.run_layers(first, last, state, context, cache[index : index + 1] if cache else None)
            for index, (member, state) in enumerate(zip(self._decoders(), states, strict=True))
        ]

    def logits(self, hidden: Tensor, context: Context | None = None, *, last: bool = False) -> Tensor:
        """The hub's: [1, s', b, D] -> [b, s, V], on every rank; outside autograd where there are several.

        Or [b, 1, V] after the `last` position (s' = s). A mixture's, from [members, s', b, D], are log-probabilities.
        """
        if self.output is not None:
            observe = self._output_observer()
            return self.output.logits(self._decoders(), hidden, context, last=last, observe=observe)
        ep, hidden = self.placement.ep, hidden[:, -1:] if last else hidden
        if ep.size == 1:
            return self.hub.logits(hidden[0])
        _, slice_length, b, _ = hidden.shape
        shape = (b, slice_length * self.num_slices, self.config.vocab_size)
        with torch.no_grad():
            own = self.hub.logits(hidden[0]) if self.placement.has_hub else hidden.new_empty(shape)
            return broadcast(own, ep)

    def loss(self, hidden: Tensor, labels: Tensor, mask: Tensor, context: Context | None = None) -> Tensor:
        """The hub's: [1, s', b, D] and labels, mask [b, s] -> sum of the cross-entropy, nats; or the mixture's.

        On other ranks 0, to be run backward like the hub's: that runs their part of the exchanges.
        """
        if self.output is not None:
            return self.output.loss(self._decoders(), hidden, labels, mask, context, self._output_observer())
        if self.placement.has_hub:
            return self.hub.loss(hidden[0], labels, mask)
        return hidden.sum(dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)

    def wire_shape(self, depth: int, s: int, b: int) -> tuple[int, ...]:
        """[members, s', b, D] of this rank after `depth` layers, for b whole sequences of s tokens."""
        assert s % self.num_slices == 0, f"{s} positions do not divide among {self.num_slices} ranks"
        hub_alone = depth == self.config.num_layers and not self.mixes
        members = int(self.placement.has_hub) if hub_alone else self.num_local_members
        return members, s // self.num_slices, b, self.config.hidden_size

    def trains(self, layers: range) -> bool:
        """Whether anything of the stitches after these layers, or of the output, trains, on this rank."""
        inside = [
            self.stitches[str(index)]
            for index, point in enumerate(self.plan)
            if layers.start < point.after <= layers.stop
        ]
        if self.output is not None and layers.stop == self.config.num_layers:
            inside.append(self.output)
        return any(parameter.requires_grad for module in inside for parameter in module.parameters())

    def own_parameters(self) -> Iterator[tuple[str, nn.Parameter, ParamMeta]]:
        """The stitches' and the output's: members stay where they are."""
        return (item for item in named_metas(self) if not item[0].startswith("members."))

    @property
    def hub(self) -> Decoder:
        """Member 0, whose output is the model's; on its own rank."""
        hub = self.members[HUB]
        assert isinstance(hub, Decoder)
        return hub

    @contextmanager
    def observe_gates(self, observer: GateObserver) -> Iterator[None]:
        """Inside the block `observer(place, mean gates [members gated, s, b])` is told of every stitch and mixture.

        Places are numbered as in `bts.gates.gate_places`: stitch layers, then the mixture of the output, if there is
        one. Ranks that run one model must observe alike. Blocks may nest.
        """
        self._observers.append(observer)
        try:
            yield
        finally:
            self._observers.remove(observer)

    @property
    def observed(self) -> bool:
        """Whether anyone is told of gates."""
        return bool(self._observers)

    def _decoders(self) -> list[Decoder]:
        return list(self.members.values())  # type: ignore[arg-type]


def _check_names(bts: BTSConfig) -> None:
    """Members are entries of an `nn.ModuleDict`, which cannot hold what it has as attributes (train, keys, ...)."""
    taken = [name for name in bts.experts if hasattr(nn.ModuleDict(), name)]
    if taken:
        raise UsageError(f"bts.experts has a member named {taken[0]!r}, a name torch modules use; give it another one")


def member_of(parameter: str) -> str:
    """The member a parameter belongs to: "stitches.2.gates.code.weight" -> "code"; the hub has a stitch's others."""
    parts = parameter.split(".")
    kinds = [place for place, part in enumerate(parts) if part in ("projections", "gates")]
    return parts[kinds[0] + 1] if kinds else HUB
