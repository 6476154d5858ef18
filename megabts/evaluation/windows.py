"""Loss by position on windows that begin where a text begins: the protocol on which methods are compared.

Every window is scored by itself, from its first token on, so a method that learns about a text while reading it (an
ensemble's posterior, a router, a gate) starts at each window from nothing. Windows are never packed. A window is
`length` + 1 tokens; its position t predicts token t + 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megabts.data.indexed import IndexedDataset
from megabts.data.validation import ValidationSet
from megabts.errors import UserError
from megabts.evaluation.perplexity import DomainLoss, to_device
from megabts.model.attention import make_context
from megabts.model.decoder import Model

MIXED = "mixed"
"""Name of the windows that switch domains."""
SEGMENT = (32, 64)
"""Shortest and longest segment of a mixed window, tokens."""


def document_windows(indexed: IndexedDataset, length: int, most: int | None = None) -> np.ndarray:
    """The first `length` + 1 tokens of documents that are so long: int64 [windows, length + 1].

    Of more than `most` such documents that many, spread evenly. Raises UserError when there is none.
    """
    documents = [number for number in range(len(indexed)) if indexed.lengths[number] > length]
    if not documents:
        raise UserError(
            f"{indexed.prefix} has no document of more than {length} tokens; use shorter windows (--seq-length)"
        )
    taken = len(documents) if most is None else min(most, len(documents))
    chosen = [documents[index * len(documents) // taken] for index in range(taken)]
    return np.stack([np.asarray(indexed.get(number, 0, length + 1), dtype=np.int64) for number in chosen])


def mixed_windows(
    domains: Mapping[str, IndexedDataset], length: int, count: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Windows that change domain every 32 to 64 tokens: (tokens int64 [count, length + 1], domains int64 alike).

    Each segment is the beginning of a document that is long enough, of another domain than the segment before it; the
    second array holds the domain's number of every token. Raises UserError for fewer than two domains, or one without
    long enough documents.
    """
    if len(domains) < 2:
        raise UserError("mixed windows need at least two domains; give more --data DOMAIN=PREFIX")
    names, rng = list(domains), np.random.RandomState(seed)
    long_enough = [np.flatnonzero(np.asarray(domains[name].lengths) >= SEGMENT[1]) for name in names]
    for name, found in zip(names, long_enough, strict=True):
        if not len(found):
            raise UserError(f"{domains[name].prefix} has no document of {SEGMENT[1]} tokens to mix windows from")
    tokens, owners = np.zeros((2, count, length + 1), dtype=np.int64)
    for row in range(count):
        position, domain = 0, -1
        while position < length + 1:
            others = [number for number in range(len(names)) if number != domain]
            domain = others[rng.randint(len(others))]
            size = min(rng.randint(SEGMENT[0], SEGMENT[1] + 1), length + 1 - position)
            document = long_enough[domain][rng.randint(len(long_enough[domain]))]
            tokens[row, position : position + size] = domains[names[domain]].get(int(document), 0, size)
            owners[row, position : position + size] = domain
            position += size
    return tokens, owners


@torch.inference_mode()
def position_losses(model: Model, windows: np.ndarray, device: torch.device, micro_batch: int = 8) -> Tensor:
    """Cross-entropy, nats, of every position of windows [N, length + 1]: float64 [N, length] on CPU.

    The model must be in evaluation mode, and whole on this rank.
    """
    losses = []
    for start in range(0, len(windows), micro_batch):
        ids = to_device(windows[start : start + micro_batch], device)
        tokens, labels = ids[:, :-1], ids[:, 1:]
        context = make_context(model.config, torch.arange(tokens.shape[1], device=device), model.dtype, tokens=tokens)
        hidden = model.run_layers(0, model.config.num_layers, model.embed(tokens), context)
        logits = model.logits(hidden, context).double()
        losses.append(logits.logsumexp(-1).sub(logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)).cpu())
    return torch.cat(losses)


@dataclass(frozen=True)
class WindowLosses:
    """What one set of windows gave."""

    mean: DomainLoss
    by_position: list[tuple[int, float]]
    """As of `by_position`."""


def document_losses(
    model: Model, sets: Mapping[str, ValidationSet], most: int | None, device: torch.device, micro_batch: int = 8
) -> dict[str, WindowLosses]:
    """Losses on each domain's document windows and, of several domains, on as many mixed ones as there are at most.

    Windows are as long as those of `sets`. Raises UserError where documents are too short.
    """
    length = next(iter(sets.values())).seq_length
    windows = {domain: document_windows(found.indexed, length, most) for domain, found in sets.items()}
    if len(sets) > 1:
        count = max(map(len, windows.values()))
        windows[MIXED] = mixed_windows({domain: found.indexed for domain, found in sets.items()}, length, count)[0]
    results = {}
    for name, tokens in windows.items():
        losses = position_losses(model, tokens, device, micro_batch)
        bytes_per_token = None if name == MIXED else sets[name].bytes_per_token
        mean = DomainLoss(losses.mean().item(), losses.numel(), bytes_per_token)
        results[name] = WindowLosses(mean, by_position(losses))
    return results


def by_position(losses: Tensor) -> list[tuple[int, float]]:
    """Means over stretches of positions that double, from losses [N, length]: (1, ..), (2, ..), (4, ..), (8, ..), ...

    A pair holds the last position of its stretch, from 1, and the mean loss there, nats.
    """
    length, first, stretches = losses.shape[1], 0, []
    while first < length:
        last = min(max(1, 2 * first), length)
        stretches.append((last, losses[:, first:last].mean().item()))
        first = last
    return stretches
