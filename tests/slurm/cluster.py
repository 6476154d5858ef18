"""A SLURM of two nodes on this machine: munged, slurmctld and two slurmd of Debian's packages, in a folder of its own.

Nothing of it is installed or left behind: own key, ports, state, and no privilege but the user's (root or not).
Both nodes are this machine; the first (in alphabetical order) bears its host name, by which the ranks of both find it.
"""

import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo", "setpriv")

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerParameters=batch_sched_delay=0,sched_interval=1
ReturnToService=2
KillWait=2
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cores}
NodeName={host}-2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cores}
PartitionName=test Nodes=ALL Default=YES State=UP
"""


def find_program(name: str) -> str | None:
    """Its path; daemons live where a user's PATH does not look."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def missing_programs() -> list[str]:
    """What of SLURM and munge is not installed."""
    return [name for name in PROGRAMS if not find_program(name)]


class Cluster:
    """The cluster while it is open: a context manager. `environment` is what its commands and jobs see."""

    def __init__(self, environment: dict[str, str]) -> None:
        # Not pytest's folder: paths of sockets must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-test-"))
        foreign = ("SLURM_", "SBATCH_", "SRUN_", "SQUEUE_")
        self.environment = {name: value for name, value in environment.items() if not name.startswith(foreign)}
        self.environment["SLURM_CONF"] = str(self.folder / "slurm.conf")
        self.daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        self.folder.chmod(0o711)
        for name in ("munge", "state"):
            (self.folder / name).mkdir(mode=0o711)
        munge = self.folder / "munge"
        key = munge / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        host, user = socket.gethostname().split(".")[0], pwd.getpwuid(os.getuid()).pw_name
        text = CONF.format(folder=self.folder, ports=free_ports(3), cores=os.cpu_count(), host=host, user=user)
        (self.folder / "slurm.conf").write_text(text)
        files = [f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")]
        self._daemon("munged", "--foreground", "--force", f"--socket={munge / 'socket'}", *files)
        self.wait_until(lambda: (munge / "socket").exists(), 10, "munged did not start")
        self._daemon("slurmctld", "-D", "-c")
        for node in (host, f"{host}-2"):
            (self.folder / f"spool-{node}").mkdir(mode=0o711)
            self._daemon("slurmd", "-D", "-N", node)
        self.wait_until(lambda: self.idle_nodes() == 2, 30, "the nodes did not become idle")

    def _daemon(self, name: str, *arguments: str) -> None:
        # Should this process be killed, the daemon goes with it.
        command = ["setpriv", "--pdeathsig", "KILL", find_program(name) or name, *arguments]
        with open(self.folder / f"{name}-{len(self.daemons)}.log", "wb") as log:
            daemon = subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.daemons.append(daemon)

    def __exit__(self, *_: object) -> None:
        """End the daemons, then whatever is left of their jobs, by their ids; remove the folder."""
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in reversed(self.daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait(10)
        deadline = time.monotonic() + 10
        while (left := self.processes()) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        shutil.rmtree(self.folder, ignore_errors=True)

    def processes(self) -> list[int]:
        """The living processes of this cluster, known by its slurm.conf in their environment: daemons, jobs, ranks."""
        mark, found = f"SLURM_CONF={self.environment['SLURM_CONF']}".encode(), []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found

    def call(self, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """One of SLURM's commands, to its end."""
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=self.environment,
            cwd=cwd or self.folder,
            timeout=30,
            stdin=subprocess.DEVNULL,
        )

    def idle_nodes(self) -> int:
        """How many nodes are up and without a job."""
        return self.call("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").stdout.count("\n")

    def submit(self, *arguments: str, cwd: Path) -> str:
        """sbatch; the job's id."""
        done = self.call("sbatch", "--parsable", *arguments, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What scontrol says of a job: JobState, ExitCode, Restarts ..."""
        return dict(re.findall(r"(\w+)=(\S+)", self.call("scontrol", "show", "job", job).stdout))

    def wait_until(self, done: Callable[[], bool], seconds: float, problem: str) -> None:
        """Wait for `done`, at most so long; then fail with what the daemons said."""
        deadline = time.monotonic() + seconds
        while not done():
            dead = any(daemon.poll() is not None for daemon in self.daemons)
            if dead or time.monotonic() > deadline:
                said = [f"{path.name}: {path.read_text()[-1500:]}" for path in sorted(self.folder.glob("*.log"))]
                raise AssertionError("\n".join([problem, *said]))
            time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
