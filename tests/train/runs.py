"""Tiny runs for the tests: data, arguments, and three ways to start one: here, in a child to be killed, in a shell."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import megabts.train.trainer as trainer_module
from megabts.checkpoint.manifest import read_manifest
from megabts.config.load import explicit_keys, load_config
from megabts.config.run import ParallelConfig
from megabts.data.indexed import IndexedDatasetBuilder
from megabts.data.sidecar import describe_tokenizer
from megabts.parallel.mesh import ParallelMesh, build_mesh
from megabts.runtime.log import configure_logging
from megabts.runtime.metrics import FILE_NAME, read_metrics
from megabts.tokenizers.simple import BytesTokenizer
from megabts.train.setup import Run, adopt_sizes, build_run, open_start
from megabts.train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
MEMBERS = ROOT / "tests/golden/bts/members"
SEQ = 32
Settings = Mapping[str, Any]
SIZES = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 64, "vocab_size": 257}
SETTINGS: Settings = {
    **{f"model.{name}": value for name, value in SIZES.items()},
    "data.tokenizer": "bytes",
    "data.seq_length": SEQ,
    "train.steps": 12,
    "train.global_batch": 4,
    "train.micro_batch": 2,
    "train.valid_every": -1,
    "optimizer.lr": 0.01,
    "logging.tensorboard": False,
}
BTS_SETTINGS: Settings = {
    **{name: value for name, value in SETTINGS.items() if not name.startswith("model.")},
    "method": "bts",
    "bts.hub": MEMBERS / "hub",
    "bts.experts": json.dumps({name: str(MEMBERS / name) for name in ("code", "math")}),
    "bts.gate_dropout": 0.1,
    "data.tokenizer": "null:97",
}


def make_text(seed: int) -> str:
    """A document of a little language in which every word tells much of the next."""
    rng = np.random.RandomState(seed)
    words = ["ada", "bets", "cuts", "digs", "ends", "fits", "goes", "hums"]
    state, text = rng.randint(8), []
    for _ in range(rng.randint(5, 40)):
        text.append(words[state])
        state = (state + 1) % 8 if rng.rand() < 0.9 else rng.randint(8)
    return " ".join(text)


def make_bytes(prefix: Path, seed: int, documents: int) -> None:
    """A dataset of texts with the tokenizer `bytes`, and its sidecar."""
    tokenizer = BytesTokenizer()
    texts = [make_text(seed + number) for number in range(documents)]
    with IndexedDatasetBuilder(prefix, np.uint16) as builder:
        for text in texts:
            builder.add_item([*tokenizer.encode(text), tokenizer.eod_id])
            builder.end_document()
        builder.finalize(describe_tokenizer(tokenizer, True) | counts(texts))


def counts(texts: list[str]) -> dict[str, int]:
    """What a sidecar says of texts of ASCII."""
    size = sum(map(len, texts))
    return {"documents": len(texts), "sequences": len(texts), "tokens": size + len(texts), "text_bytes": size}


def make_ids(prefix: Path) -> None:
    """A dataset of numbers below 96, without a sidecar, for the golden members' vocabulary of 97."""
    rng = np.random.RandomState(0)
    with IndexedDatasetBuilder(prefix, np.uint16) as builder:
        for _ in range(40):
            builder.add_item((np.arange(150) * rng.randint(1, 9)) % 96)
            builder.end_document()
        builder.finalize()


def make_data(folder: Path) -> Path:
    """Datasets a, b, valid_a and valid_b of bytes, and `ids`, all in `folder`."""
    for name, seed, documents in (("a", 1000, 200), ("b", 2000, 100), ("valid_a", 3000, 30), ("valid_b", 4000, 12)):
        make_bytes(folder / name, seed, documents)
    make_ids(folder / "ids")
    return folder


def arguments(run_dir: Path | str, train: dict[str, float], base: Settings = SETTINGS, **more: Any) -> list[str]:
    """The command line of a run; in `more` a double underscore stands for the point: train__steps=3."""
    settings = {**base, "checkpoint.dir": run_dir, "data.train": json.dumps(train)}
    settings |= {name.replace("__", "."): value for name, value in more.items()}
    return [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in settings.items()]


def build(args: list[str], mesh: ParallelMesh | None = None) -> Run:
    """One rank's run, on the CPU."""
    config, mesh = load_config(args), mesh or ParallelMesh()
    start = open_start(config, mesh)
    return build_run(adopt_sizes(config, explicit_keys(args), start), mesh, torch.device("cpu"), start)


def train(args: list[str], mesh: ParallelMesh | None = None) -> int:
    """Train in this process, as tools/train.py does; the exit code."""
    torch.set_num_threads(1)
    configure_logging(mesh.rank if mesh else 0)
    return fit(build(args, mesh))


def fit(run: Run) -> int:
    """Train. What the machine could do is not measured: that takes longer than a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "peak_flops", lambda device, dtype: None)
        return Trainer(run).fit()


def train_rank(rank: int, args: list[str], num_ranks: int) -> int:
    """`train` on one of several ranks that have joined already."""
    return train(args, build_mesh(ParallelConfig(), num_ranks, rank))


class Nursery:
    """Trains in children that may be killed, one at a time, forked from a process that has everything imported."""

    def __init__(self) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        self.server = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs,))
        self.server.start()
        theirs.close()
        self.pid = 0
        self.exit_code: int | None = None

    def start(self, args: list[str]) -> None:
        """Start a child."""
        self.pipe.send(args)
        self.pid, self.exit_code = self.pipe.recv(), None

    def poll(self) -> int | None:
        """The child's exit code; None while it runs."""
        if self.exit_code is None and self.pipe.poll():
            self.exit_code = self.pipe.recv()
        return self.exit_code

    def wait(self) -> int:
        """Wait for the child's end; its exit code."""
        if self.exit_code is None:
            self.exit_code = self.pipe.recv()
        return self.exit_code

    def kill(self) -> None:
        """SIGKILL, and wait until the child is gone."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def close(self) -> None:
        """End it."""
        self.server.kill()
        self.server.join()


def _serve(pipe: Connection) -> None:
    context = multiprocessing.get_context("fork")
    import torch._dynamo  # the first optimizer would, for seconds

    assert torch._dynamo
    load_config(arguments("", {"": 1.0}))  # what the first configuration imports
    while True:
        child = context.Process(target=_child, args=(pipe.recv(),), daemon=True)
        child.start()
        pipe.send(child.pid)
        child.join()
        pipe.send(child.exitcode)


def _child(args: list[str]) -> None:
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    raise SystemExit(train(args))


def wait_for_steps(run_dir: Path, steps: int, process: Nursery | subprocess.Popen[str], seconds: float = 150) -> None:
    """Wait until the metrics of a run show `steps` steps, or the process is gone."""
    deadline = time.monotonic() + seconds
    path = run_dir / FILE_NAME
    while process.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") >= steps):
        assert time.monotonic() < deadline, f"{run_dir} did not come to step {steps}"
        time.sleep(0.002)


def environment() -> dict[str, str]:
    """For a shell: one thread, no GPU, and none of what a launcher around the tests may have set."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC", "GROUP_", "ROLE_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launcher)}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def command(tool: str, args: list[str], num_ranks: int = 1) -> list[str]:
    """The shell's command: plain Python, or torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    return [sys.executable, *(torchrun if num_ranks > 1 else []), str(ROOT / "tools" / tool), *args]


def shell(
    tool: str, args: list[str], num_ranks: int = 1, timeout: float = 60, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a tool to its end."""
    return subprocess.run(
        command(tool, args, num_ranks), capture_output=True, text=True, env=environment(), timeout=timeout, cwd=cwd
    )


def curve(run_dir: Path) -> dict[int, tuple[str, str]]:
    """Loss and gradient norm of every step, as hexadecimal floats."""
    return {row["step"]: (row["loss"].hex(), row["grad_norm"].hex()) for row in read_metrics(run_dir)[0]}


def last_hashes(run_dir: Path) -> dict[str, str]:
    """sha256 of all files of weights and optimizer of the newest checkpoint."""
    manifest = read_manifest(run_dir / (run_dir / "latest").read_text().strip())
    return {name: record.sha256 for name, record in manifest.files.items() if name.endswith(".safetensors")}


def error_lines(text: str) -> list[str]:
    """The lines of an output in which a tool says what is wrong."""
    return [line for line in text.splitlines() if line.startswith("error: ")]
