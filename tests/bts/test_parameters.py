"""Parameter counts against the paper's published ones and against models built without storage."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megabts.bts.model import BTSModel
from megabts.bts.parameters import parameter_report, short
from megabts.build import BUILDERS, num_parameters
from megabts.config.load import load_config
from megabts.config.methods import BTSConfig
from megabts.config.model import PRESETS, ModelConfig
from megabts.model.decoder import Decoder
from megabts.model.torch_backend import TorchBackend
from megabts.parallel.mesh import ParallelMesh
from tests.bts.reference import SIZES, config_of

PAPER_CONFIGS = sorted((Path(__file__).parents[2] / "examples" / "configs" / "paper").glob("*.yaml"))
PAPER = ModelConfig(preset="paper-2.7b", **PRESETS["paper-2.7b"])
DENSE = 2_689_723_392


def meta() -> TorchBackend:
    return TorchBackend(torch.bfloat16, "meta", ParallelMesh().tp)


def bts_on_meta(model: ModelConfig, bts: BTSConfig) -> BTSModel:
    return BTSModel(model, bts, meta())


def test_published_counts() -> None:
    assert PAPER.num_parameters == DENSE
    assert num_parameters(Decoder(PAPER, meta())) == (DENSE, DENSE)
    bts = config_of(3, num_stitch_layers=4)
    report = parameter_report(PAPER, bts)
    assert report.trained == 245_366_784
    assert report.paper_trained == 264_241_152
    assert report.paper_total == 11_023_134_720
    assert num_parameters(bts_on_meta(PAPER, bts)) == (report.trained, report.active)
    assert report.paper_total - report.active == 3 * (3072 + 128_000 * 3072) + 2 * 3072**2


def test_report_in_words() -> None:
    text = str(parameter_report(PAPER, config_of(3)))
    assert text.startswith("trained 245,366,784 of 11.0B; the paper counts 264,241,152 of 11,023,134,720, ")
    assert "\n" not in text
    assert [short(count) for count in (999, 1000, 12_345_678, 10**9)] == ["999", "1.0k", "12.3M", "1.0B"]


UNREAD = "with the never used hub slices of the Hub-into-Experts gates and whole members; "


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_stitch_layers": 2}, f"trained 2,304 of 34.9k; the paper counts 2,560 of 34,864, {UNREAD}"),
        ({"alternating": False}, "trained 5,120 of 37.4k; the paper counts 5,120 of 37,424, with whole members; "),
        ({"num_stitch_layers": 1}, "trained 1,280 of 33.6k; the paper counts 1,280 of 33,584, with whole members; "),
        (
            {"projection_rank": 8},
            "trained {} of {}; the paper's stitches of these members would count as 5,120 of 37,424, ",
        ),
        (
            {"projection_rank": 2, "alternating": False},
            "trained {} of {}; the paper's stitches of these members would ",
        ),
        (
            {"gate": "token"},
            "trained {} of {}; the paper's stitches of these members would count as 5,120 of 37,424, " + UNREAD,
        ),
        ({"start": "hub_leaning"}, "trained {} of {}; the paper's stitches of these members would count as 5,120 of "),
        (
            {"output": "mixture", "evidence": 3},
            "trained {} of {}; the paper's stitches of these members would count as 5,120 ",
        ),
        (
            {"trainable": ["e1"]},
            "trained {} of {}; the paper's stitches of these members would count as 5,120 of 37,424, ",
        ),
    ],
)
def test_words_are_true_of_every_form(settings: dict[str, Any], words: str) -> None:
    """What is trained and run is what is built; the paper's count is said to be this model's only where it is."""
    model, bts = ModelConfig(**SIZES), config_of(2, **settings)
    trained, active = num_parameters(bts_on_meta(model, bts))
    text = str(parameter_report(model, bts))
    assert text.startswith(words.format(f"{trained:,}", short(active)))
    assert text.endswith(f"; a token runs through {active:,}")


CASES: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
    (1, {"num_stitch_layers": 1}, {}),
    (2, {"num_stitch_layers": 5}, {}),
    (3, {"num_stitch_layers": 3, "alternating": False}, {}),
    (3, {"num_stitch_layers": 3, "placement": [3, 4, 5]}, {}),
    (2, {"num_stitch_layers": 3, "start": "hub_leaning"}, {"tie_embeddings": True}),
    (2, {"num_stitch_layers": 2, "start": "hub_preserving"}, {"qkv_bias": True, "qk_norm": True}),
    (3, {"num_stitch_layers": 4, "trainable": ["e2"]}, {}),
    (3, {"num_stitch_layers": 4, "trainable": ["hub", "e1"], "start": "hub_leaning"}, {}),
    (2, {"num_stitch_layers": 2, "trainable": []}, {}),
]


@pytest.mark.parametrize("experts, settings, sizes", CASES)
def test_report_is_what_is_built(experts: int, settings: dict[str, Any], sizes: dict[str, Any]) -> None:
    model, bts = ModelConfig(**{**SIZES, **sizes}), config_of(experts, **settings)
    report = parameter_report(model, bts)
    assert (report.trained, report.active) == num_parameters(bts_on_meta(model, bts))


@pytest.mark.parametrize("path", PAPER_CONFIGS, ids=lambda path: path.stem)
def test_paper_recipes_build(path: Path) -> None:
    """The shipped recipes of the paper, built from their files without storage or members."""
    config = load_config(["--config", str(path)])
    model = BUILDERS[config.method](config, ParallelMesh(), meta())
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    if config.method == "dense":
        assert num_parameters(model) == (DENSE, DENSE)
    elif config.method == "moe":
        assert num_parameters(model) == (7_219_817_472, 7_219_817_472)
    elif config.method == "routing":
        assert num_parameters(model) == (4 * 3072, 4 * DENSE + 4 * 3072)
    else:
        report = parameter_report(config.model, config.bts)
        assert (report.trained, report.paper_trained) == (245_366_784, 264_241_152)
        assert num_parameters(model) == (report.trained, report.active)


def test_all_paper_recipes_are_there() -> None:
    names = ["btx", "code", "math", "multilingual", "routing", "seed", "stitch"]
    assert [path.stem for path in PAPER_CONFIGS] == names
