"""FP8 as Transformer Engine 2.12 does it, simulated on any device: operands rounded to 8 bits, products in their dtype.

Names are TE's where megabts (or TE's own code for the same purpose) uses them. The state that Transformer Engine keeps
in class attributes of `FP8GlobalStateManager` is kept so here too: it is what megabts must get along with.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor, nn

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


class Recipe:
    """How operands are scaled."""

    def delayed(self) -> bool:
        return isinstance(self, DelayedScaling)


@dataclass
class DelayedScaling(Recipe):
    amax_history_len: int = 1024
    reduce_amax: bool = True


@dataclass
class Float8CurrentScaling(Recipe):
    pass


@dataclass
class Float8BlockScaling(Recipe):
    pass


class FP8GlobalStateManager:
    """The open region, and what delayed scaling updates at its end."""

    FP8_ENABLED: ClassVar[bool] = False
    FP8_RECIPE: ClassVar[Recipe | None] = None
    FP8_DISTRIBUTED_GROUP: ClassVar[Any] = None
    IS_FIRST_FP8_MODULE: ClassVar[bool] = False
    AUTOCAST_DEPTH: ClassVar[int] = 0
    FP8_PARAMETERS: ClassVar[bool] = False
    RECOMPUTE: ClassVar[str] = ""
    """Of a region that is computed again: "first", then "second"."""
    states: ClassVar[dict[str, list[tuple["State", Recipe, Any]]]] = {"forward": [], "backward": []}

    @classmethod
    def reset(cls) -> None:
        cls.FP8_ENABLED = cls.IS_FIRST_FP8_MODULE = cls.FP8_PARAMETERS = False
        cls.FP8_RECIPE = cls.FP8_DISTRIBUTED_GROUP = None
        cls.AUTOCAST_DEPTH, cls.RECOMPUTE, cls.states = 0, "", {"forward": [], "backward": []}

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.FP8_ENABLED

    @classmethod
    def is_first_fp8_module(cls) -> bool:
        first, cls.IS_FIRST_FP8_MODULE = cls.IS_FIRST_FP8_MODULE, False
        return first

    @classmethod
    def update(cls, way: str) -> None:
        """Delayed scaling: largest values over the ranks, into the history; scales from it."""
        for state, recipe, group in cls.states[way]:
            assert isinstance(recipe, DelayedScaling)
            if recipe.reduce_amax and dist.is_initialized() and dist.get_world_size(group) > 1:
                dist.all_reduce(state.amax_history[0], dist.ReduceOp.MAX, group=group)
            amax = state.amax_history.amax(0)
            state.amax_history.copy_(state.amax_history.roll(-1, 0))
            state.amax_history[0] = 0
            largest = torch.finfo(E4M3 if way == "forward" else E5M2).max
            state.scale.copy_(torch.where(amax > 0, largest / amax, state.scale))


@contextmanager
def autocast(
    enabled: bool = True,
    calibrating: bool = False,
    recipe: Recipe | None = None,
    amax_reduction_group: Any = None,
) -> Iterator[None]:
    manager = FP8GlobalStateManager
    names = ("FP8_ENABLED", "FP8_RECIPE", "FP8_DISTRIBUTED_GROUP", "IS_FIRST_FP8_MODULE")
    before = [getattr(manager, name) for name in names]
    manager.FP8_ENABLED, manager.FP8_RECIPE = enabled, recipe
    manager.FP8_DISTRIBUTED_GROUP = amax_reduction_group
    if manager.AUTOCAST_DEPTH == 0:
        manager.IS_FIRST_FP8_MODULE = True
    manager.AUTOCAST_DEPTH += 1
    try:
        yield
    finally:
        for name, value in zip(names, before):
            setattr(manager, name, value)
        manager.AUTOCAST_DEPTH -= 1
        if enabled and manager.AUTOCAST_DEPTH == 0 and torch.is_grad_enabled():
            manager.update("forward")


@contextmanager
def quantized_model_init(
    enabled: bool = True, recipe: Recipe | None = None, preserve_high_precision_init_val: bool = False
) -> Iterator[None]:
    before = FP8GlobalStateManager.FP8_PARAMETERS
    FP8GlobalStateManager.FP8_PARAMETERS = enabled
    try:
        yield
    finally:
        FP8GlobalStateManager.FP8_PARAMETERS = before


def is_fp8_available(return_reason: bool = False) -> Any:
    return (True, "") if return_reason else True


is_fp8_block_scaling_available = is_fp8_available


def checkpoint(function: Callable[..., Tensor], *args: Any, use_reentrant: bool = True) -> Tensor:
    """As TE's: the second time runs in the first one's FP8 region, with its scales."""
    assert not use_reentrant
    recipe = FP8GlobalStateManager.FP8_RECIPE
    assert FP8GlobalStateManager.FP8_ENABLED, "megabts has TE compute again in FP8 only"

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        with autocast(enabled=True, recipe=recipe) if name == "second" else _nothing():
            FP8GlobalStateManager.RECOMPUTE = name
            try:
                yield
            finally:
                FP8GlobalStateManager.RECOMPUTE = ""

    out: Tensor = torch.utils.checkpoint.checkpoint(
        function, *args, use_reentrant=False, context_fn=lambda: (phase("first"), phase("second"))
    )
    return out


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@dataclass
class State:
    """Delayed scaling of one module, one way: a scale and largest values for each of its tensors."""

    scale: Tensor
    amax_history: Tensor

    @classmethod
    def of(cls, recipe: DelayedScaling, num_tensors: int, device: torch.device) -> "State":
        return cls(torch.ones(num_tensors, device=device), torch.zeros(recipe.amax_history_len, num_tensors))


@dataclass
class Scaling:
    """One module's scaling in one forward pass and its backward; `weights_rounded` counts roundings of weights."""

    recipe: Recipe
    meta: dict[str, Any]
    forward_scale: Tensor | None = None
    record: bool = True
    roundings: list[str] = field(default_factory=list)

    def round(self, x: Tensor, index: int, way: str, group: Any = None) -> Tensor:
        """`x` in 8 bits and back. `group`: ranks whose slices of one tensor these are."""
        kind = E4M3 if way == "forward" else E5M2
        if not self.recipe.delayed():
            amax = x.detach().abs().max().float()
            if group is not None:
                dist.all_reduce(amax, dist.ReduceOp.MAX, group=group)
            return in_eight_bits(x, kind, torch.finfo(kind).max / amax if amax > 0 else torch.ones(()))
        state: State = self.meta["scaling_fwd" if way == "forward" else "scaling_bwd"]
        scale = state.scale if way == "backward" or self.forward_scale is None else self.forward_scale
        rounded = in_eight_bits(x, kind, scale[index])
        if self.record or way == "backward":
            state.amax_history[0, index] = torch.maximum(state.amax_history[0, index], x.detach().abs().max().float())
        return rounded


def in_eight_bits(x: Tensor, kind: torch.dtype, scale: Tensor) -> Tensor:
    """Scaled, clamped, rounded, and back."""
    largest = torch.finfo(kind).max
    scaled = (x.double() * scale.double()).clamp(-largest, largest)
    return (scaled.float().to(kind).double() / scale.double()).to(x.dtype)


class QuantisedWeight(nn.Parameter):
    """A weight that holds 8-bit values alone: whatever is copied into it is rounded."""

    num_roundings: int

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
            if func is Tensor.copy_:
                target = args[0]
                amax = target.detach().abs().max().float()
                rounded = in_eight_bits(target.detach(), E4M3, torch.finfo(E4M3).max / amax if amax > 0 else amax + 1)
                func(target, rounded)
                target.num_roundings += 1
        return out


class FP8Module(nn.Module):
    """What TE's base module does about FP8."""

    num_products = 1

    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {}
        self.stashed: deque[Tensor] = deque()
        self.weight_roundings = 0

    def weight_parameter(self, *shape: int, device: Any, dtype: torch.dtype) -> nn.Parameter:
        values = torch.empty(shape, device=device, dtype=dtype).normal_(0.0, 0.023)
        if not FP8GlobalStateManager.FP8_PARAMETERS:
            return nn.Parameter(values)
        weight = QuantisedWeight(values)
        weight.num_roundings = 0
        return weight

    def init_fp8_meta_tensors(self, recipe: Recipe) -> None:
        if recipe.delayed() and "scaling_fwd" not in self.fp8_meta:
            assert isinstance(recipe, DelayedScaling)
            device = next(self.parameters()).device
            self.fp8_meta["scaling_fwd"] = State.of(recipe, 3 * self.num_products, device)
            self.fp8_meta["scaling_bwd"] = State.of(recipe, 2 * self.num_products, device)

    def scaling(self) -> Scaling | None:
        """For one forward pass; None outside FP8 regions."""
        manager = FP8GlobalStateManager
        if not manager.FP8_ENABLED:
            return None
        recipe = manager.FP8_RECIPE
        assert recipe is not None
        self.fp8_meta.update({"recipe": recipe, "num_gemms": self.num_products})
        self.init_fp8_meta_tensors(recipe)
        if not recipe.delayed():
            return Scaling(recipe, self.fp8_meta)
        state: State = self.fp8_meta["scaling_fwd"]
        if manager.RECOMPUTE == "second":
            return Scaling(recipe, self.fp8_meta, self.stashed.popleft(), record=False)
        if "registered" not in self.fp8_meta:
            self.fp8_meta["registered"] = True
            for way, key in (("forward", "scaling_fwd"), ("backward", "scaling_bwd")):
                manager.states[way].append((self.fp8_meta[key], recipe, manager.FP8_DISTRIBUTED_GROUP))
        if manager.RECOMPUTE == "first":
            self.stashed.append(state.scale.clone())
        return Scaling(recipe, self.fp8_meta, state.scale.clone())
