"""Gates with every token, and answers without some experts, against the model itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megabts.bts.model import BTSModel
from megabts.build import load_model
from megabts.inference.generate import generate
from megabts.inference.settings import GenerationSettings
from megabts.parallel.mesh import ParallelMesh
from megabts.tokenizers.build import build_tokenizer
from tests.inference.test_row_gates import flat, oracle
from tests.serving.process import ServerProcess

PROMPT = "def add(a, b):"


def load(checkpoint: Path, without: tuple[str, ...] = ()) -> BTSModel:
    model = load_model(checkpoint, ParallelMesh(), torch.float32, "cpu", without=without).model
    assert isinstance(model, BTSModel)
    return model.eval()


def streamed(server: ServerProcess, **fields: Any) -> list[dict[str, Any]]:
    """The choices of a streamed answer."""
    text = server.ask("/v1/completions", {"temperature": 0, "stream": True, **fields})[1]
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line)["choices"][0] for line in lines]


def test_gates_of_a_stream(server: ServerProcess, checkpoint: Path) -> None:
    first, *rest = streamed(server, prompt=PROMPT, max_tokens=5, gates=True)
    model, ids = load(checkpoint), list(PROMPT.encode())
    expected = oracle(model, [*ids, *generate(model, [ids], GenerationSettings(5))[0]])
    assert [token["text"] for token in first["prompt_tokens"]] == list(PROMPT)
    assert len(rest) == 5
    found = [token["gates"] for token in first["prompt_tokens"]] + [choice["gates"] for choice in rest[1:]]
    for gates, known in zip(found, expected, strict=False):
        assert flat(gates) == pytest.approx(flat(known), abs=1e-4)
    assert rest[0]["gates"] == first["prompt_tokens"][-1]["gates"]
    into_experts, into_hub = rest[-1]["gates"]
    assert into_experts[0] is None
    assert sum(into_hub) == pytest.approx(1, abs=1e-3)
    assert "gates" not in first


def test_gates_of_a_whole_answer_are_the_streams(server: ServerProcess) -> None:
    first, *rest = streamed(server, prompt=PROMPT, max_tokens=5, gates=True)
    (choice,) = server.complete(PROMPT, max_tokens=5, gates=True)["choices"]
    assert choice["prompt_tokens"] == first["prompt_tokens"]
    assert [token["gates"] for token in choice["tokens"]] == [part["gates"] for part in rest]
    assert choice["text"] == server.complete(PROMPT, max_tokens=5)["choices"][0]["text"]


@pytest.mark.parametrize("without", [(), ("math",)])
def test_gates_of_a_mixture_end_with_its_output_s(
    mixture_server: ServerProcess, mixture: Path, without: tuple[str, ...]
) -> None:
    places = mixture_server.ask("/v1/models")[1]["data"][0]["megabts"]["gate_places"]
    assert [(place["index"], place["kind"], place["layer"]) for place in places] == [
        (0, "hub_into_experts", 2),
        (1, "experts_into_hub", 4),
        (2, "output_mixture", 4),
    ]
    asked = {"prompt": PROMPT, "max_tokens": 6, "gates": True, "without": list(without)}
    first, *rest = streamed(mixture_server, **asked)
    model, ids = load(mixture, without), list(PROMPT.encode())
    expected = oracle(model, [*ids, *generate(model, [ids], GenerationSettings(6))[0]])
    found = [token["gates"] for token in first["prompt_tokens"]] + [choice["gates"] for choice in rest[1:]]
    assert len(found) == len(expected) - 1
    for gates, known in zip(found, expected, strict=False):
        assert [len(place) for place in gates] == [3 - len(without)] * 3
        assert flat(gates) == pytest.approx(flat(known), abs=1e-4)
        assert sum(gates[-1]) == pytest.approx(1, abs=2e-4)
    assert len({gates[-1][0] for gates in found}) > len(found) // 2  # tokens differ


@pytest.mark.parametrize("names", [("code",), ("math",)])
def test_without_is_the_model_without(server: ServerProcess, checkpoint: Path, names: tuple[str, ...]) -> None:
    (choice,) = server.complete(PROMPT, max_tokens=12, without=list(names), gates=True)["choices"]
    tokens = generate(load(checkpoint, names), [list(PROMPT.encode())], GenerationSettings(12))[0]
    assert choice["text"] == build_tokenizer("bytes").decode(tokens)
    assert [len(layer) for layer in choice["tokens"][0]["gates"]] == [2, 2]
    whole = server.complete(PROMPT, max_tokens=12)["choices"][0]["text"]
    assert whole != choice["text"]
    one = server.complete(PROMPT, max_tokens=12, without=names[0])["choices"][0]
    assert one["text"] == choice["text"]
