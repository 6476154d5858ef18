"""A BTS model: frozen members running side by side, stitch layers between them.

Every member keeps its own embedding and layers and reads the same tokens; at a stitch point they meet. The model's
output is the hub's, so final norm and head of the experts are not even built. Members are frozen: autograd records
nothing before the first trainable stitch, and downstream of it computes activation gradients only.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megabts.bts.plan import stitch_plan
from megabts.bts.stitch import Stitch
from megabts.config.methods import HUB, BTSConfig
from megabts.config.model import ModelConfig
from megabts.errors import UsageError
from megabts.model.attention import Context, LayerCache, Recompute
from megabts.model.backend import Backend
from megabts.model.decoder import Decoder
from megabts.parallel.sharding import ParamMeta, name_seed, named_metas
from megabts.parallel.tensor import freeze

GateObserver = Callable[[int, Sequence[Tensor]], None]


class BTSModel(nn.Module):
    """Members (hub first), frozen, and K stitch layers. Hidden is [members, s, b, D]; after layer L, [1, s, b, D].

    Raises UsageError for a member's name that a module cannot have, or more stitch layers than layers.
    """

    def __init__(self, config: ModelConfig, bts: BTSConfig, backend: Backend, *, recompute: Recompute = "none") -> None:
        super().__init__()
        _check_names(bts)
        self.config = config
        self.bts = bts
        self.dtype = backend.dtype
        self.num_members = len(bts.members)
        self.members = nn.ModuleDict(
            {name: Decoder(config, backend, recompute=recompute, with_head=name == HUB) for name in bts.members}
        )
        freeze(self.members.parameters())
        self.plan = stitch_plan(config.num_layers, bts.num_stitch_layers, bts.alternating)
        self.stitches = nn.ModuleList(Stitch(point.kind, config.hidden_size, bts, backend) for point in self.plan)
        if "*" not in bts.trainable:
            freeze(p for name, p, _ in self.own_parameters() if member_of(name) not in bts.trainable)
        self._observers: list[GateObserver] = []

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [b, s] -> [members, s, b, D]."""
        return torch.stack([member.embed(tokens) for member in self._decoders()])

    def run_layers(
        self, first: int, last: int, hidden: Tensor, context: Context, cache: Sequence[LayerCache] | None = None
    ) -> Tensor:
        """Layers [first, last) of every member, and the stitches after them, on [members, s, b, D]."""
        states, begin = list(hidden.unbind(0)), first
        for index, (point, stitch) in enumerate(zip(self.plan, self.stitches, strict=True)):
            if not first < point.after <= last:
                continue
            states, begin = self._run_members(begin, point.after, states, context, cache), point.after
            seeds = context.dropout_seeds and [name_seed(f"stitch {index}", seed) for seed in context.dropout_seeds]
            states, gates = stitch(states, seeds, last=point.after == self.config.num_layers)
            for observer in self._observers:
                observer(index, gates)
        return torch.stack(self._run_members(begin, last, states, context, cache))

    def logits(self, hidden: Tensor) -> Tensor:
        """The hub's: [1, s, b, D] -> [b, s, V]."""
        logits: Tensor = self.hub.logits(hidden[0])
        return logits

    def loss(self, hidden: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """The hub's: [1, s, b, D] and labels, mask [b, s] -> sum of the cross-entropy, nats."""
        loss: Tensor = self.hub.loss(hidden[0], labels, mask)
        return loss

    def own_parameters(self) -> Iterator[tuple[str, nn.Parameter, ParamMeta]]:
        """The stitches': members stay where they are."""
        return (item for item in named_metas(self) if item[0].startswith("stitches."))

    @property
    def hub(self) -> Decoder:
        """Member 0, whose output is the model's."""
        hub = self.members[HUB]
        assert isinstance(hub, Decoder)
        return hub

    @contextmanager
    def observe_gates(self, observer: GateObserver) -> Iterator[None]:
        """Inside the block `observer(stitch layer, gates)` sees every stitch's gates; blocks may nest."""
        self._observers.append(observer)
        try:
            yield
        finally:
            self._observers.remove(observer)

    def _decoders(self) -> list[Decoder]:
        return list(self.members.values())  # type: ignore[arg-type]

    def _run_members(
        self, first: int, last: int, states: list[Tensor], context: Context, cache: Sequence[LayerCache] | None
    ) -> list[Tensor]:
        if first == last:
            return states
        return [
            member.run_layers(first, last, state, context, cache[index : index + 1] if cache else None)
            for index, (member, state) in enumerate(zip(self._decoders(), states, strict=True))
        ]


def _check_names(bts: BTSConfig) -> None:
    """Members are entries of an `nn.ModuleDict`, which cannot hold what it has as attributes (train, keys, ...)."""
    taken = [name for name in bts.experts if hasattr(nn.ModuleDict(), name)]
    if taken:
        raise UsageError(f"bts.experts has a member named {taken[0]!r}, a name torch modules use; give it another one")


def member_of(parameter: str) -> str:
    """The member a parameter belongs to: "stitches.2.gates.code.weight" -> "code"; the hub has a stitch's others."""
    parts = parameter.split(".")
    return parts[3] if parts[2] in ("projections", "gates") else HUB
