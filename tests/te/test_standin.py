"""The stand-in for Transformer Engine has TE's names: held against the sources of TE 2.12, where they are at hand."""

import ast
import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch

from tests.te import fp8, modules, optimizers

WHEEL = (
    Path(__file__)
    .resolve()
    .parents[3]
    .joinpath(*("shared", "te-hopper", "wheels", "transformer_engine-2.12.0-py3-none-any.whl"))
)
ATTENTION = "pytorch/attention/dot_product_attention/dot_product_attention.py"
CALLS: list[tuple[str, str, Callable[..., Any]]] = [
    ("pytorch/module/linear.py", "Linear.__init__", modules.Linear.__init__),
    ("pytorch/module/linear.py", "Linear.forward", modules.Linear.forward),
    ("pytorch/module/layernorm_linear.py", "LayerNormLinear.__init__", modules.LayerNormLinear.__init__),
    ("pytorch/module/layernorm_linear.py", "LayerNormLinear.forward", modules.LayerNormLinear.forward),
    ("pytorch/module/layernorm_mlp.py", "LayerNormMLP.__init__", modules.LayerNormMLP.__init__),
    ("pytorch/module/layernorm_mlp.py", "LayerNormMLP.forward", modules.LayerNormMLP.forward),
    ("pytorch/module/rmsnorm.py", "RMSNorm.__init__", modules.RMSNorm.__init__),
    (ATTENTION, "DotProductAttention.__init__", modules.DotProductAttention.__init__),
    (ATTENTION, "DotProductAttention.forward", modules.DotProductAttention.forward),
    ("pytorch/optimizers/fused_adam.py", "FusedAdam.__init__", optimizers.FusedAdam.__init__),
    ("pytorch/quantization.py", "autocast", fp8.autocast),
    ("pytorch/quantization.py", "quantized_model_init", fp8.quantized_model_init),
    ("pytorch/quantization.py", "is_fp8_available", fp8.is_fp8_available),
    ("pytorch/quantization.py", "is_fp8_block_scaling_available", fp8.is_fp8_block_scaling_available),
    ("pytorch/quantization.py", "FP8GlobalStateManager.is_fp8_enabled", fp8.FP8GlobalStateManager.is_fp8_enabled),
    (
        "pytorch/module/base.py",
        "TransformerEngineBaseModule.init_fp8_meta_tensors",
        fp8.FP8Module.init_fp8_meta_tensors,
    ),
]


@pytest.fixture(scope="module")
def wheel() -> ZipFile:
    if not WHEEL.exists():
        pytest.skip("the sources of Transformer Engine 2.12 are not at hand")
    return ZipFile(WHEEL)


def found_in(wheel: ZipFile, file: str, path: str) -> Any:
    """The syntax tree of a function or class, `Class.method` or `function`."""
    node: Any = ast.parse(wheel.read(f"transformer_engine/{file}"))
    for name in path.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == name)
    return node


@pytest.mark.parametrize("file, path, ours", CALLS, ids=[path for _, path, _ in CALLS])
def test_arguments_are_those_of_transformer_engine(
    wheel: ZipFile, file: str, path: str, ours: Callable[..., Any]
) -> None:
    """Names and defaults; the arguments without one at the same places. (The stand-in has not all of TE's.)"""
    args = found_in(wheel, file, path).args
    names = [arg.arg for arg in args.args]
    defaults = dict(zip(names[len(names) - len(args.defaults) :], args.defaults))
    defaults |= {arg.arg: value for arg, value in zip(args.kwonlyargs, args.kw_defaults) if value}
    names += [arg.arg for arg in args.kwonlyargs]
    for place, (name, parameter) in enumerate(inspect.signature(ours).parameters.items()):
        if name == "cls" or parameter.kind is parameter.VAR_KEYWORD:
            continue
        assert name in names, f"{path} has no {name}"
        if parameter.default is parameter.empty:
            assert name not in defaults or path.endswith("__init__")
            assert names.index(name) == place
        else:
            assert ast.literal_eval(defaults[name]) == parameter.default


def test_recipes_have_these_settings(wheel: ZipFile) -> None:
    theirs = found_in(wheel, "common/recipe/__init__.py", "DelayedScaling")
    settings = {
        ast.unparse(line.target): line.value for line in theirs.body if isinstance(line, ast.AnnAssign) and line.value
    }
    for setting in fields(fp8.DelayedScaling):
        assert ast.literal_eval(settings[setting.name]) == setting.default
    for name in ("Float8CurrentScaling", "Float8BlockScaling"):
        assert found_in(wheel, "common/recipe/__init__.py", name)


def test_checkpoint_takes_the_kind_of_recomputation(wheel: ZipFile) -> None:
    text = ast.unparse(found_in(wheel, "pytorch/distributed.py", "checkpoint"))
    assert "kwargs.pop('use_reentrant', True)" in text


def test_parameters_and_state_have_these_names(wheel: ZipFile) -> None:
    """What the backend reaches into TE's modules for."""
    linear = ast.unparse(found_in(wheel, "pytorch/module/layernorm_linear.py", "LayerNormLinear.__init__"))
    mlp = ast.unparse(found_in(wheel, "pytorch/module/layernorm_mlp.py", "LayerNormMLP.__init__"))
    base = ast.unparse(found_in(wheel, "pytorch/module/base.py", "TransformerEngineBaseModule"))
    state = ast.unparse(found_in(wheel, "pytorch/quantization.py", "DelayedScalingRecipeState"))
    assert all(f"'{name}'" in mlp for name in ("layer_norm_weight", "fc1_weight", "fc2_weight"))
    assert "'layer_norm_weight'" in linear
    assert "self.weight_names = ['weight']" in linear
    assert all(text in base for text in ("'scaling_fwd'", "'scaling_bwd'", "self.fp8_meta['num_gemms']"))
    assert all(text in state for text in ("scale: torch.Tensor", "amax_history: torch.Tensor"))


def test_the_optimizer_keeps_this_state(wheel: ZipFile) -> None:
    """Moments by these names, as they are handed in; the step in the group; nothing without a gradient."""
    adam = found_in(wheel, "pytorch/optimizers/fused_adam.py", "FusedAdam")
    text = " ".join(ast.unparse(adam).split())
    for line in (
        "if len(state) == 0: self.initialize_state(",
        "for name in ['exp_avg', 'exp_avg_sq', 'master_param']: if name in state:",
        "if 'step' in group: group['step'] += 1 if not self.capturable",
        "if p_grad is None: continue",
    ):
        assert line in text


def test_the_gate_is_the_first_half(wheel: ZipFile) -> None:
    text = ast.get_docstring(found_in(wheel, "pytorch/ops/basic/activation.py", "SwiGLU"))
    assert text is not None
    assert "the gating function to the first half of the input tensor" in " ".join(text.split())


def test_eight_bits_round_to_the_nearest() -> None:
    """E4M3 has 3 bits after the point: 1, 1.125, ..; its largest is 448."""
    x = torch.tensor([1.0, 1.06, 1.07, 448.0, 500.0, -3.1])
    expected = torch.tensor([1.0, 1.0, 1.125, 448.0, 448.0, -3.0])
    assert torch.equal(fp8.in_eight_bits(x, fp8.E4M3, torch.tensor(1.0)), expected)
    assert torch.equal(fp8.in_eight_bits(x / 7, fp8.E4M3, torch.tensor(7.0)), expected / 7)


def test_largest_values_of_earlier_passes_scale_the_next() -> None:
    """448 / the largest of the last 3 passes, this one included (TE's `_amax_and_scale_update`)."""
    fp8.FP8GlobalStateManager.reset()
    recipe = fp8.DelayedScaling(amax_history_len=3, reduce_amax=False)
    linear = modules.Linear(16, 16, bias=False, device="cpu")
    scales = []
    for largest in (2.0, 8.0, 4.0, 4.0, 4.0):
        with fp8.autocast(recipe=recipe):
            linear(torch.full((8, 16), largest))
        scales.append(linear.fp8_meta["scaling_fwd"].scale[0].item())
    assert scales == [448 / 2, 448 / 8, 448 / 8, 448 / 8, 448 / 4]
    fp8.FP8GlobalStateManager.reset()
