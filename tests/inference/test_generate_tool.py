"""tools/generate.py on real folders: a Hugging Face one without a tokenizer and a stitched checkpoint with one."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from megabts.bts.gates import record_gates
from megabts.bts.model import BTSModel
from megabts.build import load_model
from megabts.checkpoint.folder import write_checkpoint
from megabts.checkpoint.hf_config import config_from_hf
from megabts.checkpoint.manifest import MODEL_FILE, MemberRecord, content_hash
from megabts.checkpoint.source import CONFIG_FILE
from megabts.config.load import to_yaml
from megabts.config.methods import BTSConfig
from megabts.config.run import RunConfig
from megabts.inference.generate import generate, score
from megabts.inference.settings import GenerationSettings
from megabts.model.torch_backend import TorchBackend
from megabts.parallel.mesh import ParallelMesh
from megabts.parallel.sharding import initialise
from megabts.tokenizers.build import build_tokenizer
from megabts.tokenizers.protocol import checkpoint_files
from tests.bts.output_gates import output_gates
from tests.serving.tiny import SIZES, write_stitched
from tests.tools import RunTool

ROOT = Path(__file__).parents[2]
MEMBERS = ROOT / "tests" / "golden" / "bts" / "members"
HUB = str(MEMBERS / "hub")


@pytest.fixture
def tool(run_tool: RunTool) -> RunTool:
    """The tool: (exit code, stdout, stderr)."""
    return partial(run_tool, "generate.py")


@pytest.fixture(scope="module")
def stitched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BTS checkpoint of the golden members with random stitches, and a tokenizer."""
    folder = tmp_path_factory.mktemp("run") / "stitch" / "step_00000001"
    names = ("code", "math")
    bts = BTSConfig(HUB, {name: str(MEMBERS / name) for name in names}, num_stitch_layers=3)
    config = RunConfig(method="bts", model=config_from_hf(Path(HUB)), bts=bts)
    mesh = ParallelMesh()
    model = BTSModel(config.model, bts, TorchBackend(torch.float32, "cpu", mesh.tp))
    initialise(model.own_parameters(), 0, mesh)
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: parameter.detach() + torch.randn(parameter.shape, generator=generator) / 6
        for name, parameter, _ in model.own_parameters()
    }
    members = [MemberRecord(name, str(MEMBERS / name), content_hash(MEMBERS / name)) for name in ("hub", *names)]
    blobs = {CONFIG_FILE: to_yaml(config).encode(), **checkpoint_files(build_tokenizer("null:97"))}
    write_checkpoint(folder, {MODEL_FILE: tensors}, blobs, {}, members)
    return folder


def completion(folder: str | Path, prompt: list[int], settings: GenerationSettings) -> str:
    model = load_model(folder, ParallelMesh(), torch.float32, "cpu").model
    return " ".join(map(str, generate(model, [prompt], settings)[0]))


def test_streams_one_completion(tool: RunTool) -> None:
    arguments = ("--checkpoint", HUB, "--tokenizer", "null:97", "--prompt", "5 17 3", "--dtype", "float32")
    settings = GenerationSettings(10, 0.9, 40, 0.95, seed=3, stop_ids=(96,), num_ids=97)
    sampled = ("--temperature", "0.9", "--top-k", "40", "--top-p", "0.95", "--seed", "3", "--max-new-tokens", "10")
    code, out, err = tool(*arguments, *sampled)
    assert code == 0
    assert out == f" {completion(HUB, [5, 17, 3], settings)}\n"
    assert "10 tokens in " in err
    assert "tokens/s" in err
    assert tool(*arguments, *sampled, "--no-cache")[1] == out


def test_several_prompts_run_as_one_batch(tool: RunTool, stitched: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("9 9\n8 7\n")
    settings = ("--temperature", "0", "--max-new-tokens", "6", "--dtype", "float32")
    code, out, _ = tool("--checkpoint", str(stitched), "--prompt", "1 2 3", "--prompt-file", str(file), *settings)
    greedy = GenerationSettings(6, stop_ids=(96,))
    first, second = completion(stitched, [1, 2, 3], greedy), completion(stitched, [9, 9, 8, 7], greedy)
    assert code == 0
    assert out == f"[1]\n1 2 3 {first}\n[2]\n9 9 8 7 {second}\n"


def test_penalty_and_stop_texts(tool: RunTool, stitched: Path) -> None:
    greedy = ("--temperature", "0", "--max-new-tokens", "8", "--dtype", "float32", "--prompt", "1 2 3")
    arguments = ("--checkpoint", str(stitched), *greedy, "--repetition-penalty", "1.9")
    tokens = completion(stitched, [1, 2, 3], GenerationSettings(8, stop_ids=(96,), repetition_penalty=1.9)).split()
    assert tool(*arguments)[1] == f" {' '.join(tokens)}\n" != tool("--checkpoint", str(stitched), *greedy)[1]
    stop = f"{tokens[4]} {tokens[5]}"
    expected = f" {' '.join(tokens)}".partition(stop)[0]
    for way in ([], ["--no-cache"]):
        assert tool(*arguments, "--stop", "nothing", "--stop", stop, *way)[1] == f"{expected}\n"
    code, out, _ = tool(*arguments, "--prompt", "9", "--stop", stop)
    assert code == 0
    assert f"\n1 2 3{expected}\n[2]\n9 " in out


def test_empty_prompt_begins_a_document(tool: RunTool, stitched: Path) -> None:
    settings = ("--temperature", "0", "--max-new-tokens", "6", "--dtype", "float32")
    code, out, _ = tool("--checkpoint", str(stitched), "--prompt", "", *settings)
    assert code == 0
    assert out.strip() == completion(stitched, [96], GenerationSettings(6, stop_ids=(96,)))


def test_gates(tool: RunTool, stitched: Path) -> None:
    settings = ("--temperature", "0", "--max-new-tokens", "6", "--dtype", "float32")
    code, out, _ = tool("--checkpoint", str(stitched), "--prompt", "1 2 3", "--gates", *settings)
    assert code == 0
    text, title, *rows = [line for line in out.splitlines() if line]
    tokens = [1, 2, 3, *map(int, text.split())]
    assert f" {len(tokens)} tokens" in title
    model = load_model(stitched, ParallelMesh(), torch.float32, "cpu").model
    assert isinstance(model, BTSModel)
    with record_gates(model) as record, torch.no_grad():
        score(model, tokens)
    dominant = record.places[2][0].squeeze(-1).argmax(0).tolist()
    shares = {row.split()[0]: row.split()[1] for row in rows}
    assert shares == {
        name: f"{dominant.count(index) / len(tokens):.1%}" for index, name in enumerate(("hub", "code", "math"))
    }


def test_gates_of_a_mixture_are_its_output_s(tool: RunTool, tmp_path: Path) -> None:
    """Each prompt is a document that begins anew; the members' gates are those of what was printed."""
    sizes = replace(SIZES, cross_document_attention=False)
    checkpoint = write_stitched(tmp_path / "tiny", sizes=sizes, output="mixture", evidence=5)
    arguments = ("--checkpoint", str(checkpoint), "--temperature", "0", "--max-new-tokens", "7", "--gates")
    prompts = ["", "def f(x):"]
    code, out, err = tool(*arguments, *(part for prompt in prompts for part in ("--prompt", prompt)))
    assert code == 0, err
    model = load_model(checkpoint, ParallelMesh(), torch.float32, "cpu").model
    assert isinstance(model, BTSModel)
    texts = [[256], list(prompts[1].encode())]
    eod = 256
    rows = generate(model, texts, GenerationSettings(7, stop_ids=(eod,), eod_id=eod, num_ids=257))
    gates = torch.cat([output_gates(model, [*text, *row], eod) for text, row in zip(texts, rows, strict=True)])
    title, *rows_told = out.splitlines()[-4:]
    assert title.startswith(f"output mixture, {len(gates)} tokens: ")
    leads = gates.argmax(1).tolist()
    for index, name in enumerate(("hub", "code", "math")):
        share, mean = leads.count(index) / len(gates), gates[:, index].mean()
        assert rows_told[index].split() == [name, f"{share:.1%}", f"{mean:.3f}"]


def test_without_an_expert_is_the_checkpoint_without_it(tool: RunTool, stitched: Path) -> None:
    settings = ("--temperature", "0", "--max-new-tokens", "8", "--prompt", "1 2 3", "--dtype", "float32")
    code, out, _ = tool("--checkpoint", str(stitched), *settings, "--without", "code", "--gates")
    assert code == 0
    mesh = ParallelMesh()
    whole = load_model(stitched, mesh, torch.float32, "cpu").model
    assert isinstance(whole, BTSModel)
    small = BTSModel(
        whole.config,
        BTSConfig(HUB, {"math": "math"}, num_stitch_layers=3),
        TorchBackend(torch.float32, "cpu", mesh.tp),
    )
    tensors = dict(whole.named_parameters())
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            parameter.copy_(tensors[name])
    expected = generate(small, [[1, 2, 3]], GenerationSettings(8, stop_ids=(96,)))[0]
    lines = [line for line in out.splitlines() if line]
    assert lines[0].split() == [str(token) for token in expected]
    assert [line.split()[0] for line in lines[2:]] == ["hub", "math"]
    assert tool("--checkpoint", str(stitched), *settings)[1].split() != lines[0].split()


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        ([], 2, "nothing to continue"),
        (["--prompt", "1 2"], 1, "has no tokenizer; give --tokenizer"),
        (["--prompt", "1 2", "--tokenizer", "null:97", "--max-new-tokens", "63"], 1, "prompt 1 has 2 tokens, with 63"),
        (["--prompt", "1 2", "--tokenizer", "null:97", "--temperature", "-1"], 2, "temperature is -1"),
        (["--prompt", "1 2", "--tokenizer", "null:97", "--gates"], 2, "is a dense model and has no gates"),
        (["--prompt", "1 2", "--tokenizer", "null:97", "--without", "code"], 2, "has no experts"),
        (["--prompt", "z", "--tokenizer", "bytes", "--max-new-tokens", "4"], 1, "has token 122"),
        (["--prompt", "", "--tokenizer", "absent"], 1, "tokenizer absent does not exist"),
        (["--prompt", "1", "--tokenizer", "null:97", "--repetition-penalty", "0"], 2, "repetition_penalty is 0.0"),
        (["--prompt", "1", "--tokenizer", "null:97", "--stop", ""], 2, "stop_strings is given an empty string"),
        (["--prompt", "1", "--parallel.tensor", "2"], 2, "= 2 ranks hold the model and there are 1; start 2 with"),
        (["--prompt", "1", "--parallel.expert", "0"], 2, "parallel.expert is 0"),
        (["--prompt", "caf\udce9"], 2, "--prompt is not UTF-8 text"),
        (["--prompt-file", "absent.txt"], 1, "prompt file absent.txt cannot be read"),
        (["--prompt", "1", "--checkpoint", "absent"], 1, "there is no folder absent"),
    ],
)
def test_errors_are_one_line(tool: RunTool, arguments: list[str], code: int, message: str) -> None:
    found, _, err = tool("--checkpoint", HUB, *arguments)
    assert found == code
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_unknown_expert(tool: RunTool, stitched: Path) -> None:
    code, _, err = tool("--checkpoint", str(stitched), "--prompt", "1", "--without", "law")
    assert (code, err.count("\n")) == (1, 1)
    assert "there is no expert 'law' to remove; the experts are code, math" in err
