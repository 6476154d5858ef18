"""FP8 of Transformer Engine (TE): recipes, the ranks that share scales, and the state that delayed scaling keeps.

Operands of a linear's products are rounded to 8 bits (E4M3 forward, E5M2 for gradients; Micikevicius et al., arXiv
2209.05433) after a scaling that brings the largest value to the format's end. Current scaling looks at the tensor
itself; delayed scaling takes the largest value of the last 1024 passes, which is state; block scaling looks at blocks
of 128 x 128 (activations: 1 x 128).
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megabts.errors import UserError
from megabts.parallel.mesh import ParallelMesh
from megabts.runtime.device import collective_timeout

FP8 = Literal["none", "current", "delayed", "block"]

FP8_MULTIPLE = 16
"""What the sides of matrices in FP8 products are multiples of: rows of 16 bytes."""

STATE = "fp8."
"""What names of FP8 state begin with."""


def make_recipe(fp8: FP8, *, reduce_amax: bool) -> Any:
    """TE's recipe; None without FP8. `reduce_amax`: the largest values are those of a group of ranks."""
    if fp8 == "none":
        return None
    recipes = import_module("transformer_engine.common.recipe")
    if fp8 == "delayed":
        return recipes.DelayedScaling(reduce_amax=reduce_amax)
    return recipes.Float8CurrentScaling() if fp8 == "current" else recipes.Float8BlockScaling()


def in_fp8() -> bool:
    """Whether a region of FP8 products is open."""
    enabled: bool = import_module("transformer_engine.pytorch.quantization").FP8GlobalStateManager.is_fp8_enabled()
    return enabled


def amax_group(mesh: ParallelMesh, timeout: int) -> dist.ProcessGroup | None:
    """The ranks that run the same layers of the same member, on slices (tp) and other samples (dp): their delayed
    scales are the same. None for one rank alone; every rank must call it, as it may create groups."""
    if mesh.dp.size == 1 or mesh.tp.size == 1:
        return mesh.tp.group if mesh.dp.size == 1 else mesh.dp.group
    grid = torch.arange(mesh.world_size).view(mesh.pp.size, mesh.dp.size, mesh.ep.size, mesh.tp.size)
    mine = None
    for stage in range(mesh.pp.size):
        for place in range(mesh.ep.size):
            ranks = grid[stage, :, place].flatten().tolist()
            group = dist.new_group(ranks, timeout=collective_timeout(timeout))
            if mesh.rank in ranks:
                mine = group
    return mine


def fp8_state(model: nn.Module) -> dict[str, Tensor]:
    """Delayed scaling's state by name, `fp8.{module}.{forward|backward}.{scale|amax_history}`; empty otherwise.

    scale [tensors], amax_history [passes, tensors] in fp32, where tensors are a module's three per product forward and
    two backward. It is the same on all ranks of an `amax_group`. The tensors are the live ones, not copies.
    """
    return {
        f"{STATE}{name}.{way}.{kind}": getattr(state, kind)
        for name, inner in _te_modules(model)
        for way, state in _recipe_states(inner)
        for kind in ("scale", "amax_history")
    }


def has_module(model: nn.Module, name: str) -> bool:
    """Whether the module that a name of `fp8_state` belongs to is in the model, maybe a part of the saved one."""
    return name.removeprefix(STATE).rsplit(".", 2)[0] in dict(_te_modules(model))


@torch.no_grad()
def load_fp8_state(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Set the state of a model built for delayed scaling from `fp8_state`'s tensors, before it runs.

    Raises UserError naming `source` and the tensor when it does not fit the model.
    """
    inner = dict(_te_modules(model))
    sizes: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, way, kind = name.removeprefix(STATE).rsplit(".", 2)
        if module not in inner:
            raise UserError(f"{source} does not fit the model: it has {name}, which the model lacks")
        if (way, kind) == ("forward", "amax_history"):
            sizes[module] = tensor
    recipes = import_module("transformer_engine.common.recipe")
    for module, history in sizes.items():
        # As TE's own set_extra_state does, whose format is a pickle. The first forward pass finds these and keeps them.
        recipe = recipes.DelayedScaling(amax_history_len=history.shape[0])
        inner[module].fp8_meta.update({"recipe": recipe, "num_gemms": history.shape[1] // 3})
        inner[module].init_fp8_meta_tensors(recipe)
    found = fp8_state(model)
    for name, tensor in tensors.items():
        if name not in found or found[name].shape != tensor.shape:
            raise UserError(f"{source} does not fit the model: {name} has shape {tuple(tensor.shape)}")
        found[name].copy_(tensor)


def _te_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """TE's modules with FP8 state, under the names of the modules that apply them."""
    for name, module in model.named_modules():
        for inner in getattr(module, "inner", ()):
            if hasattr(inner, "fp8_meta"):
                yield name, inner


def _recipe_states(inner: Any) -> Iterator[tuple[str, Any]]:
    for way, key in (("forward", "scaling_fwd"), ("backward", "scaling_bwd")):
        state = inner.fp8_meta.get(key)
        if state is not None and hasattr(state, "amax_history"):
            yield way, state
