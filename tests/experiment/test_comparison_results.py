"""Results of a comparison from invented files: means, spreads, oracle, costs, and the Markdown tables."""

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megabts.checkpoint.folder import write_checkpoint
from megabts.checkpoint.manifest import MODEL_FILE
from megabts.checkpoint.source import CONFIG_FILE
from megabts.config.load import to_yaml
from megabts.config.methods import BTMConfig, BTSConfig, MoEConfig
from megabts.config.model import ModelConfig
from megabts.config.run import RunConfig
from megabts.evaluation.windows import MIXED
from megabts.experiment import comparison_results as results
from megabts.experiment.comparison import Comparison
from tests.viz.comparison_fakes import realistic_result, with_studies

DOMAINS = ("general", "code", "math")
SIZES = ModelConfig(vocab_size=32, hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=1, ffn_size=12)
D, FFN, ATTENTION = 8, 3 * 8 * 12, 8 * 16 + 8 * 8
HEADS = 2 * (32 * D + D)
"""Final norms and heads of two experts."""
DENSE = 2 * 32 * D + D + 2 * (FFN + ATTENTION + 2 * D)
# Seed of the comparison -> model -> loss per domain.
LOSSES = {
    0: {"seed": (2.0, 3.0, 4.0), "expert-code": (2.5, 2.0, 4.5), "expert-math": (2.1, 3.5, 3.0)},
    1: {"seed": (2.2, 3.2, 4.2), "expert-code": (1.9, 2.4, 4.5), "expert-math": (2.9, 3.5, 3.4)},
}


@pytest.fixture
def comparisons(tmp_path: Path) -> list[Comparison]:
    """Two seeds with evaluated members; experts are code and math."""
    out = []
    for seed, models in LOSSES.items():
        comparison = Comparison(tmp_path / f"seed{seed}", tmp_path / "corpora", DOMAINS, 60, seed)
        for name, losses in models.items():
            measured = {
                domain: {"loss": loss, "by_position": [[1, loss + 1], [2, loss + 0.5], [4, loss]]}
                for domain, loss in zip((*DOMAINS, MIXED), (*losses, 5.0 + seed), strict=True)
            }
            comparison.losses(name).parent.mkdir(parents=True, exist_ok=True)
            comparison.losses(name).write_text(json.dumps(measured))
        out.append(comparison)
    return out


def test_losses_are_means_over_domains_then_seeds(comparisons: list[Comparison]) -> None:
    assert list(comparisons[0].experts) == ["code", "math"]
    found = results._measured(comparisons, "seed", DOMAINS)
    assert found["losses"] == pytest.approx({"general": 2.1, "code": 3.1, "math": 4.1})
    assert found["averages"] == pytest.approx([3.0, 3.2])
    assert found["average"] == pytest.approx(3.1)
    assert found["spread"] == pytest.approx(0.2 / 2**0.5)
    places, losses = zip(*found["by_position"], strict=True)
    assert places == (1, 2, 4)
    assert losses == pytest.approx((4.1, 3.6, 3.1))


def test_one_seed_has_no_spread(comparisons: list[Comparison]) -> None:
    assert results._measured(comparisons[:1], "seed", DOMAINS)["spread"] == 0


def test_the_oracle_chooses_anew_for_each_seed(comparisons: list[Comparison]) -> None:
    oracle = results._oracle(comparisons)
    # general: seed, then expert-code; code: expert-code; math: expert-math.
    best = [(2.0, 2.0, 3.0), (1.9, 2.4, 3.4)]
    assert list(oracle["losses"].values()) == pytest.approx([statistics.mean(column) for column in zip(*best)])
    averages = [statistics.mean(row) for row in best]
    assert oracle["average"] == pytest.approx(statistics.mean(averages))
    assert oracle["spread"] == pytest.approx(statistics.stdev(averages))


def test_costs_are_a_methods_own(comparisons: list[Comparison]) -> None:
    comparison = comparisons[0]
    done = comparison.out / "done"
    done.mkdir()
    for stage, seconds in (("bam-start", 2.5), ("bam", 40.0), ("soup", 1.5)):
        (done / f"{stage}.json").write_text(json.dumps({"seconds": seconds}))
    folder = comparison.run_dir("bam")
    folder.mkdir(parents=True)
    row = {"loss": 2.0, "tokens": 1024, "flops": 3e9}
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": step, **row}) + "\n" for step in (1, 2, 3)))
    assert results._cost(comparison, "bam") == (3072, 9e9, 42.5)
    assert results._cost(comparison, "soup") == (0, 0.0, 1.5)


MEMBERS = {"seed": "s", "code": "c", "math": "m"}
EXPERTS = {name: path for name, path in MEMBERS.items() if name != "seed"}
BAM: dict[str, Any] = {"members": MEMBERS, "attention_experts": True}


@pytest.mark.parametrize(
    ("config", "total", "idle"),
    [
        # K = 2 of n = 2 experts, of D x D each: (2n + 1) K in the paper's count; without the slice that nothing reads.
        (RunConfig(method="bts", bts=BTSConfig("h", EXPERTS, 2)), 3 * DENSE + 10 * D * D, HEADS + D * D),
        (
            RunConfig(method="bts", bts=BTSConfig("h", EXPERTS, 2, output="mixture", evidence=5)),
            3 * DENSE + 9 * D * D + 3 * D + 5,
            0,
        ),
        (
            RunConfig(method="bts", bts=BTSConfig("h", EXPERTS, 2, gate="token", projection_rank=2)),
            3 * DENSE + 4 * 2 * 2 * D + 5 * D,
            HEADS,
        ),
        (RunConfig(method="btm", btm=BTMConfig(MEMBERS)), 3 * DENSE, 0),
        (RunConfig(method="moe", moe=MoEConfig(MEMBERS)), DENSE + 2 * (2 * FFN + 3 * D), 2 * FFN),
        (
            RunConfig(method="moe", moe=MoEConfig(MEMBERS, routing="sample", split=2)),
            DENSE + 2 * (2 * FFN + 6 * D),
            5 * FFN // 2,
        ),
        (
            RunConfig(method="moe", moe=MoEConfig(**BAM, adapters=True, routing="switch")),
            DENSE + 2 * (2 * FFN + 2 * ATTENTION + 6 * D * D + 6 * D),
            2 * 2 * (FFN + D * D),
        ),
    ],
    ids=["bts", "bts-mixture", "low rank", "btm", "btx", "sample split", "bam-adapters switch"],
)
def test_parameters_of_every_form(comparisons: list[Comparison], config: RunConfig, total: int, idle: int) -> None:
    """`idle`: what no token runs through, or one token does not."""
    text = to_yaml(replace(config, model=SIZES))
    write_checkpoint(comparisons[0].run_dir("it"), {MODEL_FILE: {}}, {CONFIG_FILE: text.encode()}, {"step": 0}, [])
    assert results.parameters(comparisons[0], "it")[1:] == (total, total - idle)


def cells(table: str) -> list[list[str]]:
    lines = table.splitlines()
    assert len({len(line) for line in lines}) == 1, "columns are padded"
    assert set(lines[1]) == {"|", "-"}
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


def test_markdown_has_losses_and_costs() -> None:
    result = realistic_result()
    losses, costs, _ = (cells(table) for table in results.markdown(result).strip().split("\n\n"))
    methods = {name: entry for name, entry in result["methods"].items() if ", " not in name}
    assert list(methods)[-1] == "bts-mixture"
    assert losses[0] == ["method", *result["domains"], "average", "mixed texts"]
    assert [row[0] for row in losses[1:]] == [*methods, "*oracle*"]
    rows: dict[str, Any] = {row[0]: row[1:] for row in losses[1:]}
    best = min(methods, key=lambda name: methods[name]["average"])
    for name, entry in methods.items():
        bold = "**" if name == best else ""
        assert rows[name][4] == f"{bold}{entry['average']:.3f} ± {entry['spread']:.3f}{bold}"
        assert rows[name][:4] == [f"{loss:.3f}" for loss in entry["losses"].values()]
    assert rows["*oracle*"][-1] == ""
    assert costs[0] == ["method", "trained", "total", "active", "tokens", "FLOPs", "seconds"]
    assert {row[0]: row[1:] for row in costs}["bts"] == ["530.0k", "17.3M", "17.3M", "4.1M", "1.51e+14", "350"]


def test_markdown_compares_ablations_with_their_form_seed_by_seed() -> None:
    result = realistic_result()
    methods = result["methods"]
    for name, averages in {"bts": [2.0, 2.1, 2.3], "bts, K = 1": [2.2, 2.3, 2.6]}.items():
        methods[name] |= {"averages": averages, "average": statistics.mean(averages), "spread": 0.2}
    *_, table = (cells(table) for table in results.markdown(result).strip().split("\n\n"))
    assert table[0] == ["ablation", "trained", *result["domains"], "average", "difference", "to"]
    assert [(row[0], row[1], row[-1]) for row in table[1:]] == [
        ("bts, K = 1", "70.0k", "bts"),
        ("bts, token gates", "270.0k", "bts"),
        ("bts-mixture, stream unchanged", "530.0k", "bts-mixture"),
    ]
    assert table[1][-3:-1] == ["2.367 ± 0.200", "+0.233 ± 0.058"]
    del methods["bts"], methods["bts-mixture"]
    *_, table = (cells(table) for table in results.markdown(result).strip().split("\n\n"))
    assert [row[-2] for row in table[1:]] == [""] * 3


def test_markdown_of_studies() -> None:
    result = with_studies(realistic_result())
    *_, cross, changes, curve = (cells(table) for table in results.markdown(result).strip().split("\n\n"))
    assert cross[-1] == ["bts with some", "1.900 ± 0.010"]
    assert [row[0] for row in changes[1:]] == list(result["changes"])
    assert curve[0] == ["tokens", "loss on stories"]
    assert curve[2] == ["270,000", "2.750"]


def test_files_hold_the_result(tmp_path: Path) -> None:
    result = with_studies(realistic_result(1))
    written = results.write_comparison(result, tmp_path)
    assert [path.name for path in written] == ["comparison.json", "comparison.md", "comparison.html"]
    assert json.loads(written[0].read_text()) == json.loads(json.dumps(result))
    assert written[1].read_text() == results.markdown(result)
    assert "</html>" in written[2].read_text()
