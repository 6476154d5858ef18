"""Recomputation changes what is kept between forward and backward, and nothing else."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megabts.model.backend import Recompute
from megabts.model.decoder import Decoder, sequence_loss
from tests.model.models import VARIANTS, batch, decoder, gradients


def kept_bytes(model: Decoder) -> int:
    """Bytes that autograd keeps for backward, each storage counted once, parameters not at all."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        place = x.untyped_storage().data_ptr()
        if place not in parameters:
            kept[place] = x  # held, so that no two storages get one place
        return x

    def unpack(x: Any) -> Any:
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        sequence_loss(model, *batch())
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["gqa", "qk-norm", "bias"])
def test_same_loss_and_gradients(variant: str, dtype: torch.dtype) -> None:
    plain, plain_grads = gradients(decoder(dtype=dtype, **VARIANTS[variant]), *batch())
    modes: tuple[Recompute, ...] = ("selective", "full")
    for mode in modes:
        loss, grads = gradients(decoder(dtype=dtype, recompute=mode, **VARIANTS[variant]), *batch())
        assert torch.equal(loss, plain)
        for name, grad in plain_grads.items():
            assert torch.equal(grads[name], grad), (mode, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_less_is_kept(dtype: torch.dtype) -> None:
    modes: tuple[Recompute, ...] = ("none", "selective", "full")
    none, selective, full = (kept_bytes(decoder(recompute=mode, dtype=dtype)) for mode in modes)
    assert full < 0.4 * selective
    assert selective < 0.9 * none


def test_same_with_documents_kept_apart() -> None:
    ids = torch.arange(24).expand(2, 24) // 7
    apart: dict[str, Any] = {"cross_document_attention": False}
    plain, plain_grads = gradients(decoder(**apart), *batch(), document_ids=ids)
    modes: tuple[Recompute, ...] = ("selective", "full")
    for mode in modes:
        loss, grads = gradients(decoder(recompute=mode, **apart), *batch(), document_ids=ids)
        assert torch.equal(loss, plain)
        assert all(torch.equal(grads[name], grad) for name, grad in plain_grads.items())
