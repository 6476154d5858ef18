"""Log-likelihoods of batches against texts scored one by one, for every kind of model."""

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from megabts.config.methods import BTMConfig, RoutingConfig
from megabts.errors import UserError
from megabts.evaluation.likelihood import continuation_scores
from megabts.evaluation.windows import position_losses
from megabts.inference.generate import generate, score
from megabts.inference.settings import GenerationSettings
from megabts.merge.ensemble import Ensemble
from megabts.merge.routing import Routing
from megabts.model.decoder import Model
from tests.inference.models import dense, stitched
from tests.merge.models import backend, config, folders, randomised
from tests.moe.models import SIZES as MOE_SIZES
from tests.moe.models import moe_model

END = 0
MAX_LENGTH = 16


def routing() -> Routing:
    """Members so different that the choice tells, by a router that chooses all of them."""
    model = randomised(Routing(config(), RoutingConfig(folders(), min_tokens=2, max_tokens=5), backend()))
    with torch.no_grad():
        model.router.weight.add_(torch.randn(model.router.weight.shape, generator=torch.Generator().manual_seed(4)))
    return model


KINDS: dict[str, Callable[[], Any]] = {
    "dense": dense,
    "documents": lambda: dense(cross_document_attention=False),
    "bts": lambda: stitched(num_stitch_layers=2),
    "mixture": lambda: stitched(num_stitch_layers=2, output="mixture", evidence=3),
    "moe": lambda: moe_model(dtype=torch.float32, sizes={**MOE_SIZES, "max_seq_len": 48}),
    "ensemble": lambda: randomised(Ensemble(config(), BTMConfig(folders()), backend())),
    "ensemble documents": lambda: randomised(
        Ensemble(config(cross_document_attention=False), BTMConfig(folders()), backend())
    ),
    "routing": routing,
}


def make_pairs(vocabulary: int) -> list[tuple[list[int], list[int]]]:
    """Contexts of several lengths, some longer than there is room for; choices that differ in their last token; ends of
    documents in the middle."""
    rng = np.random.RandomState(0)
    pairs = [
        (list(rng.randint(1, vocabulary, a)), list(rng.randint(1, vocabulary, b)))
        for a, b in product((1, 20), (1, 3, 16))
    ]
    context = list(rng.randint(1, vocabulary, 6))
    pairs += [(context, [choice]) for choice in (4, 9, 4)]
    pairs += [(context, [7, choice]) for choice in (4, 9)]
    pairs += [([END], [5, 6, 7]), ([3, END, 8], [5, END, 6, 2])]
    return pairs


def alone(model: Model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The formula, on one text without padding."""
    text = [*context, *continuation][-(MAX_LENGTH + 1) :]
    with torch.inference_mode():
        given = score(model, text[:-1], END, max(len(text) - len(continuation), 1))
    known = given.log_softmax(-1)[-len(continuation) :]
    total = sum(float(known[place, token]) for place, token in enumerate(continuation))
    return total, known.argmax(-1).tolist() == continuation


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_texts_alone(kind: str) -> None:
    model = KINDS[kind]()
    model.train(False)
    pairs = make_pairs(model.config.vocab_size)
    prompt = [5, 9, 2]
    greedy = generate(model, [prompt], GenerationSettings(4, eod_id=END, stop_ids=()))[0]
    pairs.append((prompt, greedy))
    expected = [alone(model, *pair) for pair in pairs]
    for batch_size in (4, 64):
        scores = continuation_scores(
            model, pairs, max_length=MAX_LENGTH, batch_size=batch_size, eod_id=END, by_prompt=kind == "routing"
        )
        assert [found.log_likelihood for found in scores] == pytest.approx([total for total, _ in expected], abs=1e-4)
        assert [found.is_greedy for found in scores] == [likeliest for _, likeliest in expected]
    assert scores[-1].is_greedy
    assert not all(found.is_greedy for found in scores)


def test_the_router_reads_the_context_alone() -> None:
    """What is scored does not move the choice, and the choices are not all one."""
    model = routing()
    model.train(False)
    contexts = [[token, token] for token in range(1, 31)]
    pairs = [(context, [token]) for context in contexts for token in (3, 17)]
    scores = continuation_scores(model, pairs, max_length=MAX_LENGTH, batch_size=64, by_prompt=True)
    members = model.decoders()
    chosen = set()
    for (context, continuation), found in zip(pairs, scores, strict=True):
        member = int((model.router.weight @ members[0].embedding.weight[context].mean(0)).argmax())
        chosen.add(member)
        assert found.log_likelihood == pytest.approx(alone(members[member], context, continuation)[0], abs=1e-4)
    assert len(chosen) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_evaluation_windows(kind: str) -> None:
    """Windows, long ones and short ones together, are scored as tools/evaluate.py scores those of one length."""
    model = KINDS[kind]()
    model.train(False)
    windows = np.random.RandomState(1).randint(1, model.config.vocab_size, (5, MAX_LENGTH + 1))
    sizes = (MAX_LENGTH + 1, 3, 4, 3, MAX_LENGTH + 1)
    cut = [windows[row : row + 1, :size] for row, size in enumerate(sizes)]
    losses = torch.cat([position_losses(model, window, torch.device("cpu")).sum(1) for window in cut])
    pairs = [(window[0, :1].tolist(), window[0, 1:].tolist()) for window in cut]
    scores = continuation_scores(model, pairs, max_length=MAX_LENGTH, batch_size=3, windows=True, by_prompt=True)
    assert [found.log_likelihood for found in scores] == pytest.approx((-losses).tolist(), rel=1e-5)


def test_a_continuation_that_does_not_fit_is_one_line() -> None:
    with pytest.raises(UserError, match=r"has 17 tokens and the model reads 16 at once; leave the task out"):
        continuation_scores(dense(), [([1], [2] * 17)], max_length=MAX_LENGTH, batch_size=1)
