"""Expert routing against loops: targets, loss, what the router reads; training, resuming, generating."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megabts import assemble
from megabts.build import load_model, num_parameters, whole_model
from megabts.checkpoint.folder import write_checkpoint
from megabts.checkpoint.reader import load_tensors
from megabts.checkpoint.source import CONFIG_FILE
from megabts.config.load import load_config
from megabts.config.methods import RoutingConfig
from megabts.config.run import RunConfig
from megabts.data.indexed import IndexedDatasetBuilder
from megabts.errors import UsageError
from megabts.evaluation.perplexity import batch_loss
from megabts.inference.generate import generate, generate_uncached, score
from megabts.inference.settings import GenerationSettings
from megabts.merge.routing import CHOICE, Routing
from megabts.model.attention import Context, make_context
from megabts.model.decoder import sequence_loss
from megabts.parallel.layout import check_layout
from megabts.parallel.sharding import name_seed
from tests.bts.folders import write_members
from tests.inference.steps import Batch
from tests.merge.models import MESH, backend, config, dense_like, folders, randomised, windows
from tests.train.runs import arguments, build, train

PROMPTS = [[5, 17, 30, 3, 12, 8, 1], [9], [21, 21, 7, 4]]
SEEDS = [name_seed(f"sample {number}", 7) for number in range(4)]


def routing(dtype: torch.dtype = torch.float32, *, alike: bool = False, shake: float = 0.0) -> Routing:
    settings = RoutingConfig(folders(), min_tokens=2, max_tokens=5)
    model = randomised(Routing(config(), settings, backend(dtype)), alike=alike)
    with torch.no_grad():
        noise = torch.randn(model.router.weight.shape, generator=torch.Generator().manual_seed(4))
        model.router.weight.add_(noise, alpha=shake)
    return model


def forward(model: Routing, tokens: Tensor, seeds: list[int] | None) -> tuple[Tensor, Context]:
    context = make_context(model.config, torch.arange(tokens.shape[1]), model.dtype, dropout_seeds=seeds)
    return model.run_layers(0, model.config.num_layers, model.embed(tokens), context), context


def router_logits(model: Routing, text: list[int]) -> Tensor:
    """Of the mean embedding of these tokens, by the first member's embedding."""
    rows = [model.decoders()[0].embedding.weight[token] for token in text]
    mean = sum(rows) / len(rows)  # type: ignore[call-overload]
    return torch.stack([weight @ mean for weight in model.router.weight])


def member_losses(model: Routing, tokens: Tensor, labels: Tensor, mask: Tensor) -> list[list[float]]:
    """[row][member], each sequence alone."""
    pieces = [(tokens[i : i + 1], labels[i : i + 1], mask[i : i + 1]) for i in range(len(tokens))]
    return [[float(sequence_loss(member, *piece)) for member in model.decoders()] for piece in pieces]


def test_training_loss_target_and_gradient() -> None:
    model = routing(torch.float64, shake=0.5)
    tokens, labels = windows(4, 7)
    mask = torch.ones(4, 7)
    mask[0, 2:] = mask[2, 0] = 0
    hidden, context = forward(model, tokens, SEEDS)
    loss = model.loss(hidden, labels, mask, context)
    loss.backward()
    weight = model.router.weight
    found = weight.grad
    assert found is not None
    lengths = [2 + name_seed("router", seed) % 4 for seed in SEEDS]
    assert len(set(lengths)) > 1
    assert set(lengths) <= {2, 3, 4, 5}
    expected = torch.zeros((), dtype=torch.float64)
    targets = set()
    for row, losses in enumerate(member_losses(model, tokens, labels, mask)):
        target = losses.index(min(losses))
        targets.add(target)
        chances = router_logits(model, tokens[row, : lengths[row]].tolist()).softmax(-1)
        expected = expected - chances[target].log() * mask[row].sum()
    assert len(targets) > 1
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(found, torch.autograd.grad(expected, weight)[0], rtol=1e-9, atol=1e-12)
    assert all(parameter.grad is None for parameter in model.members.parameters())
    assert not any(parameter.requires_grad for parameter in model.members.parameters())
    assert [name for name, _, _ in model.own_parameters()] == ["router.weight"]


def test_evaluation_is_the_chosen_members_loss() -> None:
    """A window is judged by its first max_tokens tokens."""
    model = routing(torch.float64, shake=0.5)
    tokens, labels = windows(8, 9, seed=2)
    mask = torch.ones(8, 9)
    mask[1, 3] = 0
    chosen = [int(router_logits(model, row[:5]).argmax()) for row in tokens.tolist()]
    assert len(set(chosen)) == 3
    losses = member_losses(model, tokens, labels, mask)
    expected = sum(row[choice] for row, choice in zip(losses, chosen, strict=True))
    with torch.no_grad():
        assert float(sequence_loss(model, tokens, labels, mask)) == pytest.approx(expected, rel=1e-9)
    alone = [float(sequence_loss(model, tokens[i : i + 1], labels[i : i + 1], mask[i : i + 1])) for i in range(8)]
    assert sum(alone) == pytest.approx(expected, rel=1e-9)


def test_identical_members_are_the_dense_model() -> None:
    model = routing(torch.float64, alike=True, shake=0.5)
    dense = dense_like(model)
    with torch.inference_mode():
        for prompt in PROMPTS:
            torch.testing.assert_close(score(model, prompt), score(dense, prompt), rtol=1e-9, atol=1e-9)
        ours, theirs = (Batch(m, PROMPTS, 3) for m in (model, dense))
        torch.testing.assert_close(ours.begin(), theirs.begin(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_generation_by_the_member_that_the_prompt_chose(temperature: float) -> None:
    model = routing(shake=0.5)
    settings = GenerationSettings(max_new_tokens=10, temperature=temperature)
    fast = generate(model, PROMPTS, settings)
    assert fast == generate_uncached(model, PROMPTS, settings)
    chosen = [int(router_logits(model, prompt).argmax()) for prompt in PROMPTS]
    assert len(set(chosen)) > 1
    if temperature == 0:
        members = model.decoders()
        pairs = zip(chosen, PROMPTS, strict=True)
        assert fast == [generate(members[choice], [prompt], settings)[0] for choice, prompt in pairs]


def test_a_single_row_is_the_work_of_one_member() -> None:
    model = routing(shake=0.5)
    ran: list[nn.Module] = []
    for member in model.decoders():
        member.layers["0"].register_forward_hook(lambda layer, *_: ran.append(layer))
    generate(model, [PROMPTS[0]], GenerationSettings(max_new_tokens=4))
    assert len(ran) == 4
    assert len(set(ran)) == 1


def test_published_size_and_refusals() -> None:
    sizes = load_config(["--model.preset", "paper-2.7b"]).model
    run = RunConfig(method="routing", model=sizes, routing=RoutingConfig(folders(("seed", "code", "math", "law"))))
    assert num_parameters(whole_model(run)) == (12_288, 10_758_893_568 + 12_288)
    for axis in ("tensor", "pipeline", "expert"):
        refused = load_config([f"--parallel.{axis}", "2", "--method", "routing"])
        with pytest.raises(UsageError, match=f"parallel.{axis} is 2, but method routing runs data-parallel only"):
            check_layout(refused, 2)
    with pytest.raises(UsageError, match=r"routing\.min_tokens is 9"):
        RoutingConfig(min_tokens=9, max_tokens=8)


def write_domain(prefix: Path, low: int, high: int, seed: int) -> str:
    """Documents whose tokens lie in [low, high)."""
    rng = np.random.RandomState(seed)
    with IndexedDatasetBuilder(prefix, np.uint16) as builder:
        for _ in range(30):
            builder.add_item(rng.randint(low, high, 100))
            builder.end_document()
        builder.finalize()
    return str(prefix)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[str]]:
    """A folder, the arguments of a run of 30 steps in its `whole`, trained, and the two domains' prefixes.

    The seed's tokens are all alike likely; each expert's head is biased to one domain.
    """
    root = tmp_path_factory.mktemp("routing")
    prefixes = [write_domain(root / name, low, high, low) for name, low, high in (("low", 0, 15), ("high", 15, 31))]
    paths = write_members(root, "low_expert", "high_expert", max_seq_len=48)
    for number, path in enumerate(paths.values()):
        tensors = load_tensors(Path(path), "model.safetensors")
        for name, tensor in tensors.items():
            if "embedding" in name:  # the first feature is 1, large, whatever follows
                tensor[:, 0] = 10.0
            if name.endswith(("out.weight", "down.weight")):
                tensor.zero_()
        head = tensors["head.weight"]
        head.zero_()
        head[:15, 0] = 0.5 if number == 0 else -0.5
        text = (Path(path) / CONFIG_FILE).read_bytes()
        write_checkpoint(Path(path), {"model.safetensors": tensors}, {CONFIG_FILE: text}, {"step": 0})
    base = {
        "method": "routing",
        "routing.members": json.dumps(paths),
        "routing.min_tokens": 4,
        "routing.max_tokens": 8,
        "data.seq_length": 16,
        "train.steps": 30,
        "train.global_batch": 8,
        "train.micro_batch": 4,
        "train.valid_every": -1,
        "optimizer.lr": 0.05,
        "optimizer.schedule": "constant",
        "optimizer.weight_decay": 0.0,
        "logging.tensorboard": False,
    }
    args = arguments(root / "whole", dict.fromkeys(prefixes, 0.5), base, checkpoint__every=15)
    assert train(args) == 0
    return root, args, prefixes


def accuracy(folder: Path) -> float:
    """How often the router of a checkpoint finds the domain that a window of 16 tokens is from."""
    model = load_model(folder, MESH, torch.float32, "cpu").model
    assert isinstance(model, Routing)
    generator = torch.Generator().manual_seed(11)
    right = 0
    for number, (low, high) in enumerate([(0, 15), (15, 31)]):
        with torch.no_grad():
            _, context = forward(model, torch.randint(low, high, (50, 16), generator=generator), None)
        right += int((context.memory[CHOICE] == number).sum())
    return right / 100


def test_training_finds_the_domains(trained: tuple[Path, list[str], list[str]], tmp_path: Path) -> None:
    root, args, _ = trained
    members = {name: str(root / name) for name in ("low_expert", "high_expert")}
    assemble.combine("routing", members, tmp_path / "start")
    assert accuracy(tmp_path / "start") == 0.5
    assert accuracy(root / "whole") > 0.9
    assert set(load_tensors(root / "whole" / "step_00000030", "model.safetensors")) == {"router.weight"}
    run = build(args)
    assert run.optimizer.names == ["router.weight"]
    assert num_parameters(run.model)[0] == 2 * run.config.model.hidden_size
    batch = run.loader.read(0, 4)
    before, after = (
        batch_loss(load_model(folder, MESH, None, "cpu").model, batch, torch.device("cpu")).item()
        for folder in (tmp_path / "start", root / "whole")
    )
    assert after < before


def test_resumes_bit_for_bit(trained: tuple[Path, list[str], list[str]], tmp_path: Path) -> None:
    root, args, _ = trained
    shutil.copytree(root / "whole" / "step_00000015", tmp_path / "half" / "step_00000015")
    resumed = [f"--checkpoint.dir={tmp_path / 'half'}" if arg.startswith("--checkpoint.dir=") else arg for arg in args]
    assert train([*resumed, "--checkpoint.resume=true"]) == 0
    for file in ("model.safetensors", "optimizer.safetensors"):
        whole, half = (load_tensors(folder / "step_00000030", file) for folder in (root / "whole", tmp_path / "half"))
        assert whole.keys() == half.keys()
        assert all(torch.equal(whole[name], half[name]) for name in whole)


def test_starts_from_what_merge_wrote(trained: tuple[Path, list[str], list[str]], tmp_path: Path) -> None:
    root, args, _ = trained
    members = {name: str(root / name) for name in ("low_expert", "high_expert")}
    assemble.combine("routing", members, tmp_path / "start")
    kept = [arg for arg in args if not arg.startswith(("--routing", "--method", "--checkpoint"))]
    run = build([*kept, f"--checkpoint.init_from={tmp_path / 'start'}"])
    assert isinstance(run.model, Routing)
    assert [member.name for member in run.members] == ["low_expert", "high_expert"]
