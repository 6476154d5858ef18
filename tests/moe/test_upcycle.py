"""Upcycling: identical members give the dense model's logits, averages and chunks by hand, the paper's size, memory."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megabts import assemble
from megabts.build import num_parameters, whole_model
from megabts.checkpoint.manifest import MODEL_FILE
from megabts.checkpoint.reader import load_tensors
from megabts.checkpoint.source import open_dense
from megabts.config.load import load_config
from megabts.config.methods import MoEConfig
from megabts.config.run import RunConfig
from megabts.errors import UsageError, UserError
from megabts.inference.generate import score
from megabts.model.attention import Context
from megabts.model.decoder import Decoder
from megabts.moe.flops import moe_flops
from megabts.moe.routes import record_routes
from megabts.moe.upcycle import dense_name, upcycle
from tests.bts.folders import write_dense
from tests.moe.models import MEMBERS, SIZES, dense_model, moe_model
from tests.tools import RunTool
from tests.train.runs import MEMBERS as GOLDEN

TEXT = [3, 7, 1, 30, 12, 4, 0, 29, 5]


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def context() -> Context:
    """That of an evaluation."""
    return Context((torch.empty(0), torch.empty(0)))


def upcycled(members: list[dict[str, Tensor]], dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A MoE model of these members' weights."""
    model = moe_model(dtype=dtype, **settings).train(False)
    metas = {name: meta for name, _, meta in model.own_parameters()}
    order = [dense_name(name) for name in metas if dense_name(name)]
    made = dict(upcycle(metas, model.moe, [[(name, one[name]) for name in order] for one in members], 0))
    assert list(made) == list(metas)
    model.load_state_dict(made)
    return model


@pytest.mark.parametrize("settings", [{"top_k": 2}, {"top_k": 3}, {"routing": "soft"}, {"routing": "sample"}])
@pytest.mark.parametrize("copies", [1, 3])
def test_identical_members_give_the_dense_logits(settings: dict[str, Any], copies: int) -> None:
    dense = dense_model(torch.float32)
    model = upcycled([state(dense)] * copies, torch.float32, **settings)
    with torch.no_grad():
        found, expected = score(model, TEXT), score(dense, TEXT)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_switch_weights_the_feed_forward_with_the_probability() -> None:
    dense = dense_model()
    model = upcycled([state(dense)] * 3, routing="switch")
    routed, mlp = model.layers["0"].mlp, dense.layers["0"].mlp
    x = torch.randn(6, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    p = routed.router(x).softmax(-1).amax(-1, keepdim=True)
    assert torch.allclose(routed(x, context(), 0), p * mlp(x), rtol=1e-9)


@pytest.mark.parametrize("blend", [False, True])
def test_equal_weights_on_all_chunks_give_the_mean_feed_forward(blend: bool) -> None:
    dense = [dense_model(), member(7), member(8)]
    model = upcycled([state(one) for one in dense], routing="soft", split=2, blend=blend)
    routed = model.layers["1"].mlp
    with torch.no_grad():
        routed.router.weight.zero_()
    x = torch.randn(4, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mean = sum(one.layers["1"].mlp(x) for one in dense) / 3
    assert torch.allclose(routed(x, context(), 1), mean, rtol=1e-10, atol=1e-12)


def member(seed: int) -> Decoder:
    """A dense model with other weights for every seed."""
    model = dense_model()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model


def test_chunks_and_averages_by_hand() -> None:
    dense = [state(member(seed)) for seed in (1, 2, 3)]
    prefix, f, c, n = "layers.0.mlp.", 24, 2, 3
    split = state(upcycled(dense, split=c))
    blend = state(upcycled(dense, split=c, blend=True))
    for number in range(n):
        gate_up, down = dense[number][prefix + "gate_up.weight"], dense[number][prefix + "down.weight"]
        for chunk in range(c):
            rows = slice(chunk * f // c, (chunk + 1) * f // c)
            expert = split[prefix + "experts.gate_up"][number * c + chunk]
            assert torch.equal(expert, torch.cat([gate_up[:f][rows], gate_up[f:][rows]]))
            assert torch.equal(split[prefix + "experts.down"][number * c + chunk], down[:, rows] * c)
    for expert_number in range(n * c):
        rows = slice(expert_number * f // (n * c), (expert_number + 1) * f // (n * c))
        gates = [one[prefix + "gate_up.weight"][:f][rows] for one in dense]
        ups = [one[prefix + "gate_up.weight"][f:][rows] for one in dense]
        downs = [one[prefix + "down.weight"][:, rows] for one in dense]
        assert torch.equal(blend[prefix + "experts.gate_up"][expert_number], torch.cat([*gates, *ups]))
        assert torch.equal(blend[prefix + "experts.down"][expert_number], torch.cat(downs, 1) * c)
    for name in ("embedding.weight", "layers.1.attention.qkv.weight", "layers.1.mlp_norm.weight", "head.weight"):
        assert torch.allclose(split[name], sum(one[name] for one in dense) / 3, rtol=1e-12)


def paper(**settings: Any) -> RunConfig:
    members = {name: name for name in ("seed", "code", "math", "languages")}
    config = load_config(["--model.preset=paper-2.7b", "--method=moe"])
    return replace(config, moe=MoEConfig(members, **settings))


def test_the_published_size() -> None:
    config = paper(routing="soft")
    assert num_parameters(whole_model(config)) == (7_219_817_472, 7_219_817_472)
    assert num_parameters(whole_model(paper(routing="soft", split=2)))[1] == 7_219_817_472 + 245_760
    trainable, total = num_parameters(whole_model(paper(freeze_ffn_experts=True)))
    assert total - trainable == 20 * 4 * 3 * 3072 * 8192


@pytest.mark.parametrize(
    "settings, experts", [({"routing": "soft"}, 80), ({"routing": "sample"}, 23), ({"top_k": 2}, 40)]
)
def test_flops_are_of_the_active_parameters(settings: dict[str, Any], experts: int) -> None:
    config = paper(**settings)
    d, f, s = 3072, 8192, 1024
    dense = 2_689_723_392 - 128_000 * d - 41 * d - 20 * 3 * d * f  # no embedding, norms, feed-forwards
    forward = 2 * (dense + experts * 3 * d * f + 20 * 4 * d) + 20 * 2 * s * d
    flops = moe_flops(config.model, config.moe, s)
    assert flops.total == 3 * forward
    frozen = moe_flops(config.model, replace(config.moe, freeze_ffn_experts=True), s)
    assert flops.total - frozen.total == 2 * experts * 3 * d * f


def test_routes_are_recorded() -> None:
    model = upcycled([state(member(seed)) for seed in (1, 2, 3)], routing="switch")
    with torch.no_grad():
        model.layers["1"].mlp.router.weight.zero_()
    with torch.no_grad(), record_routes(model) as record:
        score(model, TEXT)
        score(model, TEXT)
    layer = record.layers[1]
    assert (layer.tokens, layer.dead, layer.dropped) == (18, [1, 2], 0)
    assert layer.share.tolist() == [1, 0, 0]
    assert layer.mean_gate.tolist() == pytest.approx([1 / 3, 0, 0])
    assert layer.mean_entropy == pytest.approx(1.0986122886681098)
    assert record.layers[0].share.sum().item() == pytest.approx(1)
    score(model, TEXT)
    assert record.layers[1].tokens == 18


def test_a_checkpoint_is_written_and_others_are_refused(tmp_path: Path) -> None:
    folders = {name: str(write_dense(tmp_path / name, seed, **SIZES)) for seed, name in enumerate(MEMBERS, 1)}
    seen: list[tuple[int, int]] = []
    config = RunConfig(moe=MoEConfig(folders))
    made = assemble.upcycle(config, tmp_path / "out", watch=lambda done, total: seen.append((done, total)))
    assert made.method == "moe"
    assert seen[-1] == (len(seen), len(seen))
    found = load_tensors(tmp_path / "out", MODEL_FILE)
    members = [load_tensors(Path(folder), MODEL_FILE) for folder in folders.values()]
    for number, weights in enumerate(members):
        assert torch.equal(found["layers.1.mlp.experts.down"][number], weights["layers.1.mlp.down.weight"])
    with pytest.raises(UserError, match="exists already"):
        assemble.upcycle(config, tmp_path / "out")
    other = str(write_dense(tmp_path / "other", 9, **{**SIZES, "ffn_size": 32}))
    with pytest.raises(UsageError, match=r"members differ(.|\n)*ffn_size"):
        assemble.upcycle(RunConfig(moe=MoEConfig({**folders, "math": other})), tmp_path / "new")
    with pytest.raises(UsageError, match="does not divide into 7 chunks"):
        assemble.upcycle(RunConfig(moe=MoEConfig(folders, split=7)), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_members_of_two_formats_are_upcycled(tmp_path: Path) -> None:
    hub = open_dense(GOLDEN / "hub")
    sizes = {name: getattr(hub.config, name) for name in vars(hub.config) if name != "preset"}
    other = write_dense(tmp_path / "other", 2, **sizes)
    assemble.upcycle(RunConfig(moe=MoEConfig({"hub": str(hub.folder), "other": str(other)})), tmp_path / "out")
    found, theirs, ours = (
        load_tensors(tmp_path / "out", MODEL_FILE),
        dict(hub.weights()),
        load_tensors(other, MODEL_FILE),
    )
    for name, tensor in found.items():
        if dense_name(name) not in ("", name):
            assert torch.equal(tensor, torch.stack([theirs[dense_name(name)], ours[dense_name(name)]]))
        elif dense_name(name):
            assert torch.allclose(tensor, (theirs[name] + ours[name]) / 2)


def test_the_members_are_held_one_tensor_at_a_time() -> None:
    model = moe_model()
    metas = {name: meta for name, _, meta in model.own_parameters()}
    dense, alive = state(dense_model()), [0, 0]

    class Counted:
        """Told when its tensor goes."""

        def __init__(self) -> None:
            alive[0] += 1
            alive[1] = max(alive)

        def __del__(self) -> None:
            alive[0] -= 1

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name in metas:
            if dense_name(name):
                tensor = dense[dense_name(name)].clone()
                tensor.counted = Counted()  # type: ignore[attr-defined]
                yield dense_name(name), tensor
                del tensor

    for item in upcycle(metas, model.moe, [stream(), stream(), stream()], 0):
        del item
    assert alive == [0, 3]


def test_the_tool(tmp_path: Path, run_tool: RunTool) -> None:
    seed = write_dense(tmp_path / "seed", 1, **SIZES)
    form = ("--method", "sparse", "--member", f"seed={seed}", "--copies", 3, "--routing", "switch")
    code, said, error = run_tool("upcycle.py", *form, "--out", tmp_path / "out")
    assert code == 0, error
    assert "3 ffn experts a layer" in said
    found = load_tensors(tmp_path / "out", MODEL_FILE)["layers.0.mlp.experts.down"]
    assert torch.equal(found[0], found[2])
