"""The shipped configurations load, and hold the numbers of the paper."""

from pathlib import Path

import pytest

from megabts.config.load import from_yaml, load_config, to_yaml
from megabts.config.methods import MoEConfig
from megabts.config.run import RunConfig

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
SHIPPED = sorted(path for path in CONFIGS.rglob("*.yaml") if path.name != "scale.yaml")


def load(name: str) -> RunConfig:
    return load_config(["--config", str(CONFIGS / f"{name}.yaml")])


@pytest.mark.parametrize("path", SHIPPED, ids=[str(path.relative_to(CONFIGS)) for path in SHIPPED])
def test_shipped_configuration_loads_and_round_trips(path: Path) -> None:
    config = load_config(["--config", str(path)])
    assert config != RunConfig()
    assert from_yaml(to_yaml(config)) == config
    assert config.train.global_batch % config.train.micro_batch == 0
    if not {"quickstart", "compare"} & set(path.parts):  # experiments give their runs their paths
        assert config.data.train
        assert config.checkpoint.dir


PAPER = ["seed", "code", "math", "multilingual", "stitch"]


@pytest.mark.parametrize("name", PAPER)
def test_paper_sizes_and_batch(name: str) -> None:
    config = load(f"paper/{name}")
    assert config.model.num_parameters == 2_689_723_392
    assert config.train.global_batch * config.data.seq_length == 2**21
    assert config.precision.dtype == "bfloat16"
    assert (config.optimizer.schedule, config.optimizer.min_lr_ratio) == ("cosine", 0.01)


@pytest.mark.parametrize(
    ("name", "lr", "warmup", "steps"),
    [
        ("seed", 4e-4, 2000, None),
        ("code", 5e-6, 0, 96_000),
        ("math", 5e-6, 0, 96_000),
        ("multilingual", 5e-6, 0, 96_000),
        ("stitch", 5e-6, 2000, 7000),
    ],
)
def test_paper_schedule(name: str, lr: float, warmup: int, steps: int | None) -> None:
    config = load(f"paper/{name}")
    assert (config.optimizer.lr, config.optimizer.warmup_steps) == (lr, warmup)
    assert steps is None or config.train.steps == steps


def test_paper_recipes_fit_together() -> None:
    seed, stitch = load("paper/seed"), load("paper/stitch")
    assert stitch.method == "bts"
    assert stitch.bts.hub == seed.checkpoint.dir
    assert stitch.bts.experts == {name: load(f"paper/{name}").checkpoint.dir for name in PAPER[1:4]}
    assert all(load(f"paper/{name}").checkpoint.init_from == seed.checkpoint.dir for name in PAPER[1:4])
    assert sorted(stitch.data.train.values()) == [0.15, 0.15, 0.15, 0.55]
    assert stitch.data.train["data/general_text_document"] == 0.55
    assert (stitch.bts.num_stitch_layers, stitch.bts.alternating, stitch.bts.expert_stream) == (4, True, "projected")


def test_tiny_recipes_fit_together() -> None:
    seed, expert, stitch = load("tiny/seed"), load("tiny/expert"), load("tiny/stitch")
    assert expert.checkpoint.init_from == stitch.bts.hub == seed.checkpoint.dir
    assert stitch.bts.experts == {"code": expert.checkpoint.dir}
    assert seed.model == expert.model == stitch.model


def test_mixture_recipes() -> None:
    paper, tiny = load("paper/btx"), load("tiny/moe")
    assert list(paper.moe.members.values()) == [load(f"paper/{name}").checkpoint.dir for name in PAPER[:4]]
    assert paper.moe == MoEConfig(paper.moe.members, routing="topk", top_k=2, balance=0.01)
    optimizer = paper.optimizer
    assert (optimizer.lr, optimizer.warmup_steps, optimizer.schedule) == (1e-4, 100, "cosine")
    assert (optimizer.min_lr_ratio, optimizer.weight_decay) == (0.1, 0.1)
    assert paper.train.global_batch * paper.data.seq_length == 2**22
    assert paper.train.steps == round(80e9 / 2**22)
    assert paper.moe.num_ffn_experts % paper.parallel.expert == 0
    assert tiny.model == load("tiny/seed").model
    assert tiny.method == paper.method == "moe"
