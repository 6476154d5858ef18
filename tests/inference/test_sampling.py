"""Filters against brute force in plain Python; drawn tokens against their probabilities."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from megabts.inference.sampling import draw, penalise, probabilities, sample


def brute_force(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """One row's distribution, from the definitions."""
    largest = max(logits)
    weights = [math.exp((x - largest) / temperature) for x in logits]
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    ranked = ranked[: top_k or None]
    total = sum(weights[i] for i in ranked)
    kept: list[int] = []
    reached = 0.0
    for i in ranked:
        if kept and reached >= top_p - 1e-12:
            break
        kept.append(i)
        reached += weights[i] / total
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


@settings(max_examples=300)
@given(
    # Few distinct values: ties are common.
    logits=st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=12),
    temperature=st.sampled_from([0.1, 0.8, 1.0, 3.0]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([1e-9, 0.1, 0.3, 0.5, 0.9, 0.999, 1.0]),
)
def test_filters_are_the_definitions(logits: list[float], temperature: float, top_k: int, top_p: float) -> None:
    expected = brute_force(logits, temperature, top_k, top_p)
    found = probabilities(torch.tensor([logits, logits]), temperature, top_k, top_p)
    torch.testing.assert_close(found, torch.tensor([expected, expected], dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_ties_go_to_the_lower_ids() -> None:
    tied = torch.zeros(1, 10)
    assert probabilities(tied, 1.0, top_k=3)[0].nonzero().flatten().tolist() == [0, 1, 2]
    assert probabilities(tied, 1.0, top_p=0.7)[0].nonzero().flatten().tolist() == list(range(7))
    assert sample(tied, 0.0, 0, 1.0, []).tolist() == [0]


def test_extreme_temperatures_and_impossible_tokens() -> None:
    logits = torch.tensor([[5.0, 5.0, -3.0, -torch.inf]])
    assert probabilities(logits, 1e-308).tolist() == [[0.5, 0.5, 0.0, 0.0]]
    hot = probabilities(logits, 1e300)[0]
    torch.testing.assert_close(hot, torch.tensor([1, 1, 1, 0], dtype=torch.float64) / 3)


def test_draw_inverts_the_running_sum() -> None:
    distribution = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]], dtype=torch.float64).expand(5, -1)
    below_one = 1 - 2.0**-53
    drawn = draw(distribution, torch.tensor([0.0, 0.2499, 0.25, 0.9, below_one], dtype=torch.float64))
    assert drawn.tolist() == [1, 1, 3, 3, 3]


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.7, 4, 1.0), (1.5, 0, 0.8), (1.0, 5, 0.9)])
def test_draws_follow_the_distribution(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.tensor([1.0, -0.5, 2.0, 0.3, 0.3, -1.0, 1.2])
    expected = brute_force(logits.tolist(), temperature, top_k, top_p)
    generator, num_draws = torch.Generator().manual_seed(11), 4000
    drawn = [int(sample(logits[None], temperature, top_k, top_p, [generator])) for _ in range(num_draws)]
    counts = [drawn.count(token) for token in range(7)]
    assert all(count == 0 for count, p in zip(counts, expected, strict=True) if p == 0)
    possible = [(count, num_draws * p) for count, p in zip(counts, expected, strict=True) if p > 0]
    chi_square = sum((count - mean) ** 2 / mean for count, mean in possible)
    freedom = len(possible) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_a_row_draws_from_its_own_generator() -> None:
    logits = torch.zeros(3, 1000)
    seeds = [5, 6, 7]
    together = sample(logits, 1.0, 0, 1.0, [torch.Generator().manual_seed(seed) for seed in seeds])
    alone = [sample(logits[:1], 1.0, 0, 1.0, [torch.Generator().manual_seed(seed)]).item() for seed in seeds]
    assert together.tolist() == alone
    assert len(set(alone)) == 3


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.8])
def test_penalty_is_that_of_transformers(penalty: float) -> None:
    logits, ids = torch.randn(50, generator=torch.Generator().manual_seed(2)), [3, 3, 7, 49, 0]
    seen = torch.zeros(50, dtype=torch.bool)
    seen[ids] = True
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), logits[None].clone())[0]
    assert torch.equal(penalise(logits, seen, penalty), expected)
    assert torch.equal(penalise(logits, seen, penalty), logits) == (penalty == 1)
