"""A decoder cut into parts, run one after the other as pipeline ranks would, against the whole one."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megabts.model.attention import make_context
from megabts.model.decoder import Decoder
from megabts.model.part import Part
from tests.model.models import VARIANTS, batch, decoder, gradients

CUTS = {
    "ends alone": [
        Part((range(0),), embedding=True, head=False),
        Part((range(3),), embedding=False, head=False),
        Part((range(3, 3),), embedding=False, head=True),
    ],
    "in the middle": [
        Part((range(1),), embedding=True, head=False),
        Part((range(1, 3),), embedding=False, head=True),
    ],
    "interleaved": [
        Part((range(1), range(2, 3)), embedding=True, head=False),
        Part((range(1, 2), range(3, 3)), embedding=False, head=True),
    ],
}


def test_what_a_rank_holds() -> None:
    assert Part.of_rank(0, 1, 4, []) == Part.whole(4)
    assert Part.of_rank(0, 2, 4, [1, 1, 3], 2) == Part((range(1), range(1, 3)), True, False, (1, 1, 3))
    assert Part.of_rank(1, 2, 4, [1, 1, 3], 2) == Part((range(1, 1), range(3, 4)), False, True, (1, 1, 3))


def stages(models: list[Decoder]) -> list[tuple[Decoder, range]]:
    """The virtual stages in the order a micro-batch passes them."""
    chunks = range(len(models[0].part.chunks))
    return [(model, model.part.chunks[chunk]) for chunk in chunks for model in models]


def run_cut(models: list[Decoder]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(logits, loss, gradients, summed over the parts that hold a parameter); no graph spans two stages."""
    tokens, labels, mask = batch()
    context = make_context(models[0].config, torch.arange(tokens.shape[1]), torch.float32)
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    for model, layers in stages(models):
        hidden = outputs[-1].detach().requires_grad_() if outputs else model.embed(tokens)
        assert tuple(hidden.shape) == model.wire_shape(layers.start, tokens.shape[1], len(tokens))
        inputs.append(hidden)
        outputs.append(model.run_layers(layers.start, layers.stop, hidden, context))
    loss = models[-1].loss(outputs[-1], labels, mask)
    loss.backward()
    for output, following in zip(reversed(outputs[:-1]), reversed(inputs[1:])):
        output.backward(following.grad)
    grads: dict[str, Tensor] = {}
    for model in models:
        for name, parameter, _ in model.own_parameters():
            assert parameter.grad is not None, name
            grads[name] = grads[name] + parameter.grad if name in grads else parameter.grad
    return models[-1].logits(outputs[-1]).detach(), loss.detach(), grads


@pytest.mark.parametrize("variant", ["gqa", "tied", "qk-norm"])
@pytest.mark.parametrize("cut", CUTS)
def test_parts_in_turn_equal_the_whole(cut: str, variant: str) -> None:
    sizes: dict[str, Any] = VARIANTS[variant]
    whole = decoder(**sizes)
    loss, expected = gradients(whole, *batch())
    context = make_context(whole.config, torch.arange(24), torch.float32)
    logits = whole.logits(whole.run_layers(0, 3, whole.embed(batch()[0]), context)).detach()
    found_logits, found_loss, found = run_cut([decoder(part=part, **sizes) for part in CUTS[cut]])
    assert torch.equal(found_logits, logits)
    assert torch.equal(found_loss, loss)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert torch.equal(found[name], grad), name


@pytest.mark.parametrize("tied", [False, True])
def test_a_part_holds_its_own_and_no_more(tied: bool) -> None:
    first, middle, last = (
        {name for name, _ in decoder(part=part, tie_embeddings=tied).named_parameters()} for part in CUTS["ends alone"]
    )
    assert first == {"embedding.weight"}
    assert {name.split(".")[0] for name in middle} == {"layers"}
    assert last == {"final_norm.weight", "embedding.weight" if tied else "head.weight"}
    assert CUTS["interleaved"][0].layers == (0, 2)


def test_tied_copies_start_alike() -> None:
    first, _, last = (decoder(part=part, tie_embeddings=True) for part in CUTS["ends alone"])
    assert torch.equal(first.embedding.weight, last.head.weight)
