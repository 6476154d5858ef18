"""Gate values along a text: against the recorder, the picture's lines against the values, and the tool."""

import json
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from megabts.bts.gates import record_gates
from megabts.bts.model import BTSModel
from megabts.build import load_model
from megabts.errors import UsageError, UserError
from megabts.inference.generate import score
from megabts.parallel.mesh import ParallelMesh
from megabts.tokenizers.build import build_tokenizer
from megabts.viz.figures import PALETTE
from megabts.viz.gates import MAX_LABELLED, GateTrace, choose_layers, draw_gates, label_of, trace_gates
from tests.bts.output_gates import output_gates
from tests.serving.tiny import write_dense, write_stitched
from tests.tools import RunTool

PARTS = ["def f(é):", "1 + 1 = 2", "So be it."]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stitched(tmp_path_factory.mktemp("gates") / "tiny")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> BTSModel:
    loaded = load_model(checkpoint, ParallelMesh(), torch.float32, "cpu").model
    assert isinstance(loaded, BTSModel)
    return loaded


@pytest.fixture
def tool(run_tool: RunTool) -> RunTool:
    """The tool: (exit code, stdout, stderr)."""
    return partial(run_tool, "plot_gates.py")


def test_values_are_those_of_one_pass_over_the_parts(model: BTSModel) -> None:
    trace = trace_gates(model, build_tokenizer("bytes"), PARTS)
    text = "\n\n".join(PARTS)
    ids = list(text.encode())
    assert "".join(trace.tokens) == text
    assert trace.tokens[6:9] == ["", "é", ")"]  # two bytes, of which the second makes it whole
    assert [bytes(ids[switch:]).decode() for switch in trace.switches] == ["1 + 1 = 2\n\nSo be it.", "So be it."]
    assert trace.members == ["hub", "code", "math"]
    assert trace.layers == ["layer 2, Hub-into-Experts", "layer 4, Experts-into-Hub"]
    with torch.inference_mode(), record_gates(model) as record:
        score(model, ids)
    first, last = (torch.tensor(rows) for rows in (trace.values[0][1:], trace.values[1]))
    assert trace.values[0][0] == [None] * len(ids)
    torch.testing.assert_close(first, record.places[0][0][:, :, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(last, record.places[1][0][:, :, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(last.sum(0), torch.ones(len(ids)), rtol=0, atol=1e-5)
    assert last.std(1).min() > 1e-3  # tokens differ


def test_a_model_in_training_is_traced_without_dropout_and_left_training(model: BTSModel) -> None:
    still = trace_gates(model, build_tokenizer("bytes"), ["abc"])
    model.train()
    assert trace_gates(model, build_tokenizer("bytes"), ["abc"]) == still
    assert model.training
    model.eval()


def test_a_mixture_s_output_is_drawn_unless_something_else_is_asked_for(tool: RunTool, tmp_path: Path) -> None:
    checkpoint = write_stitched(tmp_path / "tiny", output="mixture", evidence=4)
    loaded = load_model(checkpoint, ParallelMesh(), torch.float32, "cpu").model
    assert isinstance(loaded, BTSModel)
    trace = trace_gates(loaded, build_tokenizer("bytes"), PARTS)
    assert trace.layers == ["layer 2, Hub-into-Experts", "layer 4, Experts-into-Hub", "output mixture"]
    found, ids = torch.tensor(trace.values[2]), list("\n\n".join(PARTS).encode())
    torch.testing.assert_close(found.T, output_gates(loaded, ids), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.sum(0), torch.ones(len(ids)), rtol=0, atol=1e-5)
    for wanted, kept in (([], [2]), (["output"], [2]), (["output", "2"], [0, 2]), (["all"], [0, 1, 2]), (["4"], [1])):
        chosen = choose_layers(trace, wanted)
        assert (chosen.layers, chosen.values) == ([trace.layers[n] for n in kept], [trace.values[n] for n in kept])

    picture = tmp_path / "a.svg"
    arguments = ["--checkpoint", checkpoint, "--prompt", PARTS[0], "--switch", PARTS[1], "--switch", PARTS[2]]
    done = tool(*arguments, "--out", picture, "--json", tmp_path / "a.json")
    assert done == (0, f"wrote {picture}; tokens: {len(ids)}, panels: 1\n", "")
    assert GateTrace.from_dict(json.loads((tmp_path / "a.json").read_text())) == choose_layers(trace, [])
    assert [len(line) for colour in PALETTE[:3] for line in lines_of(picture, colour)] == [len(ids)] * 3
    words = picture.read_text()
    assert ">output mixture<" in words
    assert "gate, mean" not in words
    done = tool(*arguments, "--without", "code", "--layer", "all", "--out", picture)
    assert done == (0, f"wrote {picture}; tokens: {len(ids)}, panels: 3\n", "")
    assert ">code<" not in picture.read_text()


def made_up(num_tokens: int, switches: list[int]) -> GateTrace:
    """Three members over two layers; no two values are alike."""
    values: list[list[list[float | None]]] = [
        [[None] * num_tokens, *([0.01 * (t + 1) + 0.2 * m for t in range(num_tokens)] for m in (1, 2))],
        [[0.3 + 0.001 * t * (-1) ** m + 0.1 * m for t in range(num_tokens)] for m in range(3)],
    ]
    tokens = [f"t{number}" for number in range(num_tokens)]
    layers = ["layer 2, Hub-into-Experts", "layer 4, Experts-into-Hub"]
    return GateTrace(["hub", "code", "math"], layers, tokens, values, switches)


def lines_of(path: Path, colour: str) -> list[list[tuple[float, float]]]:
    """The points of every line of a colour that has more than two."""
    found = []
    for element in ElementTree.parse(path).iter(f"{SVG}path"):
        style, numbers = element.get("style") or "", (element.get("d") or "").replace("M", "").split("L")
        if colour.lower() in style and "fill: none" in style and len(numbers) > 2:
            found.append([(float(x), float(y)) for x, y in (pair.split() for pair in numbers)])
    return found


def test_the_picture_has_a_line_per_member_and_layer_at_its_values(tmp_path: Path) -> None:
    trace = made_up(12, [5])
    draw_gates(trace, tmp_path / "new" / "a.svg")
    for member, colour in enumerate(PALETTE[:3]):
        lines = lines_of(tmp_path / "new" / "a.svg", colour)
        given = [rows[member] for rows in trace.values if rows[member][0] is not None]
        assert len(lines) == len(given)
        for line, row in zip(lines, given, strict=True):
            heights, widths = torch.tensor([y for _, y in line]), torch.tensor([x for x, _ in line])
            wanted = torch.tensor(row)
            scale = (heights[-1] - heights[0]) / (wanted[-1] - wanted[0])
            assert scale < 0  # a picture's heights are counted from above
            torch.testing.assert_close(heights - heights[0], scale * (wanted - wanted[0]), rtol=0, atol=0.01)
            torch.testing.assert_close(widths.diff(), widths.diff()[:1].expand(11), rtol=0, atol=0.01)
    text = (tmp_path / "new" / "a.svg").read_text()
    for words in ("layer 2, Hub-into-Experts", "layer 4, Experts-into-Hub", ">hub<", ">code<", ">math<", ">t11<"):
        assert words in text
    assert text.count("stroke: #5d6670") == 2  # the switch, in both panels


def test_many_tokens_are_numbered(tmp_path: Path) -> None:
    draw_gates(made_up(MAX_LABELLED + 1, []), tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert ">t1<" not in text
    assert ">token<" in text


def test_labels_can_be_read() -> None:
    assert label_of(" a\n\tb") == "·a↵⇥b"
    assert label_of("x" * 20) == "x" * 14 + "…"
    assert label_of("$a_b$\u202e") == "$a_b$\\u202e"
    assert label_of("\U0001f9f5") == "\\u1f9f5"  # no glyph


def test_layers_are_chosen_by_where_they_are() -> None:
    trace = made_up(3, [1])
    assert choose_layers(trace, []) == trace
    assert choose_layers(trace, ["all"]) == trace
    last = choose_layers(trace, ["4"])
    assert (last.layers, last.values, last.switches) == (trace.layers[1:], trace.values[1:], [1])
    for absent in ("3", "output"):
        told = f"--layer {absent}: there are no gates of that name; there are 2, 4, all$"
        with pytest.raises(UsageError, match=told):
            choose_layers(trace, ["4", absent])


def test_what_cannot_be_traced(model: BTSModel) -> None:
    tokenizer = build_tokenizer("bytes")
    with pytest.raises(UserError, match="the prompt has no tokens"):
        trace_gates(model, tokenizer, [""])
    with pytest.raises(UserError, match="the prompt has 257 tokens, the model takes 256"):
        trace_gates(model, tokenizer, ["x" * 200, "y" * 55])
    with pytest.raises(UserError, match=r"token 300, the model's vocabulary ends at 256"):
        trace_gates(model, build_tokenizer("null:999"), ["4 300"])
    with pytest.raises(UserError, match="gate values of"):
        GateTrace(["hub"], ["layer 2, Experts-into-Hub"], ["a"], [[[0.5, 0.5]]], [])


def test_the_tool_draws_and_keeps_values(tool: RunTool, checkpoint: Path, model: BTSModel, tmp_path: Path) -> None:
    (tmp_path / "part.txt").write_text("So be it.\n")
    picture, values = tmp_path / "out" / "a.png", tmp_path / "values" / "a.json"
    arguments = ["--prompt", PARTS[0], "--switch", PARTS[1], "--switch-file", tmp_path / "part.txt"]
    done = tool("--checkpoint", checkpoint, *arguments, "--layer", "4", "--out", picture, "--json", values)
    assert done == (0, f"wrote {picture}; tokens: 32, panels: 1\n", "")
    assert picture.stat().st_size > 10_000
    kept = GateTrace.from_dict(json.loads(values.read_text()))
    assert kept == choose_layers(trace_gates(model, build_tokenizer("bytes"), PARTS), ["4"])
    done = tool("--checkpoint", checkpoint, "--prompt", "abc", "--without", "code", "--out", tmp_path / "b.pdf")
    assert done[0] == 0
    assert (tmp_path / "b.pdf").read_bytes().startswith(b"%PDF")


def test_the_tool_refuses_in_one_line(tool: RunTool, checkpoint: Path, tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense", 0)
    given = ["--checkpoint", dense, "--prompt", "abc", "--out"]
    told = f"error: {dense} is a dense model and has no gates; give a stitched one\n"
    assert tool(*given, tmp_path / "a.png") == (2, "", told)
    told = f"error: --out {tmp_path / 'a.gif'} is no picture's name; end it with .png, .svg or .pdf\n"
    assert tool(*given, tmp_path / "a.gif") == (2, "", told)
    missing = tmp_path / "missing.txt"
    told = f"error: prompt file {missing} cannot be read: No such file or directory\n"
    assert tool("--checkpoint", checkpoint, "--prompt-file", missing, "--out", tmp_path / "a.png") == (1, "", told)
    taken = tmp_path / "taken"
    taken.touch()
    told = f"error: {taken} cannot be written: File exists; give another path\n"
    assert tool("--checkpoint", checkpoint, "--prompt", "abc", "--out", taken / "a.png") == (1, "", told)
