"""Rows that come and go: whatever the neighbours do, a completion is what it is alone. For every method."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megabts.checkpoint.hf import weights_from_hf
from megabts.checkpoint.hf_config import config_from_hf
from megabts.config.methods import BTMConfig, MoEConfig, RoutingConfig
from megabts.config.model import ModelConfig
from megabts.errors import UsageError, UserError
from megabts.inference import engine as engine_module
from megabts.inference.engine import Engine
from megabts.inference.generate import complete, complete_uncached, generate, requests, score
from megabts.inference.kv_cache import cache_bytes
from megabts.inference.rows import Completion, Event, Request, choose
from megabts.inference.settings import GenerationSettings
from megabts.merge.ensemble import Ensemble
from megabts.merge.routing import Routing
from megabts.model.decoder import Decoder
from megabts.model.torch_backend import TorchBackend
from megabts.moe.model import MoEModel
from megabts.parallel.mesh import ParallelMesh
from megabts.parallel.sharding import initialise, load_full, named_metas
from megabts.tokenizers.build import build_tokenizer
from tests.inference.models import SIZES, build, dense, shake

MEMBERS = {"seed": "seed", "code": "code", "math": "math"}
PROMPTS = [[5, 17, 42, 3, 60, 8, 1], [9], [33, 33, 7, 21], [2, 9, 4, 4, 4], [50, 51]]
EOD = 9
METHODS = ["dense-gqa", "bts-alternating", "bts-evidence", "btx", "bam", "btm", "routing"]
SETTINGS = [
    GenerationSettings(10, eod_id=EOD),
    GenerationSettings(7, temperature=1.3, top_k=30, seed=4, eod_id=EOD),
    GenerationSettings(14, repetition_penalty=1.7, eod_id=EOD, logprobs=2),
    GenerationSettings(9, temperature=0.9, top_p=0.8, seed=5, repetition_penalty=0.8, eod_id=EOD),
    GenerationSettings(3, num_ids=40, eod_id=EOD),
]


def model_of(method: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model; attention stays inside documents, so that what is known of a text starts anew too."""
    if method.startswith("bts"):
        return build(method)
    config = ModelConfig(**{**SIZES, "cross_document_attention": method == "btx"})
    backend = TorchBackend(dtype, "cpu", ParallelMesh().tp)
    model: Any
    if method.startswith("dense"):
        model = Decoder(config, backend)
    elif method in ("btx", "bam"):
        model = MoEModel(config, MoEConfig(MEMBERS, attention_experts=method == "bam"), backend)
    elif method == "btm":
        model = Ensemble(config, BTMConfig(MEMBERS), backend)
    else:
        model = Routing(config, RoutingConfig(MEMBERS), backend)
    initialise(named_metas(model), 1, ParallelMesh())
    return shake(model)


def asked() -> list[Request]:
    return [Request(p, s, row) for row, (p, s) in enumerate(zip(PROMPTS, SETTINGS, strict=True))]


def run(engine: Engine, each: Callable[[int], None] = lambda step: None) -> None:
    """Steps until nothing is left; `each` is called before every one."""
    step = 0
    while engine.busy:
        each(step)
        engine.step()
        step += 1


@pytest.mark.parametrize("method", METHODS)
def test_rows_that_come_and_go_are_what_they_are_alone(method: str) -> None:
    """Five requests of different lengths and settings: alone and uncached; all at once; late; beside cancelled ones."""
    model = model_of(method)
    slow = complete_uncached(model, asked())
    alone = [complete(model, [request])[0] for request in asked()]
    together = complete(model, asked())
    engine, late, strangers = Engine(model, 3, 70), dict[int, Completion](), list[Completion]()

    def arrive(step: int) -> None:
        """One request every other step; between them strangers, who are cancelled after two steps, or while waiting."""
        if step % 2 == 0 and step // 2 < len(PROMPTS):
            late[step // 2] = engine.submit(asked()[step // 2])
        if step in (1, 3, 5):
            strangers.append(engine.submit(Request([step, 30, EOD, 2], GenerationSettings(12, eod_id=EOD))))
        if step in (3, 5, 7):
            engine.cancel(strangers[(step - 3) // 2])

    arrive(0)
    run(engine, lambda step: arrive(step) if step else None)
    for row, oracle in enumerate(slow):
        assert len(oracle.tokens) == SETTINGS[row].max_new_tokens
        assert alone[row].tokens == together[row].tokens == late[row].tokens == oracle.tokens, row
        assert late[row].logprobs == pytest.approx(oracle.logprobs, abs=1e-4)
    assert {stranger.finish for stranger in strangers} == {"cancelled"}
    assert engine.num_running == engine.num_waiting == 0
    assert engine._stretches.take(70) == 0  # all of the caches is free again


@pytest.mark.parametrize("method", METHODS)
def test_logits_while_rows_come_and_go(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every step, against the whole text without a cache."""
    model, seen = model_of(method), dict[tuple[int, ...], torch.Tensor]()

    def keep(logits: torch.Tensor, rows: list[Completion]) -> list[Event]:
        for scores, row in zip(logits, rows, strict=True):
            seen[tuple(list(row.request.prompt) + row.tokens)] = scores.clone()
        return choose(logits, rows)

    monkeypatch.setattr(engine_module, "choose", keep)
    engine = Engine(model, 3, 80)
    found = [engine.submit(request) for request in asked()]
    run(engine)
    assert len(seen) == sum(s.max_new_tokens for s in SETTINGS)
    with torch.inference_mode():
        for row in found:
            prompt, tokens = list(row.request.prompt), row.tokens
            whole = score(model, prompt + tokens[:-1], EOD, len(prompt))
            for step in range(len(tokens)):
                scores = seen[tuple(prompt + tokens[:step])]
                expected = whole[len(prompt) - 1 + step]
                assert float((scores - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("penalty", [1.0, 1.6])
def test_greedy_is_what_transformers_generates(penalty: float) -> None:
    """A tiny Llama, prompts of different lengths in one batch, with a repetition penalty too."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    reference: Any = LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    ).eval()
    mesh = ParallelMesh()
    with TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        model = Decoder(config_from_hf(Path(folder)), TorchBackend(torch.float32, "cpu", mesh.tp))
        load_full(named_metas(model), weights_from_hf(Path(folder)), mesh, folder)
    rows = complete(model, requests(PROMPTS, GenerationSettings(24, repetition_penalty=penalty)))
    for prompt, row in zip(PROMPTS, rows, strict=True):
        expected = reference.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None, repetition_penalty=penalty
        )
        assert row.tokens == expected[0, len(prompt) :].tolist()
    free = complete(model, requests(PROMPTS, GenerationSettings(24)))
    assert ([row.tokens for row in rows] == [row.tokens for row in free]) == (penalty == 1)


def test_events_tell_everything_once() -> None:
    engine, events = Engine(dense(), 2, 60, tokenizer=build_tokenizer("null:61")), dict[int, list[Event]]()
    free = generate(dense(), PROMPTS, GenerationSettings(8))
    stop = free[1][4]
    settings = GenerationSettings(8, stop_ids=(stop,), logprobs=3)
    rows = [engine.submit(request) for request in requests(PROMPTS, settings)]
    while engine.busy:
        assert engine.num_running <= 2
        for event in engine.step():
            events.setdefault(event.id, []).append(event)
    for row, tokens in zip(rows, free, strict=True):
        own = events[row.id]
        cut = tokens[: tokens.index(stop)] if stop in tokens else tokens
        assert row.tokens == [event.token for event in own if event.token is not None] == cut
        assert row.finish == own[-1].finish == ("stop" if stop in tokens else "length")
        assert [event.finish for event in own[:-1]] == [None] * (len(own) - 1)
        assert row.text == "".join(event.text for event in own) == "".join(f" {token}" for token in cut)
        whole = score(engine.model, [*row.request.prompt, *cut]).double().log_softmax(-1)
        for place, event in enumerate(own[: len(cut)], len(row.request.prompt) - 1):
            values, ids = whole[place].topk(3)
            assert [token for token, _ in event.top] == ids.tolist()
            assert event.top[0][0] == event.token
            assert [value for _, value in event.top] == pytest.approx(values.tolist(), abs=1e-4)
            assert event.logprob == event.top[0][1]


def test_logprobs_are_among_all_ids() -> None:
    """Also where some cannot be chosen: they are the model's own, as `score` and evaluations have them."""
    events: list[Event] = []
    settings = GenerationSettings(1, num_ids=20, logprobs=30)
    complete(dense(), requests(PROMPTS[:1], settings), events.append)
    expected = score(dense(), PROMPTS[0])[-1].log_softmax(-1)
    assert expected[20:].exp().sum() > 0.1
    assert sorted(token for token, _ in events[0].top) == list(range(20))
    assert events[0].logprob == events[0].top[0][1]
    for token, logprob in events[0].top:
        assert logprob == pytest.approx(float(expected[token]), abs=1e-4)


@pytest.mark.parametrize("first, last", [(2, 2), (2, 4), (0, 0)])
def test_stop_strings_cut_the_text_before_them(first: int, last: int) -> None:
    """One that spans tokens `first` to `last`; what may become it is held back, and a near miss is given out."""
    tokenizer, model = build_tokenizer("null:61"), dense()
    tokens = generate(model, PROMPTS[:1], GenerationSettings(8))[0]
    string = "".join(f" {token}" for token in tokens[first : last + 1])
    assert string not in "".join(f" {token}" for token in tokens[:last])
    near = f"{string} no"
    shown: list[str] = []
    settings = GenerationSettings(8, stop_strings=(near, string))
    row = complete(model, requests(PROMPTS[:1], settings), lambda e: shown.append(e.text), tokenizer=tokenizer)[0]
    assert row.text == "".join(shown) == "".join(f" {token}" for token in tokens[:first])
    assert (row.finish, row.tokens) == ("stop", tokens[: last + 1])
    assert shown[first : last + 1] == [""] * (last + 1 - first)
    missed = complete(model, requests(PROMPTS[:1], GenerationSettings(8, stop_strings=(near,))), tokenizer=tokenizer)
    assert (missed[0].text, missed[0].finish) == ("".join(f" {token}" for token in tokens), "length")


def test_memory_is_known_and_does_not_grow() -> None:
    model = build("bts-alternating")
    engine = Engine(model, 4, 50)
    held = engine._decoding.cache.stored.untyped_storage().nbytes()
    assert engine.cache_bytes == held == 3 * cache_bytes(model.config, 1, 50, torch.float32)
    before = [cache.stored.data_ptr() for cache in engine._decoding.caches]
    rows = [engine.submit(Request([1, 2, 3], GenerationSettings(18))) for _ in range(5)]  # 20 tokens each: two at once
    run(engine, lambda step: None if engine.num_running <= 2 else pytest.fail("more rows than there is room for"))
    assert {tuple(row.tokens) for row in rows} == {tuple(generate(model, [[1, 2, 3]], GenerationSettings(18))[0])}
    assert [cache.stored.data_ptr() for cache in engine._decoding.caches] == before


def test_what_is_refused() -> None:
    engine = Engine(dense(), 2, 30)
    with pytest.raises(UserError, match="the prompt is empty"):
        engine.submit(Request([]))
    with pytest.raises(UserError, match="more than the model's 48"):
        engine.submit(Request([1] * 20, GenerationSettings(40)))
    with pytest.raises(UserError, match="the prompt has 20 tokens, with 12 new ones more than the 30 that the caches"):
        engine.submit(Request([1] * 20, GenerationSettings(12)))
    with pytest.raises(UsageError, match="stop_strings needs a tokenizer"):
        engine.submit(Request([1], GenerationSettings(4, stop_strings=("x",))))
    assert not engine.busy
    assert engine.step() == []


def test_seeds_and_places_decide_what_is_drawn() -> None:
    model, settings = dense(), GenerationSettings(12, temperature=1.5, seed=3)
    same = [complete(model, [Request([7, 8], settings, row)])[0].tokens for row in (0, 0, 1)]
    assert same[0] == same[1] != same[2]
    other = complete(model, [Request([7, 8], GenerationSettings(12, temperature=1.5, seed=4))])[0].tokens
    assert other != same[0]
