"""megabts under lm-evaluation-harness: the numbers and texts that its own Hugging Face models give."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megabts.convert.bts import export_bts
from megabts.errors import UsageError, UserError
from tests.convert.stitched import QUIET, stitched
from tests.evaluation.harness import GOLDEN_TASKS, LOCAL, golden_tasks, make_hf
from tests.tools import RunTool
from tests.train.runs import shell

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf(tmp_path_factory.mktemp("models") / "hf")


@pytest.fixture(scope="module", params=["dense", "bts"])
def both(hf: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The harness' model of a Hugging Face folder, and megabts' of the same weights: the folder itself, or the
    checkpoint that it was exported from."""
    from lm_eval.models.huggingface import HFLM

    from megabts.evaluation.lm_eval_model import MegabtsLM

    checkpoint = folder = hf
    if request.param == "bts":
        root = tmp_path_factory.mktemp("bts")
        experts = {name: str(make_hf(root / name, seed)) for seed, name in enumerate(("code", "math"), 1)}
        checkpoint, folder = stitched(root, {"hub": str(hf), **experts}, num_stitch_layers=2), root / "hf"
        export_bts(checkpoint, folder, QUIET)
    settings: dict[str, Any] = {"device": "cpu", "dtype": "float32", "batch_size": 3, "tokenizer": str(hf)}
    theirs = HFLM(pretrained=str(folder), trust_remote_code=True, **settings)
    return theirs, MegabtsLM(str(checkpoint), **settings)


def requests(kind: str, *args: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, arg, number) for number, arg in enumerate(args)]  # type: ignore[arg-type]


def test_log_likelihoods(both: tuple[Any, Any]) -> None:
    """Spaces at the border, empty contexts, texts that begin with the first token, shared contexts, long contexts."""
    pairs = [
        ("What is 1 plus 1?", " two"),
        ("What is 1 plus 1?", " one"),
        ("What is 1 plus 1? ", "two"),
        ("What is 1 plus 1?  \n", " two boxes"),
        ("", "The ferry leaves"),
        ("", "<s>The ferry leaves"),
        ("<s>The ferry", " comes"),
        ("a", "b"),
        ("In winter it waits for the bus. " * 40, " and comes back"),
        ("bread", " and jars" * 12),
    ]
    theirs, ours = (lm.loglikelihood(requests("loglikelihood", *pairs)) for lm in both)
    assert [found[0] for found in ours] == pytest.approx([found[0] for found in theirs], abs=1e-4)
    assert [found[1] for found in ours] == [found[1] for found in theirs]


def test_rolling(both: tuple[Any, Any]) -> None:
    """Shorter than a window, a window and a bit, several windows."""
    texts = [("bread",), ("The ferry leaves the harbour. " * 12,), ("jars and boxes, " * 60,)]
    theirs, ours = (lm.loglikelihood_rolling(requests("loglikelihood_rolling", *texts)) for lm in both)
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert len(both[1].tok_encode(texts[2][0])) > 3 * both[1].max_length


def test_generation(both: tuple[Any, Any]) -> None:
    """Stop strings inside tokens and over them, lengths, contexts that are cut for them."""
    contexts = ["What is 7 plus 5?", "Q: bread", "In winter it waits for the bus. " * 40, "", "x", "The ferry\n"]
    free = {"until": [], "max_gen_toks": 24, "do_sample": False}
    asked = [(context, free) for context in contexts if context]
    theirs, ours = (lm.generate_until(requests("generate_until", *asked)) for lm in both)
    assert ours == theirs
    longest = max(theirs, key=len)
    stops = [longest[3:6], longest[7], "not there"]
    asked = [
        (context, {**free, "until": stops, "max_gen_toks": length}) for context in contexts[:3] for length in (9, 24)
    ]
    cut, found = (lm.generate_until(requests("generate_until", *asked)) for lm in both)
    assert found == cut
    assert any(len(text) < len(whole) for text, whole in zip(cut[1::2], theirs[:3], strict=True))


def test_sampling_draws_anew_and_is_repeatable(both: tuple[Any, Any]) -> None:
    sampled = ("bread", {"until": [], "do_sample": True, "temperature": 1.5, "max_gen_toks": 8})
    ours = both[1]
    first = ours.generate_until(requests("generate_until", sampled, sampled, sampled))
    assert len(set(first)) == 3
    assert ours.generate_until(requests("generate_until", sampled, sampled, sampled)) == first
    cold = ("bread", {"until": [], "do_sample": False, "temperature": 1.5, "max_gen_toks": 8})
    greedy = ("bread", {"until": [], "max_gen_toks": 8})
    assert len(set(ours.generate_until(requests("generate_until", cold, greedy)))) == 1


def test_tasks(both: tuple[Any, Any], tmp_path: Path) -> None:
    """All numbers of the golden tasks and of the examples, and every answer, are those of the harness' own model."""
    from lm_eval import simple_evaluate

    from megabts.evaluation.tasks import find_tasks

    golden = golden_tasks(tmp_path / "golden")
    results = []
    for lm in both:
        manager, names = find_tasks([*GOLDEN_TASKS, "local"], [golden, LOCAL])
        found = simple_evaluate(lm, tasks=list(names), task_manager=manager, bootstrap_iters=0)
        results.append(found)
    theirs, ours = results
    assert len(theirs["results"]) == 7
    for task, numbers in theirs["results"].items():
        for name, value in numbers.items():
            if isinstance(value, float):
                assert ours["results"][task][name] == pytest.approx(value, rel=1e-4), (task, name)
    assert theirs["results"]["bts_local_ppl"]["word_perplexity,none"] > 1
    for task in ("bts_local_gen", "local_generation"):
        answers = [[sample["resps"] for sample in found["samples"][task]] for found in results]
        assert answers[0] == answers[1]
        assert all(answers[0][0][0])


def test_the_tool(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another folder, by file: relative data files are found; table and JSON say the same; no progress bars."""
    monkeypatch.chdir(tmp_path)
    more = ["--limit", "2", "--shots", "0", "--dtype", "float32", "--json", str(tmp_path / "results.json")]
    done = shell("evaluate.py", ["--checkpoint", str(hf), "--tasks", str(LOCAL / "local.yaml"), *more])
    assert done.returncode == 0, done.stderr
    assert "it/s" not in done.stderr
    table = done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["results"]) == ["local_multiple_choice", "local_perplexity", "local_generation", "local"]
    assert results["results"]["local_multiple_choice"]["sample_len"] == 2
    assert set(results["n-shot"].values()) == {0}
    assert f"{results['results']['local_perplexity']['bits_per_byte,none']:.4f}" in table


def test_what_cannot_run_is_one_line(hf: Path, tmp_path: Path, run_tool: RunTool) -> None:
    (tmp_path / "bad.yaml").write_text("task: [unclosed\n")
    (tmp_path / "nameless.yaml").write_text("dataset_path: json\n")
    config = (LOCAL / "perplexity.yaml").read_text()
    (tmp_path / "lost.yaml").write_text(config.replace("perplexity.jsonl", "lost.jsonl"))
    (tmp_path / "code.yaml").write_text(
        config.replace("task: local_perplexity", "task: writes_code\nunsafe_code: true")
    )
    (tmp_path / "group.yaml").write_text("group: outer\ntask: [{group: inner, task: [writes_code]}]\n")
    generation = (LOCAL / "generation.yaml").read_text().replace("data_files: {test: ", f"data_files: {{test: {LOCAL}/")
    generation = generation.replace("train: ", f"train: {LOCAL}/")
    (tmp_path / "long.yaml").write_text(generation.replace("max_gen_toks: 16", "max_gen_toks: 128"))
    (tmp_path / "beams.yaml").write_text(generation.replace("do_sample: false", "num_beams: 4"))
    good = LOCAL / "perplexity.yaml"
    cases: list[tuple[list[str | Path], int, str]] = [
        (["--tasks", tmp_path / "none.yaml"], 1, f"there is no task file {tmp_path}/none.yaml"),
        (["--tasks", tmp_path / "bad.yaml"], 1, "bad.yaml cannot be read: while parsing a flow sequence"),
        (["--tasks", tmp_path / "nameless.yaml"], 1, "nameless.yaml names no task; write task: NAME, or group: NAME"),
        (["--tasks", tmp_path / "lost.yaml"], 1, f"task local_perplexity: there is no file {tmp_path}/lost.jsonl"),
        (["--tasks", tmp_path / "code.yaml"], 2, "task writes_code runs code that the model writes, on this machine"),
        (["--tasks", tmp_path / "group.yaml"], 2, "task writes_code runs code that the model writes, on this machine"),
        (["--tasks", tmp_path / "long.yaml"], 1, "asks for 128 tokens and the model has room for 128 in all"),
        (["--tasks", tmp_path / "beams.yaml"], 2, "generation_kwargs hold num_beams; megabts knows until"),
        (["--tasks", good, "--include-path", tmp_path / "no"], 1, f"there is no folder {tmp_path}/no of task files"),
        (["--tasks", good, "--data", "x=y"], 2, "--data means something without --tasks only"),
        (["--limit", "3"], 2, "--limit means something with --tasks only"),
        (["--shots", "0"], 2, "--shots means something with --tasks only"),
        (["--tasks", good, "--limit", "0"], 2, "--limit is 0; it must be at least 1"),
        (["--tasks", good, "--max-length", "300"], 2, "max_length is 300; it must lie in 1..128 (model.max_seq_len)"),
        (["--tasks", good, "--tensor", "2"], 2, "tensor 2 x expert 1 = 2 ranks hold a model and there are 1"),
        (["--tasks", good, "--tokenizer", "null:1000"], 1, "null:1000 has 1000 ids and the model a vocabulary of 400"),
    ]
    for args, code, message in cases:
        found, _, said = run_tool("evaluate.py", "--checkpoint", hf, *args)
        assert found == code, args
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert message in errors[0]


def test_unknown_names_and_arguments(hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness' own tasks are not read here, which takes half a minute."""
    from lm_eval.tasks import TaskManager

    from megabts.evaluation import tasks
    from megabts.evaluation.lm_eval_model import MegabtsLM

    monkeypatch.setattr(tasks, "TaskManager", lambda **given: TaskManager(**{**given, "include_defaults": False}))
    with pytest.raises(UsageError, match=r"there is no task local_perplexty; did you mean local_perplexity\?"):
        tasks.find_tasks(["local_perplexty"], [LOCAL])
    for given, message in (
        (
            "checkpoint=x,batchsize=2",
            r"there is no model argument batchsize; --model_args takes checkpoint=DIR and any",
        ),
        ("dtype=float32", r"the model argument checkpoint is missing; --model_args takes"),
        (f"checkpoint={hf},dtype=int8", r"dtype is int8; give one of auto, float32"),
        (f"checkpoint={hf},batch_size=auto", r"batch_size is auto; give a number of texts"),
        (f"checkpoint={hf},without=code", r"has no experts; leave out --without code"),
    ):
        with pytest.raises(UserError, match=message):
            MegabtsLM.create_from_arg_string(given, {"batch_size": 1, "device": "cpu"})


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch, run_tool: RunTool) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, error = run_tool("evaluate.py", "--checkpoint", "x", "--tasks", "gsm8k")
    assert (code, error) == (1, "error: running tasks needs lm_eval; pip install -e '.[eval]'\n")
    assert run_tool("evaluate.py", "--help")[0] == 0


def test_the_harness_own_command_line(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from lm_eval.tasks import TaskManager

    from megabts.evaluation.lm_eval import main

    # Without the harness' own tasks, which take half a minute to read.
    monkeypatch.setattr(TaskManager.__init__, "__defaults__", (None, None, False, None))
    golden = golden_tasks(tmp_path / "golden")
    model = ("--model", "megabts", "--model_args", f"checkpoint={hf},dtype=float32,batch_size=4", "--device", "cpu")
    tasks = ",".join(str(golden / name) for name in ("t.yaml", "ppl.yaml", "gen.yaml"))
    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", *model, "--tasks", tasks])
    main()
    said = capsys.readouterr().out
    assert all(name in said for name in GOLDEN_TASKS)
