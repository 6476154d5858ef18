"""Attention: both CPU paths against plain softmax, documents kept apart against running each alone."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megabts.model import torch_backend
from megabts.model.attention import make_context
from megabts.model.torch_backend import TorchBackend, _ExplicitAttention
from megabts.parallel.mesh import Axis
from tests.model.models import VARIANTS, batch, decoder, distance, gradients

BACKEND = TorchBackend(torch.float32, "cpu", Axis("tp"))
SHAPES = [
    (7, 7, 4, 4),
    (7, 7, 4, 2),
    (5, 5, 6, 1),
    (3, 8, 4, 2),
    (1, 6, 4, 2),
    (130, 130, 4, 2),
    (70, 200, 2, 1),
]  # s, t, heads, kv_heads


def qkv(s: int, t: int, heads: int, kv_heads: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """[s, b, heads, hd] for two rows; queries are the last s of t positions."""
    generator = torch.Generator().manual_seed(s * t)
    shapes = [(s, 2, heads, 8), (t, 2, kv_heads, 8), (t, 2, kv_heads, 8)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def some_mask(s: int, t: int) -> Tensor:
    """[2, 1, s, t], every query sees its own position."""
    causal = torch.ones(s, t, dtype=torch.bool).tril(t - s)
    random = torch.rand(2, 1, s, t, generator=torch.Generator().manual_seed(1)) < 0.6
    return causal & random | torch.eye(t, dtype=torch.bool)[t - s :]


def plain(inputs: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """The formula, head by head."""
    query, key, value = inputs
    s, t, group = len(query), len(key), query.shape[2] // key.shape[2]
    allowed = torch.ones(s, t, dtype=torch.bool).tril(t - s).expand(2, 1, s, t) if mask is None else mask
    heads = []
    for head in range(query.shape[2]):
        k, v = key[:, :, head // group], value[:, :, head // group]
        scores = torch.einsum("sbd,tbd->bst", query[:, :, head], k) / query.shape[-1] ** 0.5
        weights = scores.masked_fill(~allowed[:, 0], float("-inf")).softmax(-1)
        heads.append(torch.einsum("bst,tbd->sbd", weights, v))
    return torch.cat(heads, -1)


def explicit(inputs: Sequence[Tensor], mask: Tensor | None, keep: bool = True) -> Tensor:
    query, key, value = (x.permute(1, 2, 0, 3) for x in inputs)
    out: Tensor = _ExplicitAttention.apply(query, key, value, mask, keep)
    return out.permute(2, 0, 1, 3).flatten(2)


def explicit_again(inputs: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    return explicit(inputs, mask, keep=False)


def fused(inputs: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    query, key, value = inputs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_backend, "_explicit_is_faster", lambda query, key: False)
        return BACKEND.attention(query, key, value, mask)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_paths_equal_plain_softmax(shape: tuple[int, int, int, int], masked: bool) -> None:
    inputs = qkv(*shape)
    mask = some_mask(*shape[:2]) if masked else None
    expected = plain(inputs, mask)
    direction = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, inputs, direction)
    for path in (explicit, explicit_again, fused):
        out = path(inputs, mask)
        assert distance(out, expected) < 1e-6
        for found, grad in zip(torch.autograd.grad(out, inputs, direction), expected_grads):
            assert distance(found, grad) < 2e-6


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(4, 4, 4, 2), (2, 5, 2, 1)])
def test_gradient_of_the_explicit_path(shape: tuple[int, int, int, int], masked: bool) -> None:
    inputs = qkv(*shape, dtype=torch.float64)
    mask = some_mask(*shape[:2]) if masked else None
    assert torch.autograd.gradcheck(lambda *x: explicit(x, mask), inputs)


def test_training_takes_the_explicit_path_and_bfloat16_is_close() -> None:
    exact = qkv(32, 32, 4, 2)
    low = [x.detach().bfloat16().requires_grad_() for x in exact]
    for query, key, _ in (low, exact):
        assert torch_backend._explicit_is_faster(query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3))
        assert not torch_backend._explicit_is_faster(query.detach(), key.detach())
    expected, found = fused(exact, None), BACKEND.attention(low[0], low[1], low[2], None)
    assert found.dtype == torch.bfloat16
    assert distance(found.float(), expected) < 0.02
    grads = torch.autograd.grad(expected.square().sum(), exact)
    for grad, other in zip(grads, torch.autograd.grad(found.square().sum(), low)):
        assert distance(other.float(), grad) < 0.04
    with torch.no_grad():
        untrained = fused(low, None)
    assert distance(untrained.float(), expected) < 0.02


def test_one_row_alone_equals_the_row_in_a_batch() -> None:
    inputs = qkv(7, 7, 4, 2)
    mask = some_mask(7, 7)
    whole = fused(inputs, mask)
    for row in range(2):
        alone = fused([x[:, row : row + 1] for x in inputs], mask[row : row + 1])
        torch.testing.assert_close(alone, whole[:, row : row + 1])


@pytest.mark.parametrize("variant", ["gqa", "qk-norm", "llama3"])
def test_documents_kept_apart_equal_documents_alone(variant: str) -> None:
    model = decoder(**VARIANTS[variant], cross_document_attention=False)
    tokens, labels, mask = batch()
    lengths = [[10, 1, 13], [5, 19]]  # of the documents in each row
    ids = torch.stack([torch.repeat_interleave(torch.tensor(row)) for row in lengths])
    loss, grads = gradients(model, tokens, labels, mask, document_ids=ids)

    total, summed = torch.zeros(()), {name: torch.zeros_like(grad) for name, grad in grads.items()}
    for row, documents in enumerate(lengths):
        for part, length in zip(torch.tensor(documents).cumsum(0).tolist(), documents):
            piece = (slice(row, row + 1), slice(part - length, part))
            alone, alone_grads = gradients(model, tokens[piece], labels[piece], mask[piece])
            total += alone
            for name, grad in alone_grads.items():
                summed[name] += grad
    torch.testing.assert_close(loss, total)
    for name, grad in grads.items():
        assert distance(grad, summed[name]) < 1e-5, name


def test_documents_may_see_each_other_where_the_configuration_says_so() -> None:
    tokens, labels, mask = batch()
    ids = torch.arange(24).expand(2, 24) // 8
    losses = {}
    for across in (True, False):
        model = decoder(cross_document_attention=across)
        losses[across], _ = gradients(model, tokens, labels, mask, document_ids=ids)
        without, _ = gradients(model, tokens, labels, mask)
        assert torch.equal(without, losses[True])
    assert abs(losses[False] / losses[True] - 1) > 1e-3


def test_document_mask_is_causal_within_documents() -> None:
    config = decoder(cross_document_attention=False).config
    context = make_context(config, torch.arange(4), torch.float32, document_ids=torch.tensor([[0, 0, 1, 1]]))
    assert context.mask is not None
    assert context.mask.int().tolist() == [[[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]]]


def test_logits_do_not_depend_on_later_tokens() -> None:
    model = decoder()
    tokens, _, _ = batch()
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 97
    context = make_context(model.config, torch.arange(24), torch.float32)
    with torch.no_grad():
        before, after = (model.logits(model.run_layers(0, 3, model.embed(x), context)) for x in (tokens, changed))
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert not torch.allclose(F.softmax(before[:, 12:], -1), F.softmax(after[:, 12:], -1))
