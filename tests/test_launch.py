"""The launch scripts, started every way they may be: bash, torchrun (both ways), srun; and the environment script.

The scripts are copied into a small repository whose tools/train.py prints what it was given; torchrun is the real one,
scontrol is a fake on PATH. What srun does is its environment, so that is set by hand.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
DEFAULTS = {
    "pretrain_seed.sh": "seed.yaml",
    "pretrain_expert.sh": "code.yaml",
    "train_stitch.sh": "stitch.yaml",
    "train_moe.sh": "btx.yaml",
}
NAMES = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"]

# One write per rank: the ranks share a pipe.
TRAIN = f"""
import json, os, signal, sys, time
said = {{name: os.environ.get(name) for name in {NAMES!r}}}
line = json.dumps({{**said, "argv": sys.argv[1:], "cwd": os.getcwd(), "path": sys.path[1:]}})
os.write(1, (line + chr(10)).encode())
if "--until-usr1" in sys.argv:
    received = []
    signal.signal(signal.SIGUSR1, lambda *_: received.append(1))
    os.write(1, b"ready" + bytes([10]))
    signal.alarm(90)
    while not received:
        time.sleep(0.05)
    with open(os.environ["LAUNCH_EXIT_CODE"], "w") as file:
        file.write("85")
    sys.exit(85)
if "--end" in sys.argv:
    code = int(sys.argv[sys.argv.index("--end") + 1].split()[int(os.environ["RANK"] or 0)])
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)
"""

SCONTROL = """#!/bin/sh
[ "$1 $2 $3" = "show hostnames node[03-04]" ] || exit 1
echo node03
echo node04
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository of launch scripts and a train.py that prints; spaces in its path are no accident."""
    root = tmp_path / "my repository"
    shutil.copytree(ROOT / "examples", root / "examples", ignore=shutil.ignore_patterns("configs"))
    (root / "tools").mkdir()
    (root / "tools" / "train.py").write_text(TRAIN)
    for name in ("__init__.py", "runtime/__init__.py", "runtime/torchrun.py"):
        (root / "megabts" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "megabts" / name, root / "megabts" / name)
    binaries = tmp_path / "bin"
    binaries.mkdir()
    # The tests' own Python, and torchrun with it, are first on PATH; there is no .venv in the copy.
    for name, text in {
        "python3": f'#!/bin/sh\nexec "{sys.executable}" "$@"\n',
        "torchrun": f'#!/bin/sh\nexec "{sys.executable}" -m torch.distributed.run "$@"\n',
        "scontrol": SCONTROL,
    }.items():
        (binaries / name).write_text(text)
        (binaries / name).chmod(0o755)
    return root


@pytest.fixture
def run(repository: Path, tmp_path: Path) -> Run:
    """Run a command in tmp_path with an environment free of what a launcher outside may have set."""
    dropped = (*NAMES, "PYTHONPATH", "NPROC_PER_NODE", "NNODES", "NODE_RANK", "VIRTUAL_ENV")
    clean = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith(("SLURM_", "TORCHELASTIC"))}
    clean["PATH"] = f"{tmp_path / 'bin'}:{clean['PATH']}"

    def start(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**clean, **variables}
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
            timeout=120,
            stdin=subprocess.DEVNULL,
        )

    return start


def ranks(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return sorted(found, key=lambda said: int(said["RANK"] or 0))


def script(repository: Path, name: str = "pretrain_expert.sh") -> str:
    return str(repository / "examples" / name)


def assert_two_ranks(said: list[dict[str, Any]], arguments: list[str]) -> None:
    assert [rank["RANK"] for rank in said] == ["0", "1"]
    assert [rank["LOCAL_RANK"] for rank in said] == ["0", "1"]
    assert {rank["WORLD_SIZE"] for rank in said} == {"2"}
    assert [rank["argv"] for rank in said] == [arguments, arguments]


def test_bash_starts_torchrun(run: Run, repository: Path, tmp_path: Path) -> None:
    overrides = ["--train.steps", "2", "--logging.name", "two words"]
    done = run("bash", script(repository), *overrides, NPROC_PER_NODE="2")
    said = ranks(done)
    config = str(repository / "examples/configs/paper/code.yaml")
    assert_two_ranks(said, ["--config", config, *overrides])
    assert said[0]["cwd"] == str(tmp_path)
    assert str(repository) in said[0]["path"]
    cores = os.cpu_count() or 1
    assert said[0]["OMP_NUM_THREADS"] == str(max(1, cores // 2))


@pytest.mark.parametrize("options", [["--no-python"], []], ids=["no-python", "through-python"])
def test_under_torchrun(run: Run, repository: Path, options: list[str]) -> None:
    command = ["torchrun", "--standalone", "--nproc-per-node", "2", *options, script(repository, "train_stitch.sh")]
    said = ranks(run(*command, "--config", "my config.yaml", "--train.steps=2"))
    assert_two_ranks(said, ["--config", "my config.yaml", "--train.steps=2"])


def test_a_mixture_is_made_once_before_it_is_trained(run: Run, repository: Path, tmp_path: Path) -> None:
    (repository / "tools" / "upcycle.py").write_text(
        "import json, sys, pathlib\nprint(json.dumps(sys.argv[1:]))\npathlib.Path(sys.argv[-1]).mkdir()\n"
    )
    command = ["bash", script(repository, "train_moe.sh"), "--start", "a start", "--config=c.yaml", "--member", "a=x y"]
    rank = {"LOCAL_RANK": "0", "RANK": "0"}
    early = run(*command, **rank)
    assert early.returncode == 1
    assert "there is no a start yet, and this is one of several ranks" in early.stderr
    made = run(*command, "--member=b=z", "--upcycle", "bam", NPROC_PER_NODE="1")
    lines = [json.loads(line) for line in made.stdout.splitlines() if line.startswith(("[", "{"))]
    assert lines[0] == ["--method", "bam", "--member", "a=x y", "--member", "b=z", "--out", "a start"]
    assert lines[1]["argv"] == ["--config=c.yaml", "--checkpoint.init_from", "a start"]
    for there in (run(*command, NPROC_PER_NODE="1"), run(*command, **rank)):
        assert [said["argv"] for said in ranks(there)] == [lines[1]["argv"]]
    assert "--member needs --start" in run("bash", script(repository, "train_moe.sh"), "--member=a=x").stderr


def test_two_nodes_from_bash(run: Run, repository: Path, tmp_path: Path) -> None:
    """Node 1 of 2: what torchrun is told. The rendezvous itself is torchrun's own business."""
    (tmp_path / "bin" / "python3").write_text(
        f'#!/bin/sh\n[ "$2" = megabts.runtime.torchrun ] || exec "{sys.executable}" "$@"\nprintf "%s\\n" "$@"\n'
    )
    nodes = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node03", "MASTER_PORT": "1234", "NPROC_PER_NODE": "4"}
    done = run("bash", script(repository), **nodes)
    told = done.stdout.split("\n")
    expected = "--nnodes 2 --nproc-per-node 4 --node-rank 1 --master-addr node03 --master-port 1234"
    assert told[2:12] == expected.split()
    assert told[12] == str(repository / "tools/train.py")

    missing = run("bash", script(repository), NNODES="2")
    assert missing.returncode == 1
    assert "error: NNODES=2 needs MASTER_ADDR" in missing.stderr


@pytest.mark.parametrize("wrong", [{"NPROC_PER_NODE": "x"}, {"NPROC_PER_NODE": "0"}, {"NNODES": "two"}])
def test_numbers_of_ranks_and_nodes_are_checked(run: Run, repository: Path, wrong: dict[str, str]) -> None:
    done = run("bash", script(repository), **wrong)
    ((name, value),) = wrong.items()
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {name} is {value}; give a number of ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", DEFAULTS)
def test_one_rank_of_srun(run: Run, repository: Path, name: str) -> None:
    slurm = {
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_NTASKS": "4",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[03-04]",
        "SLURM_JOB_ID": "137456",
        "SLURM_CPUS_ON_NODE": "8",
    }
    (said,) = ranks(run(script(repository, name), "--train.steps", "2", **slurm))
    assert said["argv"] == [
        "--config",
        str(repository / "examples/configs/paper" / DEFAULTS[name]),
        "--train.steps",
        "2",
    ]
    found = {key: said[key] for key in NAMES}
    assert found == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "node03",
        "MASTER_PORT": str(10000 + 137456 % 20000),
        "OMP_NUM_THREADS": "4",
    }


def test_one_task_of_srun_per_node_starts_torchrun(run: Run, repository: Path) -> None:
    one_node = {
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NTASKS": "1",
        "SLURM_NNODES": "1",
        "SLURM_JOB_ID": "9",
    }
    said = ranks(run(script(repository), "--config=c.yaml", NPROC_PER_NODE="2", **one_node))
    assert_two_ranks(said, ["--config=c.yaml"])


def test_srun_over_nodes_without_scontrol_is_refused(run: Run, repository: Path, tmp_path: Path) -> None:
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    slurm = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"}
    done = run(script(repository), **slurm, SLURM_JOB_NODELIST="node[03-04]")
    assert done.returncode == 1
    assert "error: no first host" in done.stderr
    assert done.stdout == ""


def test_exit_code_of_a_rank_is_kept(run: Run, repository: Path) -> None:
    assert run("bash", script(repository), "--end", "7", LOCAL_RANK="0", RANK="0").returncode == 7


def test_a_signal_reaches_the_ranks_and_85_comes_back(run: Run, repository: Path, tmp_path: Path) -> None:
    """Slurm signals the batch script, which is torchrun's parent."""
    signalling = (
        'bash "$0" --until-usr1 >out & pid=$!; '
        'for i in $(seq 400); do [ "$(grep -c ready out)" = 2 ] && break; sleep 0.1; done; '
        'kill -USR1 $pid; wait $pid; echo "code $?"'
    )
    done = run("bash", "-c", signalling, script(repository), NPROC_PER_NODE="2", TMPDIR=str(tmp_path))
    assert "code 85" in done.stdout, done.stderr
    assert not list(tmp_path.glob("launch-*"))
    assert done.stderr == ""


@pytest.mark.parametrize("code", [2, 85, -9])
def test_ranks_that_fail_under_torchrun_give_their_code_and_have_the_word(
    run: Run, repository: Path, code: int
) -> None:
    """Only of one that was killed it is torchrun that tells."""
    done = run("bash", script(repository), "--end", f"{code} {code}", NPROC_PER_NODE="2")
    assert done.returncode == max(code, 1)
    assert re.fullmatch(r"(rank \d \(pid \d+\) was ended by SIGKILL\n)+" if code < 0 else "", done.stderr)


def test_help_needs_no_ranks(run: Run, repository: Path) -> None:
    (said,) = ranks(run("bash", script(repository), "--help", NPROC_PER_NODE="2"))
    assert said["RANK"] is None
    assert "--help" in said["argv"]


def test_missing_torch_is_one_line(run: Run, repository: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    done = run("bash", script(repository), PATH=f"{bare / 'bin'}:{os.environ['PATH']}")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "has no torch" in done.stderr
    assert done.stderr.count("\n") == 1


def environment_call(repository: Path, extras: str, *arguments: str) -> list[str]:
    """A script like quickstart.sh: parse, prepare, say which Python it got and what was left of its arguments."""
    text = (
        'set -euo pipefail; source "$0/examples/environment.sh"; environment_parse "$@"; '
        'set -- ${ENVIRONMENT_ARGS[@]+"${ENVIRONMENT_ARGS[@]}"}; '
        f"environment_prepare '{extras}'; command -v python3; echo \"rest: $*\""
    )
    return ["bash", "-c", text, str(repository), *arguments]


@pytest.fixture
def fake_pip(repository: Path, tmp_path: Path) -> Path:
    """`python3 -m venv` gives an environment whose pip writes its arguments to pip.log.

    It fails where a file bad_pip stands beside the log, and is killed where kill_pip does.
    """
    (repository / "setup.py").write_text("")
    (repository / "constraints.txt").write_text("")
    log = tmp_path / "pip.log"
    pip = tmp_path / "pip.py"
    pip.write_text(
        "import os, pathlib, sys\n"
        f"log = pathlib.Path({str(log)!r})\n"
        "if 'install' in sys.argv:\n"
        "    log.write_text((log.read_text() if log.exists() else '') + ' '.join(sys.argv[1:]) + '\\n')\n"
        "    if log.with_name('bad_pip').exists():\n"
        "        sys.exit('no matching distribution')\n"
        "    if log.with_name('kill_pip').exists():\n"
        "        os.kill(os.getpid(), 9)\n"
    )
    real = os.path.realpath(sys.executable)
    (tmp_path / "bin" / "python3").write_text(
        "#!/bin/sh\n"
        f'[ "$2" = venv ] || exec "{real}" "$@"\n'
        f'"{real}" -m venv --without-pip --clear "$4" || exit 1\n'
        f'cp "{pip}" "$("$4/bin/python3" -c "import site; print(site.getsitepackages()[0])")/pip.py"\n'
    )
    return log


def test_environment_is_made_once_and_renewed_when_needed(run: Run, repository: Path, fake_pip: Path) -> None:
    first = run(*environment_call(repository, "", "--no-venv=no", "a b"))
    assert first.returncode == 0, first.stderr
    assert "making .venv" in first.stdout
    assert f"{repository}/.venv/bin/python3\nrest: --no-venv=no a b\n" in first.stdout
    flags = "install --disable-pip-version-check --no-compile -c constraints.txt -e ."
    assert fake_pip.read_text().splitlines() == [flags]
    assert list((repository / ".venv/lib").rglob("pip.*.pyc")), "what pip installed is not compiled"

    again = run(*environment_call(repository, ""))
    assert "up to date" in again.stdout
    assert len(fake_pip.read_text().splitlines()) == 1

    run(*environment_call(repository, "test"))
    run(*environment_call(repository, "serve"))
    assert [line.split()[-1] for line in fake_pip.read_text().splitlines()[1:]] == [".[test]", ".[serve,test]"]
    assert "up to date" in run(*environment_call(repository, "test")).stdout

    (repository / "constraints.txt").write_text("numpy==2\n")
    changed = run(*environment_call(repository, ""))
    assert "installing" in changed.stdout
    assert "making" not in changed.stdout


def test_environment_after_a_failed_and_after_a_killed_installation(
    run: Run, repository: Path, fake_pip: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad_pip").touch()
    failed = run(*environment_call(repository, ""))
    assert failed.returncode == 1
    assert "no matching distribution" in failed.stderr
    assert "error: pip failed" in failed.stderr
    assert "rest:" not in failed.stdout
    (tmp_path / "bad_pip").unlink()
    retried = run(*environment_call(repository, ""))
    assert "making" not in retried.stdout
    assert retried.returncode == 0

    (tmp_path / "kill_pip").touch()
    assert run(*environment_call(repository, "test")).returncode == 1
    (tmp_path / "kill_pip").unlink()
    half = repository / ".venv/lib/half-installed"
    half.touch()
    killed = run(*environment_call(repository, ""))
    assert killed.returncode == 0
    assert "making .venv" in killed.stdout
    assert not half.exists()
    assert not (repository / ".venv/.megabts-installing").exists()


def test_two_environment_calls_at_once_install_once(run: Run, repository: Path, fake_pip: Path, tmp_path: Path) -> None:
    if not shutil.which("flock"):
        pytest.skip("flock is not installed")
    call = tmp_path / "call.sh"
    call.write_text(
        f'set -euo pipefail; source "{repository}/examples/environment.sh"; environment_prepare ""; echo done'
    )
    both = run("bash", "-c", 'bash "$0" & bash "$0" & wait', str(call))
    assert both.stdout.count("done") == 2, both.stderr
    assert both.stdout.count("making .venv") == 1
    assert len(fake_pip.read_text().splitlines()) == 1


def test_no_venv_takes_the_current_python(run: Run, repository: Path, tmp_path: Path) -> None:
    done = run(*environment_call(repository, "dev", "x", "--no-venv"))
    assert done.returncode == 0, done.stderr
    assert "nothing is installed" in done.stdout
    assert f"{tmp_path}/bin/python3\nrest: x\n" in done.stdout
    assert not (repository / ".venv").exists()


def test_old_python_and_missing_venv_module_are_one_line(run: Run, repository: Path, tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python3"
    python.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.2\nexit 1\n')
    old = run(*environment_call(repository, ""))
    assert old.returncode == 1
    assert (
        old.stderr
        == f"error: {python} is Python 3.9.2, megabts needs 3.10 or newer: put a newer python3 first on PATH\n"
    )

    python.write_text('#!/bin/sh\n[ "$2" = "import ensurepip, venv" ] && exit 1\nexit 0\n')
    bare = run(*environment_call(repository, ""))
    assert bare.returncode == 1
    assert "apt-get install python3-venv" in bare.stderr
    assert bare.stderr.count("\n") == 1
