"""The SLURM scripts on a real SLURM: two nodes on this machine, started for these tests and gone after them."""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megabts.runtime.metrics import FILE_NAME as METRICS
from tests.slurm.cluster import Cluster, missing_programs
from tests.train.runs import ROOT, SETTINGS, arguments, curve, environment, error_lines, last_hashes, make_data, train

MISSING = missing_programs()
REASON = f"SLURM is not installed ({', '.join(MISSING)}): bash tests/run.sh --with-slurm"
pytestmark = [pytest.mark.alone, pytest.mark.skipif(bool(MISSING), reason=REASON)]
TRAIN = str(ROOT / "examples/slurm/train.sbatch")
BRANCH = str(ROOT / "examples/slurm/branch_array.sbatch")
SMALL = ("--gpus-per-node=0", "--cpus-per-task=1", "--time=5")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with Cluster({**environment(), "PATH": path, "NPROC_PER_NODE": "1"}) as cluster:
        yield cluster
    assert cluster.processes() == []


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def output(folder: Path) -> str:
    """What the jobs submitted in a folder said, without the lines of every step."""
    text = "\n".join(path.read_text() for path in sorted(folder.glob("slurm-*.out")))
    return "\n".join(line for line in text.splitlines() if not line.startswith("step "))


def wait_for_end(cluster: Cluster, job: str, folder: Path, state: str = "COMPLETED") -> None:
    """Wait until a job has ended in this state.

    A requeued job is started after 3 seconds; SLURM would wait two minutes. Not at once: a node refuses
    a credential made in the second in which the job's first start was revoked.
    """
    hastened = False

    def ended() -> bool:
        nonlocal hastened
        now = cluster.job(job)
        if now["JobState"] == "PENDING" and now["Reason"] == "BeginTime" and not hastened:
            hastened = cluster.call("scontrol", "update", f"jobid={job}", "starttime=now+3").returncode == 0
        return now["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    cluster.wait_until(ended, 150, f"job {job} did not end")
    assert cluster.job(job)["JobState"] == state, output(folder)


@pytest.mark.timeout(300)
def test_a_signalled_job_on_two_nodes_is_requeued_and_ends_as_if_unbroken(
    cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    jobs = {}
    for name in ("unbroken", "signalled"):
        args = arguments(tmp_path / name, {str(data / "a"): 1.0}, train__steps=300)
        jobs[name] = cluster.submit("--nodes=2", f"--job-name={name}", *SMALL, TRAIN, *args, cwd=tmp_path)
    metrics = tmp_path / "signalled" / METRICS
    cluster.wait_until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 20, 150, "no 20 steps")
    assert cluster.call("scancel", "--signal=USR1", "--batch", jobs["signalled"]).returncode == 0
    for job in jobs.values():
        wait_for_end(cluster, job, tmp_path)
    said = output(tmp_path)
    assert cluster.job(jobs["unbroken"])["Restarts"] == "0", said
    assert cluster.job(jobs["signalled"])["Restarts"] == "1", said
    assert re.search(r"resumed from .* after step \d+", said)
    assert len(curve(tmp_path / "signalled")) == 300
    assert curve(tmp_path / "signalled") == curve(tmp_path / "unbroken")
    assert last_hashes(tmp_path / "signalled") == last_hashes(tmp_path / "unbroken")
    assert not list(tmp_path.glob("*/requeue"))


@pytest.mark.timeout(300)
def test_an_array_trains_one_expert_per_task_and_a_wrong_one_fails_with_a_line(
    cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    assert train(arguments(tmp_path / "seed", {str(data / "a"): 1.0}, train__steps=2)) == 0
    (tmp_path / "base.yaml").write_text("train: {steps: 1}\ndata: {train: {nowhere: 1.0}}\n")
    (tmp_path / "math.yaml").write_text(f"train: {{steps: 4}}\ndata: {{train: {{{data / 'b'}: 1.0}}}}\n")
    common = {key: value for key, value in SETTINGS.items() if key != "train.steps"}
    options = [f"--{key}={str(value).lower()}" for key, value in common.items()]
    experts = ["seed", "experts", f"code={data / 'a'}", "math=math.yaml", "--config", "base.yaml", *options]
    job = cluster.submit("--array=0-2", *SMALL, BRANCH, *experts, cwd=tmp_path)
    wait_for_end(cluster, f"{job}_0", tmp_path)
    wait_for_end(cluster, f"{job}_1", tmp_path)
    wait_for_end(cluster, f"{job}_2", tmp_path, "FAILED")
    assert "error: no expert for array index 2: with 2 experts submit with --array=0-1\n" in output(tmp_path) + "\n"

    for name, prefix, steps in (("code", "a", 1), ("math", "b", 4)):
        alone = tmp_path / f"alone-{name}"
        more = {"train__steps": steps, "checkpoint__init_from": tmp_path / "seed"}
        assert train(arguments(alone, {str(data / prefix): 1.0}, **more)) == 0
        assert curve(tmp_path / "experts" / name) == curve(alone)


@pytest.mark.timeout(120)
def test_jobs_that_cannot_run_fail_with_a_line(cluster: Cluster, tmp_path: Path) -> None:
    stray = shutil.copy(TRAIN, tmp_path / "mine.sbatch")
    lost = cluster.submit(*SMALL, str(stray), cwd=tmp_path)
    unsaved = cluster.submit(*SMALL, TRAIN, "--train.steps=1", cwd=tmp_path)
    from_the_repository = cluster.submit(
        *SMALL, f"--output={tmp_path}/slurm-copy.out", str(stray), "--no.such=1", cwd=ROOT
    )
    for job in (lost, unsaved, from_the_repository):
        wait_for_end(cluster, job, tmp_path, "FAILED")
        assert cluster.job(job)["Restarts"] == "0"
    said = error_lines(output(tmp_path))
    assert sorted(line.split(":")[1] for line in said) == [
        " megabts not found",
        " no checkpoint.dir",
        " unknown key no.such (command line); --help lists all keys",
    ]
