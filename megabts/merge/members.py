"""Whole dense models side by side, which nothing stitches: what an ensemble and expert routing have in common."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from megabts.checkpoint.source import DenseSource, check_same_shape, open_dense
from megabts.config.model import ModelConfig
from megabts.errors import UsageError
from megabts.model.backend import Backend
from megabts.model.decoder import Decoder
from megabts.model.part import Part
from megabts.parallel.sharding import ParamMeta, named_metas
from megabts.parallel.tensor import freeze

POSITIONS = 1024
"""Positions of a batch whose logits exist at one time."""


class SideBySide(nn.Module):
    """Frozen members, each with its own embedding and head; hidden is [members, s, b, D].

    Raises UsageError for a member's name that a module cannot have.
    """

    def __init__(self, config: ModelConfig, names: Sequence[str], backend: Backend) -> None:
        super().__init__()
        taken = [name for name in names if hasattr(nn.ModuleDict(), name)]
        if taken:
            raise UsageError(f"a member is named {taken[0]!r}, a name torch modules use; give it another one")
        self.config = config
        frozen = backend.frozen()
        self.dtype = frozen.dtype
        self.part = Part.whole(config.num_layers)
        self.num_local_members = len(names)
        self.members = nn.ModuleDict({name: Decoder(config, frozen) for name in names})
        freeze(self.members.parameters())

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [b, s] -> [members, s, b, D]."""
        return torch.stack([member.embed(tokens) for member in self.decoders()])

    def wire_shape(self, depth: int, s: int, b: int) -> tuple[int, ...]:
        """[members, s, b, D], after any number of layers."""
        return self.num_local_members, s, b, self.config.hidden_size

    def trains(self, layers: range) -> bool:
        """Whether anything but the members trains."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def own_parameters(self) -> Iterator[tuple[str, nn.Parameter, ParamMeta]]:
        """All but the members', which stay where they are."""
        return (item for item in named_metas(self) if not item[0].startswith("members."))

    def decoders(self) -> list[Decoder]:
        """The members, in order."""
        return list(self.members.values())  # type: ignore[arg-type]


def log_likelihoods(member: Decoder, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability, nats, [b, s], that a member gives to `tokens` [b, s] after the positions of hidden [s, b, D].

    In float32 at least; logits exist for POSITIONS positions at a time.
    """
    step = max(1, POSITIONS // hidden.shape[1])
    parts = [
        log_probabilities(member.logits(part)).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        for part, ids in zip(hidden.split(step), tokens.split(step, 1), strict=True)
    ]
    return torch.cat(parts, 1)


def log_probabilities(logits: Tensor) -> Tensor:
    """log softmax over the last dimension, in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def open_folders(
    section: str, folders: Mapping[str, str], opened: Mapping[str, DenseSource] | None = None
) -> dict[str, DenseSource]:
    """The members' folders by name, checked to fit together; those in `opened` are not read again.

    Raises UserError when one is missing, UsageError when they differ or are fewer than two.
    """
    if len(folders) < 2:
        raise UsageError(f"method {section} needs at least two members; give {section}.members '{{NAME: DIR, ...}}'")
    known = opened or {}
    sources = {name: known.get(name) or open_dense(path) for name, path in folders.items()}
    check_same_shape(sources)
    return sources
