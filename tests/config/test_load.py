"""Reading configuration: precedence, typing, overrides, messages, and writing it back."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megabts.config.load import difference, explicit_keys, from_yaml, load_config, to_yaml
from megabts.config.model import PRESETS
from megabts.config.run import RunConfig
from megabts.errors import UsageError


def write(folder: Path, text: str, name: str = "run.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def message(args: list[str]) -> str:
    with pytest.raises(UsageError) as caught:
        load_config(args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_arguments_give_the_defaults() -> None:
    assert load_config([]) == RunConfig()


def test_precedence_of_defaults_preset_files_and_overrides(tmp_path: Path) -> None:
    first = write(tmp_path, "model: {preset: 125m, num_layers: 3, ffn_size: 30}\noptimizer: {lr: 1.0}\n", "a.yaml")
    second = write(tmp_path, "model: {ffn_size: 40}\noptimizer:\n", "b.yaml")
    config = load_config(["--model.num_layers", "7", "--config", first, f"--config={second}"])
    assert config.model.norm_eps == 1e-5  # default
    assert config.model.hidden_size == PRESETS["125m"]["hidden_size"]
    assert config.model.ffn_size == 40  # the later file
    assert config.optimizer.lr == 1.0  # only in the earlier file
    assert config.model.num_layers == 7  # the command line, although it comes first


def test_preset_of_the_command_line_replaces_the_files_but_not_its_sizes(tmp_path: Path) -> None:
    file = write(tmp_path, "model: {preset: tiny, num_layers: 3}\n")
    model = load_config(["--config", file, "--model.preset", "paper-2.7b"]).model
    assert (model.hidden_size, model.num_layers, model.head_dim) == (3072, 3, 128)


@pytest.mark.parametrize("number", ["5e-6", "5.e-6", ".5e-5", "0.000005", "5E-06", "+5e-6"])
def test_numbers_that_yaml_1_1_takes_for_text(tmp_path: Path, number: str) -> None:
    file = write(tmp_path, f"optimizer: {{lr: {number}, lr_scale: {{a: {number}}}}}\nmodel: {{rope_theta: 1e6}}\n")
    config = load_config(["--config", file, f"--optimizer.eps={number}"])
    assert config.optimizer.lr == config.optimizer.lr_scale["a"] == config.optimizer.eps == pytest.approx(5e-6)
    assert config.model.rope_theta == 1e6


@pytest.mark.parametrize(
    ("arguments", "section", "name", "value"),
    [
        (["--data.split", "5"], "data", "split", "5"),
        (["--data.tokenizer=null:512"], "data", "tokenizer", "null:512"),
        (["--checkpoint.dir=--odd=name"], "checkpoint", "dir", "--odd=name"),
        (["--checkpoint.dir="], "checkpoint", "dir", ""),
        (["--checkpoint.resume", "--logging.progress"], "checkpoint", "resume", True),
        (["--checkpoint.resume", "false"], "checkpoint", "resume", False),
        (["--train.valid_every", "-1"], "train", "valid_every", -1),
        (["--train.steps", "3", "--train.steps", "2_000"], "train", "steps", 2000),
        (["--optimizer.lr", "1"], "optimizer", "lr", 1.0),
        (["--bts.trainable", "[code, math]"], "bts", "trainable", ["code", "math"]),
        (["--data.train", '{"p": 1.0}'], "data", "train", {"p": 1.0}),
        (["--data.train", "{p/a.b: 1, 1e3: 2}"], "data", "train", {"p/a.b": 1.0, "1e3": 2.0}),
        (["--data.train.p/a.b.c", "0.5"], "data", "train", {"p/a.b.c": 0.5}),
        (["--data.valid.no", "yes"], "data", "valid", {"no": "yes"}),
        (["--bts.experts.code", "12"], "bts", "experts", {"code": "12"}),
        (["--optimizer.lr_scale.head.*", "0.1"], "optimizer", "lr_scale", {"head.*": 0.1}),
        (
            ["--model.rope_scaling.type", "linear", "--model.rope_scaling.factor", "2e0"],
            "model",
            "rope_scaling",
            {"type": "linear", "factor": 2.0},
        ),
    ],
)
def test_overrides_are_typed_by_the_dataclass(arguments: list[str], section: str, name: str, value: object) -> None:
    found = getattr(getattr(load_config(arguments), section), name)
    assert found == value
    assert type(found) is type(value)


def test_items_add_to_a_mapping_and_a_whole_mapping_replaces_it(tmp_path: Path) -> None:
    file = write(tmp_path, "data: {train: {a: 1, b: 2}}\n")
    assert load_config(["--config", file, "--data.train.b", "3", "--data.train.c", "4"]).data.train == {
        "a": 1.0,
        "b": 3.0,
        "c": 4.0,
    }
    assert load_config(["--config", file, "--data.train", "{c: 4}", "--data.train.d=5"]).data.train == {
        "c": 4.0,
        "d": 5.0,
    }
    other = write(tmp_path, "data: {train: {z: 1}}\n", "other.yaml")
    assert load_config(["--config", file, "--config", other]).data.train == {"z": 1.0}


def test_loading_twice_shares_nothing() -> None:
    load_config(["--data.train.a", "1"])
    config = load_config([])
    config.data.train["b"] = 1.0
    assert load_config([]).data.train == {}


def test_mapping_keys_are_text(tmp_path: Path) -> None:
    file = write(tmp_path, "data: {valid: {no: a, 7: b, 2020-01-01: c}}\n")
    assert load_config(["--config", file]).data.valid == {"no": "a", "7": "b", "2020-01-01": "c"}


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("optimizer.lrr", "optimizer.lr"),
        ("lr", "optimizer.lr"),
        ("train.lr", "optimizer.lr"),
        ("optmizer.lr", "optimizer.lr"),
        ("optmizer", "optimizer"),
        ("train.step", "train.steps"),
        ("model.n_layers", "model.num_layers"),
        ("methd", "method"),
    ],
)
def test_unknown_keys_name_the_nearest_one(tmp_path: Path, key: str, near: str) -> None:
    assert message([f"--{key}", "1"]) == f"unknown key {key} (command line); did you mean {near}?"
    section, _, name = key.rpartition(".")
    text = f"# comment\n{section}:\n  {name}: 1\n" if section else f"# comment\n\n{name}: {{lr: 1}}\n"
    expected = section if section == "optmizer" else key  # the section itself is the unknown key
    near = "optimizer" if section == "optmizer" else near
    file = write(tmp_path, text)
    line = 2 if expected != key else 3
    assert message(["--config", file]) == f"unknown key {expected} ({file}:{line}); did you mean {near}?"


def test_unknown_key_like_nothing() -> None:
    assert message(["--zzzzqqqq", "1"]) == "unknown key zzzzqqqq (command line); --help lists all keys"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("optimizer: {lr: fast}", "optimizer.lr is 'fast' (FILE:1); expected a number"),
        ("optimizer:\n  lr: .nan", "optimizer.lr is nan (FILE:2); expected a number"),
        ("optimizer: {lr: true}", "optimizer.lr is True (FILE:1); expected a number"),
        ("optimizer: {lr: }", "optimizer.lr is None (FILE:1); expected a number"),
        (
            "optimizer: {lr_scale: {a: .inf}}",
            "optimizer.lr_scale is {'a': inf} (FILE:1); expected a mapping of names to",
        ),
        ("train: {steps: 1.5}", "train.steps is 1.5 (FILE:1); expected a whole number"),
        ("train: {steps: 1e3}", "train.steps is 1000.0 (FILE:1); expected a whole number"),
        ("data: {split: 100}", "data.split is 100 (FILE:1); expected text (quote it)"),
        ("data: {train: [p]}", "data.train is ['p'] (FILE:1); expected a mapping of names to a number"),
        ("data: {valid: {a: 1}}", "data.valid is {'a': 1} (FILE:1); expected a mapping of names to text"),
        ("bts: {trainable: code}", "bts.trainable is 'code' (FILE:1); expected a list of text"),
        ("parallel: {cuts: two}", "parallel.cuts is 'two' (FILE:1); expected a list of whole numbers"),
        ("bts: {alternating: 1}", "bts.alternating is 1 (FILE:1); expected true or false"),
        ("bts: {start: unifrm}", "bts.start is 'unifrm' (FILE:1); expected uniform or hub_leaning or hub_preserving"),
        ("method: [dense]", "method is ['dense'] (FILE:1); expected dense or bts"),
        ("optimizer: 3", "optimizer (FILE:1) is a section; give it keys, one per line below it"),
        ("data.train.p: 3", "data.train.p (FILE:1): in YAML, put p below data.train"),
        ("model: {num_heads: 0}", "model.num_heads is 0; it must be at least 1"),
        ("model: {rope_scaling: {type: [linear]}}", "model.rope_scaling type ['linear'] is unknown; use one of"),
        (
            "model: {rope_scaling: {type: linear}}",
            "model.rope_scaling of type linear needs exactly the keys ['factor', ",
        ),
        ("model: {rope_scaling: {type: linear, factor: x}}", "model.rope_scaling.factor is 'x'; it must be a positive"),
        ("bts: {trainable: &a [*a]}", "FILE:1: not valid YAML: found unconstructable recursive node"),
        ("bts: {num_stitch_layers: 0}", "bts.num_stitch_layers is 0; it must be at least 1"),
        ("bts: {placement: [x]}", "bts.placement is ['x'] (FILE:1); expected a list of whole numbers"),
        ("bts: {placement: [2, 8]}", "bts.placement [2, 8] has 2 layers, but bts.num_stitch_layers is 4; set bts.num_"),
    ],
)
def test_wrong_values_in_a_file(tmp_path: Path, given: str, expected: str) -> None:
    file = write(tmp_path, given)
    assert message(["--config", file]).startswith(expected.replace("FILE", file))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--optimizer.lr", "abc"], "optimizer.lr is 'abc' (command line); expected a number"),
        (["--optimizer.lr", "1" + "0" * 400], "optimizer.lr is '1000"),
        (["--optimizer.lr"], "--optimizer.lr needs a value"),
        (["--optimizer.lr", "--train.steps", "3"], "--optimizer.lr needs a value"),
        (["--config"], "--config needs a value"),
        (["train.steps=3"], "unexpected argument 'train.steps=3'; settings are given as --section.key VALUE"),
        (["--", "x"], "unexpected argument '--'"),
        (["--optimizer", "{lr: 3}"], "optimizer (command line) is a section; set its keys, such as optimizer.lr"),
        (["--data.train.a", "x"], "data.train is {'a': 'x'} (command line); expected a mapping of names to a number"),
        (["--data.train", "{a: 1, a: 2}"], "--data.train:1: not valid YAML: duplicate key a"),
        (["--data.train", "{a: "], "--data.train:1: not valid YAML"),
        (["--data.train.", "1"], "unknown key data.train."),
        (["--checkpoint.resume", "perhaps"], "checkpoint.resume is 'perhaps' (command line); expected true or false"),
        (
            ["--precision.fp8", "delayed"],
            "precision.fp8 delayed needs Transformer Engine; set precision.layers te, or precision.fp8 current",
        ),
        (
            ["--precision.fp8", "current", "--precision.dtype", "float64"],
            "precision.fp8 current has no results in float64; set precision.dtype bfloat16",
        ),
    ],
)
def test_wrong_arguments(arguments: list[str], expected: str) -> None:
    assert message(arguments).startswith(expected)


def test_unknown_preset_names_the_nearest(tmp_path: Path) -> None:
    file = write(tmp_path, "model:\n  preset: paper-2.7\n")
    found = message(["--config", file])
    assert found.startswith(f"model.preset 'paper-2.7' ({file}:2) is unknown; did you mean paper-2.7b?")
    assert all(name in found for name in PRESETS)


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("a: [1\nb: 2\n", 2, "expected ',' or ']'"),
        ("train:\n  steps: 1\n  seed: 2\n  steps: 3\n", 4, "duplicate key steps, first on line 2"),
        ("train: {}\ndata: {}\ntrain: {}\n", 3, "duplicate key train, first on line 1"),
        ("data:\n  train:\n    p: 1\n    p: 2\n", 4, "duplicate key p, first on line 3"),
        ("train: {}\n---\ntrain: {}\n", 2, "but found another document"),
        ("train:\n  steps: !!python/object/apply:os.getcwd []\n", 2, "could not determine a constructor"),
        ("? [a]\n: 1\n", 1, "a key must be plain text"),
        ("train:\n\tsteps: 1\n", 2, "found character"),
        ("train: {steps: !!int x}\n", 0, "invalid literal"),
        ("train: \x07\n", 0, "special characters are not allowed"),
        ("train: " + "[" * 5000, 0, "nested too deeply"),
    ],
)
def test_bad_yaml_names_the_line(tmp_path: Path, text: str, line: int, what: str) -> None:
    file = write(tmp_path, text)
    found = message(["--config", file])
    assert found.startswith(f"{file}:{line}: not valid YAML: " if line else f"{file}: not valid YAML: ")
    assert what in found


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.yaml")
    assert message(["--config", missing]) == f"cannot read config file {missing}: No such file or directory"
    assert message(["--config", str(tmp_path)]) == f"cannot read config file {tmp_path}: Is a directory"
    assert "must hold a mapping of sections, not a list" in message(["--config", write(tmp_path, "- a\n")])
    assert "is empty" in message(["--config", write(tmp_path, "# nothing\n")])
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert message(["--config", str(tmp_path / "binary.yaml")]).endswith("is not UTF-8 text")


AWKWARD = [
    "--method=bts",
    "--model.preset=125m",
    "--model.ffn_size=100",
    "--model.rope_scaling={type: linear, factor: 4}",
    "--bts.experts={code: '5e-6', math: 'null', a-b: 'true: #x'}",
    "--bts.trainable=['1e5', '*']",
    "--data.train.data/a.b c 0.5=1e-7",
    "--data.train.1e3=0.3",
    "--data.valid.Übersetzung=7_0",
    "--data.tokenizer=2024-01-01",
    "--checkpoint.dir=.5e-3",
    "--checkpoint.init_from=line\nbreak",
    "--optimizer.lr=5e-6",
    "--optimizer.eps=1e-300",
]


def test_written_configuration_loads_back_equal(tmp_path: Path) -> None:
    config = load_config(AWKWARD)
    assert config.checkpoint.dir == ".5e-3"
    text = to_yaml(config)
    assert from_yaml(text) == config
    assert load_config(["--config", write(tmp_path, text)]) == config
    assert to_yaml(from_yaml(text)) == text
    assert {
        name: set(section) if isinstance(section, dict) else None for name, section in yaml.safe_load(text).items()
    } == {
        item.name: {inner.name for inner in dataclasses.fields(getattr(config, item.name))}
        if dataclasses.is_dataclass(getattr(config, item.name))
        else None
        for item in dataclasses.fields(config)
    }


def test_from_yaml_names_its_source() -> None:
    with pytest.raises(UsageError, match=r"unknown key train\.stps \(checkpoint 7:1\); did you mean train\.steps\?"):
        from_yaml("train: {stps: 1}", "checkpoint 7")


def test_difference_lists_what_differs() -> None:
    assert difference(RunConfig()) == "all settings at their defaults"
    lines = difference(
        load_config(
            [
                "--model.preset=125m",
                "--model.ffn_size=9",
                "--data.train.p=0.5",
                "--checkpoint.resume",
                "--optimizer.lr=1",
            ]
        )
    ).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        'model.preset: 125m (default "")',
        "model.ffn_size: 9 (preset 2048)",
        "data.train.p: 0.5",
        "optimizer.lr: 1.0 (default 0.003)",
        "checkpoint.resume: true (default false)",
    ]


def test_explicit_keys_are_what_the_user_gave(tmp_path: Path) -> None:
    file = write(tmp_path, "model: {vocab_size: 512}\nbts: {experts: {a: b}}\n")
    arguments = ["--config", file, "--data.train.p/q.r", "1", "--optimizer.lr=0.003", "--method", "dense"]
    assert explicit_keys(arguments) == {"model.vocab_size", "bts.experts", "data.train", "optimizer.lr", "method"}
    assert explicit_keys([]) == set()
    assert {"model.hidden_size", "model.rope_theta"} < explicit_keys(["--model.preset", "1b"])
    assert "model.hidden_size" in explicit_keys(["--model.preset", "tiny"])
    assert "model.preset" not in explicit_keys(["--model.preset", "tiny"])


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_every_section_key_default_and_description(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as caught:
        load_config([flag])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for section in dataclasses.fields(RunConfig):
        defaults = getattr(RunConfig(), section.name)
        if not dataclasses.is_dataclass(defaults):
            continue
        assert f"\n{section.name}:\n" in shown
        for item in dataclasses.fields(defaults):
            entry = shown.split(f"\n  --{section.name}.{item.name} ")[1].split("\n  --")[0]
            default = item.default if item.default is not dataclasses.MISSING else getattr(defaults, item.name)
            text = default if isinstance(default, str) and default else json.dumps(default)
            assert f"(default: {text})" in entry
            assert len(entry.split("(default:")[0].split()) >= 3, f"{section.name}.{item.name} is not described"
    assert "Peak learning rate." in shown
    assert "{uniform,hub_leaning,hub_preserving}" in shown
    assert "(default: dense)" in shown


def test_reading_configuration_imports_no_torch() -> None:
    code = "import sys; from megabts.config.load import load_config; load_config([]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
