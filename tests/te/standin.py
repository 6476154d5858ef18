"""A stand-in for Transformer Engine where there is no GPU: the same names in plain PyTorch, for tests alone."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from tests.te import fp8, modules, optimizers

PYTORCH = {
    modules: ("Linear", "LayerNormLinear", "LayerNormMLP", "RMSNorm", "DotProductAttention"),
    fp8: ("autocast", "quantized_model_init", "checkpoint", "is_fp8_available", "is_fp8_block_scaling_available"),
}
RECIPES = ("Recipe", "DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling")


def _module(name: str, **members: Any) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    vars(module).update(members)
    return module


def _modules() -> dict[str, ModuleType]:
    root = "transformer_engine"
    members = {name: getattr(module, name) for module, names in PYTORCH.items() for name in names}
    made = [
        _module(root),
        _module(f"{root}.pytorch", **members),
        _module(f"{root}.pytorch.optimizers", FusedAdam=optimizers.FusedAdam),
        _module(f"{root}.pytorch.quantization", FP8GlobalStateManager=fp8.FP8GlobalStateManager),
        _module(f"{root}.common"),
        _module(f"{root}.common.recipe", **{name: getattr(fp8, name) for name in RECIPES}),
    ]
    return {module.__name__: module for module in made}


@contextmanager
def installed() -> Iterator[None]:
    """`transformer_engine` is the stand-in inside the block."""
    made = _modules()
    before = {name: sys.modules.get(name) for name in made}
    sys.modules.update(made)
    fp8.FP8GlobalStateManager.reset()
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
