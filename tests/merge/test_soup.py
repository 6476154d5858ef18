"""Model soup against numpy."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from megabts.errors import UsageError
from megabts.merge.soup import average


def members(count: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 5), "b": (7,)}
    return [
        {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        for _ in range(count)
    ]


@pytest.mark.parametrize("weights", [[1, 1, 1], [0.5, 0.25, 0.25], [3, 0, 1], [1e-3, 2e-3, 1e-3]])
def test_weighted_average(weights: list[float]) -> None:
    parts = members(3)
    soup = average(parts, weights)
    assert soup.keys() == parts[0].keys()
    for name, tensor in soup.items():
        stacked = np.stack([part[name].numpy().astype(np.float64) for part in parts])
        np.testing.assert_allclose(tensor.numpy(), np.average(stacked, axis=0, weights=weights), rtol=1e-5, atol=1e-7)


def test_a_member_of_weight_zero_leaves_no_trace() -> None:
    parts = members(3)
    parts[1] = {name: torch.full_like(tensor, math.inf) for name, tensor in parts[1].items()}
    soup, others = average(parts, [1, 0, 3]), average([parts[0], parts[2]], [1, 3])
    assert all(torch.equal(tensor, others[name]) for name, tensor in soup.items())


def test_low_precision_members_are_averaged_exactly_and_rounded_once() -> None:
    parts = members(5, torch.bfloat16)
    soup = average(parts, [1] * 5)
    for name, tensor in soup.items():
        assert tensor.dtype == torch.bfloat16
        exact = np.mean([part[name].double().numpy() for part in parts], axis=0)
        expected = torch.from_numpy(exact).to(torch.bfloat16)
        assert (tensor == expected).float().mean() > 0.99  # a float32 sum may fall on the other side of a tie
        torch.testing.assert_close(tensor, expected, rtol=2**-8, atol=1e-6)


def test_types_may_differ_and_double_stays_double() -> None:
    (first,), (second,) = members(1, torch.float64), members(1, torch.bfloat16)
    soup = average([first, second], [1, 3])
    assert soup["a"].dtype == torch.float64
    np.testing.assert_allclose(soup["a"], (first["a"] + 3 * second["a"].double()) / 4, rtol=1e-7)


def test_one_member_alone_is_itself_and_members_stay() -> None:
    parts = members(2)
    before = {name: tensor.clone() for name, tensor in parts[0].items()}
    soup = average(parts, [1, 0])
    assert all(torch.equal(soup[name], before[name]) and torch.equal(parts[0][name], before[name]) for name in before)


@pytest.mark.parametrize("weights", [[0, 0], [1, -0.5], [-1, 3], [math.nan, 1], [math.inf, 1]])
def test_weights_that_mean_nothing(weights: list[float]) -> None:
    with pytest.raises(UsageError, match="must be finite, at least 0 and have a positive sum"):
        average(members(2), weights)
