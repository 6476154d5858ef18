"""Stitched models under lm-evaluation-harness, several ranks, and the list of the paper's benchmarks."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megabts.build import load_model
from megabts.inference.generate import generate, score
from megabts.inference.settings import GenerationSettings
from megabts.parallel.mesh import ParallelMesh
from tests.evaluation.harness import golden_tasks, make_hf
from tests.ranks import run_ranks
from tests.train.runs import BTS_SETTINGS, ROOT, arguments, make_ids, train

PAIRS = [("5 17 3", " 4 9"), ("5 17 3", " 4 8"), ("60 61 62 63 64", " 65"), ("", "7 8 9"), ("2", " 3 4 5 6 7 8 9")]
PROMPTS = ["5 17 3", "60 61 62 63 64", "1"]
COMPLETION = {"until": [], "max_gen_toks": 6}


@pytest.fixture(scope="module")
def bts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub and two experts, whose stitches a few steps have moved."""
    folder = tmp_path_factory.mktemp("bts")
    make_ids(folder / "ids")
    assert train(arguments(folder / "run", {str(folder / "ids"): 1.0}, BTS_SETTINGS, train__steps=3)) == 0
    return folder / "run"


def ask(lm: Any, pairs: list[tuple[str, str]], prompts: list[str]) -> tuple[list[tuple[float, bool]], list[str]]:
    """What the harness would get."""
    from lm_eval.api.instance import Instance

    scored = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    asked = [Instance("generate_until", {}, (prompt, COMPLETION), number) for number, prompt in enumerate(prompts)]
    return lm.loglikelihood(scored), lm.generate_until(asked)


@pytest.mark.parametrize("without", ["", "code"])
def test_a_stitched_model(bts: Path, without: str) -> None:
    """By a model loaded apart, text by text."""
    from megabts.evaluation.lm_eval_model import MegabtsLM

    model = load_model(bts, ParallelMesh(), torch.float32, "cpu", without=[without] if without else []).model
    model.train(False)
    scores, texts = ask(MegabtsLM(str(bts), "float32", 2, without=without), PAIRS, PROMPTS)
    for (context, continuation), (total, _) in zip(PAIRS, scores, strict=True):
        start = [int(word) for word in context.split()] or [96]  # the end of a document
        ids = start + [int(word) for word in continuation.split()]
        with torch.inference_mode():
            known = score(model, ids[:-1]).log_softmax(-1)
        places = range(len(start) - 1, len(ids) - 1)
        assert total == pytest.approx(sum(float(known[place, ids[place + 1]]) for place in places), abs=1e-4)
    prompts = [[int(word) for word in prompt.split()] for prompt in PROMPTS]
    expected = generate(model, prompts, GenerationSettings(6, stop_ids=(96,)))
    assert [text.split() for text in texts] == [[str(token) for token in row] for row in expected]


def on_ranks(rank: int, hf: Path, bts: Path, golden: Path) -> dict[str, Any]:
    """A model each with a share of the tasks, one model over tp, one over its members."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    from megabts.evaluation.lm_eval_model import MegabtsLM
    from megabts.evaluation.tasks import find_tasks, run_tasks

    pairs, prompts = [("What is", " bread"), ("a", " jar of jars")], ["The ferry", "x"]
    found = find_tasks([str(golden / name) for name in ("t.yaml", "ppl.yaml", "gen.yaml")])
    return {
        "tasks": run_tasks(MegabtsLM(str(hf), "float32", 2), found),
        "tensor": ask(MegabtsLM(str(hf), "float32", 2, tensor=2), pairs, prompts),
        "expert": ask(MegabtsLM(str(bts), "float32", 2, expert=2), PAIRS, PROMPTS),
    }


def test_ranks(bts: Path, tmp_path: Path) -> None:
    """The same as alone, whether ranks share requests or a model."""
    from megabts.evaluation.lm_eval_model import MegabtsLM
    from megabts.evaluation.tasks import find_tasks, run_tasks

    hf, golden = make_hf(tmp_path / "hf"), golden_tasks(tmp_path / "golden")
    with (golden / "mc.jsonl").open("a") as file:  # an odd number, so that one rank has less
        file.write('{"question": "What is 0 plus 1?", "choices": ["one", "two"], "answer": 0}\n')
    with (golden / "ppl.jsonl").open("a") as file:  # the harness wants a document for each rank
        file.write('{"text": "jars and boxes"}\n')
    first, second = run_ranks(2, on_ranks, hf, bts, golden, timeout=280)
    found = find_tasks([str(golden / name) for name in ("t.yaml", "ppl.yaml", "gen.yaml")])
    alone = run_tasks(MegabtsLM(str(hf), "float32", 2), found)
    assert alone is not None
    assert second["tasks"] is None
    for task, numbers in alone["results"].items():
        for name, value in numbers.items():
            if isinstance(value, float):
                assert first["tasks"]["results"][task][name] == pytest.approx(value, rel=1e-4), (task, name)
    pairs, prompts = [("What is", " bread"), ("a", " jar of jars")], ["The ferry", "x"]
    expected = {
        "tensor": ask(MegabtsLM(str(hf), "float32", 2), pairs, prompts),
        "expert": ask(MegabtsLM(str(bts), "float32", 2), PAIRS, PROMPTS),
    }
    for kind, (scores, texts) in expected.items():
        for rank in (first, second):
            assert [total for total, _ in rank[kind][0]] == pytest.approx([total for total, _ in scores], abs=1e-4)
            assert rank[kind][1] == texts


def test_the_papers_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness knows every task of the list, and the examples before questions reach each of them."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager, _factory

    from megabts.errors import UsageError
    from megabts.evaluation import tasks

    root = Path(lm_eval.tasks.__file__).parent
    known = ["mmlu/default", "bbh/cot_fewshot", "mbpp", "humaneval", "gsm8k", "minerva_math", "mgsm/native_cot"]
    folders = [root / name for name in (*known, "benchmarks")]

    def manager(include_path: list[Path], include_defaults: bool = True) -> TaskManager:
        """All of the harness' tasks would take half a minute."""
        return TaskManager(include_path=folders * include_defaults + include_path, include_defaults=False)

    shots: dict[str, Any] = {}

    class Recorded:
        """A task that does not fetch its data."""

        def __init__(self, config: dict[str, Any]) -> None:
            self.task_name = config["task"].split("::")[-1]
            shots[self.task_name] = config["num_fewshot"]

    load = _factory.load_yaml
    monkeypatch.setattr(tasks, "TaskManager", manager)
    monkeypatch.setattr(_factory, "ConfigurableTask", Recorded)
    monkeypatch.setattr(_factory, "load_yaml", lambda path, resolve_func: load(path, resolve_func=False))
    file = str(ROOT / "examples/tasks/paper.yaml")
    found, names = tasks.find_tasks([file], unsafe_code=True)
    found.load(names)
    assert len(shots) == 57 + 27 + 2 + 2 * 7 + 1 + 7 + 1 + 2
    by_family = {"mmlu": 5, "bbh": 3, "mbpp": 3, "humaneval": 0, "flores": 1, "gsm8k": 8, "minerva": 4, "mgsm": 8}
    for task, count in shots.items():
        assert count == by_family[task.split("_")[0]], task
    with pytest.raises(UsageError, match=r"task mbpp runs code .* --confirm-run-unsafe-code, in a container"):
        tasks.find_tasks([file])
