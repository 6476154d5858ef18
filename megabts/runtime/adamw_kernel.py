"""Whose fused AdamW kernel steps the optimizer: Transformer Engine's, else NVIDIA apex's, else torch's own.

On a GPU the first of these that is installed and loads is used, and named once in the log; all three compute the same
(arXiv 1711.05101), up to rounding. The others' are for float32 alone; elsewhere it is torch's. Apex is known by its
compiled part, amp_C: the package registry's `apex` is something else, and is never imported.

Norms need no such choice. With `precision.layers te` they are Transformer Engine's, most of them inside the linear that
follows; torch's layers have theirs as a function with a backward of its own, compiled to the same one pass over memory.
"""

import importlib
import importlib.util
import logging
from collections.abc import Callable
from functools import partial
from typing import Literal, cast

import torch

log = logging.getLogger(__name__)

Library = Literal["auto", "torch"]
AdamW = Callable[..., torch.optim.Optimizer]
"""Called with parameter groups and keywords `betas` and `eps`. Its state is `exp_avg` and `exp_avg_sq` of a parameter;
torch counts steps in a parameter's state, as a tensor `step`, the others in its group, as an int `step`."""
OTHERS = (
    ("Transformer Engine", "transformer_engine", "transformer_engine.pytorch.optimizers"),
    ("NVIDIA apex", "amp_C", "apex.optimizers"),
)
"""(name, the module by which it is known, the module that has `FusedAdam`)."""


def choose_adamw(library: Library, device: torch.device, dtype: torch.dtype) -> AdamW:
    """What makes the optimizer of parameters like these; `library` torch leaves no choice."""
    name, found = "torch", cast(AdamW, partial(torch.optim.AdamW, fused=True))
    if device.type != "cuda":
        return found
    if library == "auto" and dtype == torch.float32:
        name, found = next((other for other in map(_load, OTHERS) if other), (name, found))
    log.info("optimizer: the AdamW kernel of %s", name)
    return found


def _load(other: tuple[str, str, str]) -> tuple[str, AdamW] | None:
    name, mark, module = other
    if importlib.util.find_spec(mark) is None:
        return None
    try:
        return name, partial(importlib.import_module(module).FusedAdam, adam_w_mode=True)
    except (ImportError, OSError, RuntimeError, AssertionError, AttributeError) as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        log.warning("%s is installed but does not load (%s): its AdamW kernel is not used", name, cause)
        return None
