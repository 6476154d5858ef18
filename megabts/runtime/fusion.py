"""Fusing element-wise work: at small widths passes over memory, not matrix products, are most of a step.

Norms, rotations, activations, softmax and mixing are written as small functions of tensors. `Fuse` makes each of them
what is called: the function itself (`eager`), or one made by torch.compile, which is one or two passes over memory
instead of one for every operation in it (`compiled`). Both compute the same; which one is used is decided once, where
the layer library is made, and handed down.
"""

import shutil
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, Protocol, TypeVar

import torch

from megabts.errors import UserError

Function = TypeVar("Function", bound=Callable[..., Any])

SMALLEST = 1 << 16
"""Elements of a function's first argument below which calling what is compiled costs more than it saves."""
LONG_RUN = 1000
"""Steps that pay for compiling: about 20 seconds on CPU the first time, a few when it is cached."""


class Fuse(Protocol):
    """Makes of a function of tensors one that computes the same."""

    def __call__(self, function: Function, /) -> Function:
        """The function to call in its place."""
        ...


def eager(function: Function) -> Function:
    """The function as it is."""
    return function


@cache
def _compile(function: Callable[..., Any]) -> Any:
    fast = torch.compile(function)

    def run(first: torch.Tensor, *rest: Any) -> Any:
        return (fast if first.numel() >= SMALLEST else function)(first, *rest)

    return run


def compiled(function: Function) -> Function:
    """Compiled when it is first called with tensors that are large enough, and for every new dtype or rank of them."""
    run: Function = _compile(function)
    return run


def choose_fuse(setting: Literal["auto", "on", "off"], device: torch.device | str, steps: int) -> Fuse:
    """What a training run of so many steps uses; `auto` compiles where a compiler is found and the run is long.

    Raises UserError for `on` where there is no compiler.
    """
    if setting == "off" or (setting == "auto" and steps < LONG_RUN):
        return eager
    if can_compile(device):
        return compiled
    if setting == "on":
        raise UserError("train.compile is on, and there is no C++ compiler (g++, clang++); install one or set it off")
    return eager


def can_compile(device: torch.device | str) -> bool:
    """Whether torch.compile has what it needs: Triton, which comes with torch, on a GPU; a C++ compiler on CPU."""
    return torch.device(device).type != "cpu" or any(map(shutil.which, ("g++", "clang++")))
