"""Which library's AdamW kernel is taken, when several, broken ones or namesakes are installed."""

import importlib
import importlib.util
import logging
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megabts.runtime.adamw_kernel import choose_adamw
from tests.te.optimizers import FusedAdam
from tests.te.standin import installed

GPU = torch.device("cuda")


class Apex(FusedAdam):
    """Not the other library's."""


class Installed:
    """What is installed, in place of what is."""

    def __init__(self, marks: set[str], modules: dict[str, Any]) -> None:
        self.marks, self.modules = marks, modules

    def find_spec(self, name: str) -> ModuleSpec | None:
        return ModuleSpec(name, None) if name in self.marks else None

    def import_module(self, name: str) -> Any:
        found = self.modules[name]
        if isinstance(found, Exception):
            raise found
        return found


TE = {"transformer_engine.pytorch.optimizers": SimpleNamespace(FusedAdam=FusedAdam)}
APEX = {"apex.optimizers": SimpleNamespace(FusedAdam=Apex)}
BROKEN = {"transformer_engine.pytorch.optimizers": OSError("libcudart.so.12: cannot open\nmore")}
OLD = {"transformer_engine.pytorch.optimizers": SimpleNamespace()}


@pytest.mark.parametrize(
    ("marks", "modules", "expected", "name"),
    [
        ({"transformer_engine", "amp_C"}, TE | APEX, FusedAdam, "Transformer Engine"),
        ({"amp_C", "apex"}, APEX, Apex, "NVIDIA apex"),
        ({"apex"}, {"apex.optimizers": ImportError("the registry's apex was imported")}, torch.optim.AdamW, "torch"),
        (set(), {}, torch.optim.AdamW, "torch"),
        ({"transformer_engine", "amp_C"}, BROKEN | APEX, Apex, "NVIDIA apex"),
        ({"transformer_engine"}, OLD, torch.optim.AdamW, "torch"),
    ],
    ids=["both", "apex", "a namesake", "none", "broken", "without"],
)
def test_the_first_that_loads_is_taken(
    marks: set[str],
    modules: dict[str, Any],
    expected: type,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    there = Installed(marks, modules)
    monkeypatch.setattr(importlib.util, "find_spec", there.find_spec)
    monkeypatch.setattr(importlib, "import_module", there.import_module)
    caplog.set_level(logging.INFO)
    made = choose_adamw("auto", GPU, torch.float32)
    monkeypatch.undo()
    assert made.func is expected  # type: ignore[attr-defined]
    assert caplog.messages[-1] == f"optimizer: the AdamW kernel of {name}"
    broken = modules in (BROKEN | APEX, OLD)
    assert len(caplog.messages) == 1 + broken
    if modules == BROKEN | APEX:
        assert caplog.messages[0] == (
            "Transformer Engine is installed but does not load (libcudart.so.12: cannot open): its AdamW kernel is not "
            "used"
        )


def test_the_others_are_for_gpus_float32_and_those_who_want_them(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with installed():
        assert choose_adamw("auto", GPU, torch.float32).func is FusedAdam  # type: ignore[attr-defined]
        caplog.clear()
        for library, device, dtype in (
            ("torch", GPU, torch.float32),
            ("auto", GPU, torch.float64),
            ("auto", torch.device("cpu"), torch.float32),
            ("auto", torch.device("meta"), torch.float32),
        ):
            made = choose_adamw(library, device, dtype)  # type: ignore[arg-type]
            assert made.func is torch.optim.AdamW  # type: ignore[attr-defined]
            assert made.keywords == {"fused": True}  # type: ignore[attr-defined]
    assert caplog.messages == ["optimizer: the AdamW kernel of torch"] * 2  # there is nothing to choose on CPU
