"""The libraries that the tests of the te backend run with: Transformer Engine on a GPU, or its stand-in."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from megabts.runtime.device import have_te
from tests.te.standin import installed

_RUNS = torch.cuda.is_available() and have_te()
LIBRARIES = [
    "standin",
    pytest.param("te", marks=pytest.mark.skipif(not _RUNS, reason="needs Transformer Engine and a GPU")),
]


@dataclass(frozen=True)
class Library:
    """Where and in what a library computes, and how far it may be from the torch backend there."""

    device: str
    dtype: torch.dtype
    tolerance: float


@contextmanager
def opened(name: str) -> Iterator[Library]:
    """The library, to be found by the backend inside the block; TE's products of float32 have TF32's 10 bits."""
    if name == "te":
        yield Library("cuda", torch.float32, 2e-2)
        return
    with installed():
        yield Library("cpu", torch.float64, 1e-9)
