"""What every export can be told."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

Check = Literal["logits", "tensors"]
"""How a conversion checks itself: both sides' logits in fp32 (both models in memory, one after the other), or every
stored tensor, bit for bit (the memory of one tensor)."""


@dataclass(frozen=True)
class Options:
    """Settings of an export."""

    dtype: torch.dtype | None = None
    """Of the stored weights; None: as they are."""
    max_shard_bytes: int = 5_000_000_000
    """Largest safetensors file; a tensor that is larger has a file of its own. One file's tensors are in memory."""
    check: Check = "logits"
    """How the result is checked."""
    say: Callable[[str], object] = print
    """Takes one line for the user at a time."""
