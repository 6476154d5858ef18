"""BTS models over expert- and tensor-parallel ranks, and in pipeline parts, against the same model on one rank.

The one-rank model has an oracle of its own, the loops of tests/bts/reference.py.
"""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from megabts.config.run import ParallelConfig
from megabts.model.part import Part
from megabts.parallel.mesh import ParallelMesh, build_mesh
from tests.parallel.stitched import Case, Outcome, generated, local_model, outcome, whole_model
from tests.ranks import run_ranks

VARIANTS: dict[str, dict[str, Any]] = {
    "alternating": {},
    "one stitch": {"num_stitch_layers": 1},
    "a stitch a layer": {"num_stitch_layers": 5},
    "Hub-into-Experts first": {"num_stitch_layers": 2},
    "Experts-into-Hub only": {"alternating": False},
    "unchanged": {"expert_stream": "unchanged"},
    "unchanged, Experts-into-Hub only": {"expert_stream": "unchanged", "alternating": False},
    "hub leaning": {"start": "hub_leaning"},
    "hub preserving": {"start": "hub_preserving"},
    "first expert trains": {"trainable": ["e1"], "num_stitch_layers": 4},
    "last expert trains, unchanged": {"trainable": ["e3"], "expert_stream": "unchanged", "num_stitch_layers": 4},
    "hub trains": {"trainable": ["hub"], "num_stitch_layers": 4},
    "nothing trains": {"trainable": []},
    "dropout": {"gate_dropout": 0.3, "num_stitch_layers": 4},
}
PARTS = {
    "cut after a stitch, embedding and head alone": tuple(
        Part((range(first, last),), embedding=first == last == 0, head=first == last == 5)
        for first, last in ((0, 0), (0, 2), (2, 4), (4, 5), (5, 5))
    ),
    "two chunks a part": (
        Part((range(1), range(2, 4)), embedding=True, head=False),
        Part((range(1, 2), range(4, 5)), embedding=False, head=True),
    ),
}


TOPOLOGIES: dict[str, dict[str, Any]] = {
    "ep2": {"expert": 2},
    "ep3": {"expert": 3},
    "ep4": {"expert": 4},
    "tp2": {"tensor": 2},
    "tp2+sp": {"tensor": 2, "sequence": True},
    "tp2 x ep2": {"tensor": 2, "expert": 2},
    "tp2+sp x ep2": {"tensor": 2, "sequence": True, "expert": 2},
}
SOME = ("alternating", "unchanged", "hub preserving", "first expert trains", "dropout")
FEW = ("hub preserving", "dropout")
PICKED: dict[str, Iterable[str]] = {"ep2": VARIANTS, "ep4": FEW, "tp2 x ep2": FEW, "tp2+sp x ep2": FEW}
"""Variants of a topology; the others have SOME."""


def cases(topology: str) -> dict[str, Case]:
    """Variants with 4 members, and 3 or 5 members, parts and recomputation in passing; both exchanges."""
    ep = TOPOLOGIES[topology].get("expert", 1)
    variants = {name: VARIANTS[name] for name in PICKED.get(topology, SOME)}
    found: dict[str, Case] = {}
    for exchange in ("gather", "reduce")[:ep]:
        found |= {f"{exchange} {name}": Case(3, settings, exchange) for name, settings in variants.items()}
        found[f"{exchange}, 5 members"] = Case(4, {"num_stitch_layers": 5}, exchange)
        if topology in ("ep2", "ep3"):
            found[f"{exchange}, 3 members"] = Case(2, {"start": "hub_preserving"}, exchange)
        for name, parts in PARTS.items():
            found[f"{exchange}, {name}"] = Case(3, {"num_stitch_layers": 2}, exchange, parts=parts)
    found["recomputation"] = Case(3, {"num_stitch_layers": 5}, recompute="full")
    found["members in float32"] = Case(3, {"num_stitch_layers": 5}, "reduce", frozen=torch.float32)
    return found


def world_of(parallel: dict[str, Any]) -> int:
    return parallel.get("expert", 1) * parallel.get("tensor", 1)


GENERATING = Case(3, {"num_stitch_layers": 5}, "reduce")


def run_all(rank: int, names: list[str]) -> dict[str, dict[str, Outcome | list[list[int]]]]:
    """What this rank finds in every case of the topologies, and its completions."""
    found: dict[str, Any] = {}
    for topology in names:
        parallel = TOPOLOGIES[topology]
        config = ParallelConfig(**parallel)
        mesh, found[topology] = build_mesh(config, world_of(parallel), rank), {}
        for name, case in cases(topology).items():
            model = local_model(case, mesh, config.sequence)
            parts = [local_model(case, mesh, config.sequence, part) for part in case.parts]
            found[topology][name] = outcome(model, parts)
        if not config.sequence:
            found[topology]["generated"] = generated(local_model(GENERATING, mesh), mesh)
    return found


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def joined(ranks: list[Outcome], ep: int) -> dict[str, Tensor]:
    """Whole gradients: names over ep, rows of the slices over tp. A name is on one place of ep alone."""
    tp = len(ranks) // ep
    whole: dict[str, Tensor] = {}
    for place in range(ep):
        slices = [outcome.gradients for outcome in ranks[place * tp : (place + 1) * tp]]
        for name in slices[0]:
            assert name not in whole, f"{name} on several ranks"
            whole[name] = torch.cat([gradients[name] for gradients in slices])
    return whole


def compare(topology: str, name: str, ranks: list[Outcome], expected: Outcome) -> None:
    ep, what = TOPOLOGIES.get(topology, {}).get("expert", 1), f"{topology}, {name}"
    tp = len(ranks) // ep
    for rank, found in enumerate(ranks):
        assert relative_error(found.logits, expected.logits) < 1e-5, what
        loss = expected.loss if rank < tp else torch.zeros(())
        torch.testing.assert_close(found.loss, loss, rtol=1e-5, atol=0, msg=lambda text: f"{what}: {text}")
        assert found.gates.keys() == expected.gates.keys()
        for stitch, gates in expected.gates.items():
            assert relative_error(found.gates[stitch], gates) < 1e-5, (what, stitch)
    gradients = joined(ranks, ep)
    assert gradients.keys() == expected.gradients.keys(), what
    for parameter, gradient in expected.gradients.items():
        assert relative_error(gradients[parameter], gradient) < 1e-5, (what, parameter)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_members_on_ranks_equal_one_rank(world: int) -> None:
    names = [name for name, parallel in TOPOLOGIES.items() if world_of(parallel) == world]
    ranks = run_ranks(world, run_all, names)
    completions = generated(whole_model(GENERATING), ParallelMesh())
    known: dict[str, Outcome] = {}
    for topology in names:
        for name, case in cases(topology).items():
            if name not in known:
                known[name] = outcome(whole_model(case))
            compare(topology, name, [rank[topology][name] for rank in ranks], known[name])
        if "sp" not in topology:
            assert [rank[topology]["generated"] for rank in ranks] == [completions, *[[]] * (len(ranks) - 1)], topology


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_a_model_on_one_rank(name: str) -> None:
    for settings in ({"num_stitch_layers": 2}, {"num_stitch_layers": 5, "trainable": ["e2"]}):
        case = Case(3, settings, parts=PARTS[name])
        models = [local_model(case, ParallelMesh(), part=part) for part in case.parts]
        expected, found = outcome(whole_model(case)), outcome(whole_model(case), models)
        compare("one", name, [found], expected)
        names = [n for model in models for n, _ in model.named_parameters()]
        assert sorted(names) == sorted(n for n, _ in whole_model(case).named_parameters())
