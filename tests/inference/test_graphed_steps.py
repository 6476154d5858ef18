"""Decode steps that are recorded and replayed, against steps that run, while rows come, go, grow and change places."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megabts.bts.model import BTSModel
from megabts.config.methods import BTSConfig
from megabts.config.model import ModelConfig
from megabts.inference import decoding as decoding_module
from megabts.inference import kv_cache
from megabts.inference.decoding import Admission, Decoding, Step
from megabts.inference.engine import Engine
from megabts.inference.generate import complete, requests
from megabts.inference.one_token import OneToken
from megabts.inference.rows import Completion, Request
from megabts.inference.settings import GenerationSettings
from megabts.model.decoder import Decoder
from megabts.model.torch_backend import TorchBackend
from megabts.parallel.mesh import ParallelMesh
from megabts.runtime import graphs
from tests.inference.models import MODELS, SIZES, build, dense, stitched
from tests.inference.tape import Recorder

EOD = 9
MIXTURES = ("bts-mixture", "bts-evidence")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Columns are rounded to 8, and what comes a second time is recorded."""
    monkeypatch.setattr(kv_cache, "WIDTHS", 8)
    monkeypatch.setattr(graphs.Graphs.__init__, "__kwdefaults__", {"after": 1, "limit": 32})
    return Recorder()


Script = list[tuple[list[int], list[tuple[int, list[int]]]]]
"""Of each step: rows kept, and (start, prompt) of rows that begin."""
ROWS_COME_AND_GO: Script = [
    ([], [(0, [1, 2, 3, 4]), (30, [5, EOD, 7])]),
    *[([0, 1], [])] * 8,
    ([0, 1], [(60, [8])]),  # a third row, at the same distance
    *[([0, 1, 2], [])] * 4,
    ([1, 2], []),  # the first goes
    *[([0, 1], [])] * 3,
    ([1], [(3, [11, 12])]),  # only the last stays, and one begins before it: they are gathered
    *[([0, 1], [])] * 9,
    ([1, 0], []),  # they change places
    *[([0, 1], [])] * 3,
    ([0], []),
    *[([0], [])] * 3,
    ([], [(80, [13, 14, 15])]),  # near the end of the buffer: its columns are fewer than rounded
    *[([0], [])] * 8,
]


def logits_of(model: Any, script: Script, recorder: graphs.Record | None, eod_id: int | None = EOD) -> list[Tensor]:
    """Of every step; each row reads what a generator draws."""
    found, drawn = [], torch.Generator().manual_seed(0)
    with torch.inference_mode():
        decoding = Decoding(model, 91)
        decoding.record_with(recorder)
        for kept, begun in script:
            tokens = torch.randint(2, 61, (len(kept),), generator=drawn).tolist()
            admitted = [Admission(start, prompt, eod_id) for start, prompt in begun]
            logits = decoding.run(Step(kept, tokens, admitted))
            assert logits is not None
            found.append(logits)
    return found


def some(name: str) -> Any:
    """A model of MODELS, or one whose stitches run as in training."""
    return stitched(None, num_stitch_layers=3, projection_rank=3) if name == "bts-low-rank" else build(name)


@pytest.mark.parametrize("name", [*(name for name in MODELS if name not in MIXTURES), "bts-low-rank"])
def test_logits_are_those_of_steps_that_run(name: str, recorder: Recorder) -> None:
    model = some(name)
    found, expected = (logits_of(model, ROWS_COME_AND_GO, way) for way in (recorder, None))
    for ours, oracle in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-4, atol=2e-5)
    decoded = sum(bool(kept) for kept, _ in ROWS_COME_AND_GO)
    assert recorder.recorded >= 6
    assert decoded / 2 < recorder.replayed < decoded - recorder.recorded


def test_a_view_and_rows_that_are_gathered_are_recorded_apart(recorder: Recorder) -> None:
    viewed: Script = [([], [(0, [1, 2]), (20, [3])]), *[([0, 1], [])] * 4]
    gathered: Script = [([], [(20, [1, 2]), (0, [3])]), *[([0, 1], [])] * 4]
    model = stitched(None, num_stitch_layers=2)
    with torch.inference_mode():
        decoding = Decoding(model, 60)
        decoding.record_with(recorder)
        for count, script in enumerate((viewed, gathered), 1):
            for kept, begun in script:
                decoding.run(Step(kept, [4] * len(kept), [Admission(*new) for new in begun]))
            assert (recorder.recorded, recorder.replayed) == (count, 3 * count)
            decoding.run(Step())


def tokens_of(engine: Engine, recorder: Recorder | None) -> list[list[int]]:
    """Requests of different lengths and settings, of which some come late and one is cancelled."""
    engine._decoding.record_with(recorder)
    prompts = [[1, 2, 3, 4, 5], [6], [7, EOD, 8], [9, 10], [11, 12, 13]]
    kinds = [
        GenerationSettings(14, eod_id=EOD),
        GenerationSettings(9, temperature=1.2, top_k=20, seed=3, eod_id=EOD),
        GenerationSettings(17, eod_id=EOD),
        GenerationSettings(12, temperature=0.8, seed=4, eod_id=EOD),
        GenerationSettings(8, eod_id=EOD),
    ]
    rows: list[Completion] = []
    step = 0
    while engine.busy or len(rows) < len(prompts):
        if step % 3 == 0 and len(rows) < len(prompts):
            rows.append(engine.submit(Request(prompts[len(rows)], kinds[len(rows)], len(rows))))
        if step == 8:
            engine.cancel(rows[2])
        engine.step()
        step += 1
    return [row.tokens for row in rows]


@pytest.mark.parametrize("name", ["dense-gqa", "bts-alternating", "bts-unchanged", "bts-mixture", "bts-evidence"])
def test_an_engine_chooses_the_same_tokens(name: str, recorder: Recorder) -> None:
    model = build(name)
    found, expected = (tokens_of(Engine(model, 3, 70), way) for way in (recorder, None))
    assert found == expected
    assert len(set(map(tuple, found))) == len(found)
    assert (recorder.replayed > 8) is (name not in MIXTURES)  # which remember more than caches, and run


def test_gates_that_are_looked_at_are_not_recorded(recorder: Recorder) -> None:
    model = stitched(None, num_stitch_layers=2)
    found = []
    for way in (recorder, None):
        engine = Engine(model, 2, 60)
        engine._decoding.record_with(way)
        engine.submit(Request([1, 2], GenerationSettings(20)))
        events = [event for _ in range(6) for event in engine.step()]
        engine.submit(Request([3], GenerationSettings(4), gates=True))
        while engine.busy:
            events += engine.step()
        found.append([(event.id, event.token, bool(event.gates)) for event in events])
    assert found[0] == found[1]
    assert sum(gates for *_, gates in found[0]) == 4
    assert 0 < recorder.replayed < 20 - 4


def test_which_models_are_recorded() -> None:
    recordable = {name: one.recordable for name in MODELS if (one := OneToken.of(build(name))) is not None}
    assert len(recordable) == len(MODELS)
    assert {name for name, can in recordable.items() if not can} == set(MIXTURES)


def test_caches_are_free_as_soon_as_nobody_has_the_decoding(recorder: Recorder) -> None:
    gc.collect()
    gc.disable()
    with torch.inference_mode():
        decoding = Decoding(dense(), 40)
        decoding.record_with(recorder)
        decoding.run(Step(admitted=[Admission(0, [1, 2])]))
        for _ in range(4):
            decoding.run(Step([0], [3]))
    held = weakref.ref(decoding)
    del decoding
    freed = held() is None
    gc.enable()
    assert recorder.replayed == 3
    assert freed


@pytest.mark.parametrize("wanted", [True, False])
def test_they_can_be_switched_off(wanted: bool, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding_module, "recorder", lambda device: recorder)
    asked = requests([[1, 2], [3]], GenerationSettings(12))
    rows = complete(dense(), asked, cuda_graphs=wanted)
    assert [len(row.tokens) for row in rows] == [12, 12]
    assert (recorder.replayed > 5) is wanted


def test_cpu_does_not_record() -> None:
    assert Engine(dense(), 1, 30)._decoding._graphs is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "WIDTHS", 8)
    monkeypatch.setattr(graphs.Graphs.__init__, "__kwdefaults__", {"after": 1, "limit": 32})
    model = stitched(None, num_stitch_layers=2).to("cuda")
    found, expected = (logits_of(model, ROWS_COME_AND_GO, way) for way in (graphs.recorder(torch.device("cuda")), None))
    for ours, oracle in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-3, atol=1e-3)


class Devices(TorchDispatchMode):
    """Operators that something on the CPU has a part in, beside none at all."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.found = 0, list[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.calls += 1
        if any(x.device.type != "meta" for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)):
            self.found.append(str(function))
        return out


@pytest.mark.parametrize("numbers", [(256, None, 0), (40, 30, 0)], ids=["gathered", "viewed"])
@pytest.mark.parametrize("kind", ["dense", "full", "low-rank"])
def test_nothing_is_copied_from_the_cpu(kind: str, numbers: tuple[int, int | None, int]) -> None:
    """With another device in the GPU's place, one without values: what would read one fails there."""
    backend, config = TorchBackend(torch.bfloat16, "meta", ParallelMesh().tp), ModelConfig(**SIZES)
    bts = BTSConfig("hub", {"code": "code"}, num_stitch_layers=2, projection_rank=3 if kind == "low-rank" else 0)
    model = Decoder(config, backend) if kind == "dense" else BTSModel(config, bts, backend)
    with torch.inference_mode():
        decoding = Decoding(model, 70)
        members = list(model.members.values()) if isinstance(model, BTSModel) else [model]
        decoding._one_token = OneToken(model, members)  # type: ignore[arg-type]
        with Devices() as seen:
            logits = decoding._masked_step(torch.empty(4, 2, dtype=torch.long, device="meta"), *numbers)
    assert logits.shape == (2, config.vocab_size)
    assert seen.calls > 100
    assert seen.found == []
