"""The fast path against the slow one, and against single rows."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from megabts.errors import UsageError, UserError
from megabts.inference.decoding import _prefill_mask
from megabts.inference.generate import generate, generate_uncached, score
from megabts.inference.settings import GenerationSettings
from tests.inference.models import MODELS, build, dense, stitched
from tests.inference.steps import Batch

PROMPTS = [[5, 17, 42, 3, 60, 8, 1], [9], [33, 33, 7, 21]]
GREEDY = GenerationSettings(max_new_tokens=12)
SAMPLED = GenerationSettings(max_new_tokens=12, temperature=1.3, top_k=30, top_p=0.95, seed=4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_cached_is_uncached_token_for_token(name: str, settings: GenerationSettings) -> None:
    model = build(name)
    fast, slow = generate(model, PROMPTS, settings), generate_uncached(model, PROMPTS, settings)
    assert fast == slow
    assert [len(row) for row in fast] == [12, 12, 12]
    assert len({token for row in fast for token in row}) > 5  # not one token over and over


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prompts", [PROMPTS, [PROMPTS[0], PROMPTS[0][::-1]]], ids=["ragged", "even"])
def test_logits_of_every_step(name: str, prompts: list[list[int]]) -> None:
    model = build(name)
    model.train(False)
    texts = [[*prompt, 11, 12, 13, 14] for prompt in prompts]
    with torch.inference_mode():
        whole = [score(model, text) for text in texts]
        batch = Batch(model, prompts, 5)
        check_step(batch.begin(), whole, prompts, 0)
        for step, token in enumerate([11, 12, 13, 14], 1):
            check_step(batch.extend(token), whole, prompts, step)


def check_step(logits: Tensor, whole: Sequence[Tensor], prompts: Sequence[Sequence[int]], step: int) -> None:
    expected = torch.stack([row[len(prompt) - 1 + step] for row, prompt in zip(whole, prompts, strict=True)])
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_padding_is_seen_by_nobody_but_itself() -> None:
    """And no query is left with nothing to look at: a backend may make NaN of that."""
    mask = _prefill_mask(torch.tensor([0, 2]), torch.zeros(2, 3))
    assert mask[:, 0].int().tolist() == [[[1, 0, 0], [1, 1, 0], [1, 1, 1]], [[1, 0, 0], [0, 1, 0], [0, 0, 1]]]


@pytest.mark.parametrize("name", ["dense-gqa", "bts-alternating"])
def test_a_batch_is_its_rows(name: str) -> None:
    model = build(name)
    together = generate(model, PROMPTS, GREEDY)
    assert together == [generate(model, [prompt], GREEDY)[0] for prompt in PROMPTS]
    # Sampling too is a row's own affair: neither the neighbours nor their end change it.
    sampled = generate(model, PROMPTS, SAMPLED)
    assert generate(model, [PROMPTS[0], [1, 2]], SAMPLED)[0] == sampled[0]
    assert generate(model, PROMPTS, GenerationSettings(12, 1.3, 30, 0.95, seed=5)) != sampled


def test_stop_ids_end_a_row_and_are_not_returned() -> None:
    model = dense()
    free = generate(model, PROMPTS, GREEDY)
    stop = free[0][3]
    cut = [row[: row.index(stop)] if stop in row else row for row in free]
    assert len(cut[0]) < len(max(cut, key=len))
    settings = GenerationSettings(max_new_tokens=12, stop_ids=(stop,))
    assert generate(model, PROMPTS, settings) == generate_uncached(model, PROMPTS, settings) == cut


def test_streams_every_token_once() -> None:
    streamed: list[list[int]] = [[], [], []]
    free = generate(dense(), PROMPTS, GREEDY)
    settings = GenerationSettings(max_new_tokens=12, stop_ids=(free[0][3],))
    result = generate(dense(), PROMPTS, settings, lambda row, token: streamed[row].append(token))
    assert streamed == result


def test_ids_beyond_the_tokenizers_are_not_chosen() -> None:
    settings = GenerationSettings(max_new_tokens=12, temperature=5.0, num_ids=7)
    tokens = {token for row in generate(dense(), PROMPTS, settings) for token in row}
    assert tokens <= set(range(7))
    assert len(tokens) > 3


def test_capacity() -> None:
    model = dense()  # max_seq_len 48
    assert len(generate(model, [[1] * 36, [2]], GREEDY)[0]) == 12
    with pytest.raises(UserError, match="prompt 2 has 37 tokens, with 12 new ones 49: more than the model's 48"):
        generate(model, [[2], [1] * 37], GREEDY)
    with pytest.raises(UserError, match="49: more than"):
        generate_uncached(model, [[1] * 37], GREEDY)


def test_prompts_that_cannot_be() -> None:
    model = dense()
    with pytest.raises(UserError, match="prompt 2 is empty"):
        generate(model, [[1], []], GREEDY)
    with pytest.raises(UserError, match="prompt 1 has token 61, the model's vocabulary ends at 60"):
        generate(model, [[3, 61]], GREEDY)
    assert generate(model, [], GREEDY) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"num_ids": -1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
        {"stop_strings": ("a", "")},
        {"logprobs": -1},
    ],
)
def test_settings_that_cannot_be_meant(settings: dict) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(settings))} is "):
        GenerationSettings(**settings)


def test_a_diverged_model_is_named() -> None:
    model = dense()
    dict(model.named_parameters())["final_norm.weight"].data[0] = torch.nan
    with pytest.raises(UserError, match="logits are not finite"):
        generate(model, PROMPTS, GREEDY)


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_as_before_and_dropout_off(training: bool) -> None:
    model = stitched(num_stitch_layers=2)
    model.train(training)
    first = generate(model, PROMPTS, GREEDY)
    assert all(module.training is training for module in model.modules())

    def fail(row: int, token: int) -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        generate(model, PROMPTS, GREEDY, fail)
    assert model.training is training
    assert not torch.is_inference_mode_enabled()
    assert generate(model, PROMPTS, GREEDY) == first


def test_documents_do_not_see_each_other_where_the_model_was_trained_so() -> None:
    """With attention inside documents only, what stands before the last end of document makes no difference."""
    model, eod = dense(cross_document_attention=False), 9
    texts = [[5, 6, 7, eod, 8, 4], [3, eod, 8, 4], [8, 4]]
    alone = score(model, texts[-1], eod)[-1]
    for text in texts:
        torch.testing.assert_close(score(model, text, eod)[-1], alone, rtol=1e-4, atol=1e-5)
    settings = GenerationSettings(max_new_tokens=8, eod_id=eod)
    together = generate(model, texts, settings)
    assert together == [generate(model, [texts[-1]], settings)[0]] * 3
    assert together == generate_uncached(model, texts, settings)
    free = dense(cross_document_attention=True)
    assert not torch.allclose(score(free, texts[0], eod)[-1], score(free, texts[-1], eod)[-1], atol=1e-3)
