"""The one place that knows what hardware there is: devices, communication libraries, number formats, peaks."""

import importlib
import importlib.util
import os
import resource
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType

import torch
import torch.distributed as dist

from megabts.errors import UsageError, UserError
from megabts.runtime.cores import num_cores
from megabts.runtime.verdict import PATIENCE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bf16 peaks, FLOP/s, by a word in the device's name."""

WATCHDOG_FIRST = 60
"""Seconds that collectives wait longer than the watchdog, which can say who it was."""


@dataclass(frozen=True)
class Launch:
    """Where this process stands among the ranks that torchrun (or nothing) started."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @classmethod
    def from_environment(cls) -> "Launch":
        """Read torchrun's RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; one process without them.

        Raises UsageError for values that cannot be.
        """
        get = os.environ.get
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        values = [get(name, alone) for name, alone in zip(names, "0101", strict=True)]
        for name, value in zip(names, values, strict=True):
            if not value.isdecimal() or (name.endswith("SIZE") and int(value) == 0):
                raise UsageError(f"{name} is {value!r} in the environment; it must be a number that the launcher gives")
        launch = cls(*map(int, values))
        if launch.rank >= launch.world_size:
            raise UsageError(
                f"RANK is {launch.rank} in the environment and WORLD_SIZE {launch.world_size}; ranks count from 0 to "
                "WORLD_SIZE - 1: correct one of them"
            )
        if launch.world_size > 1 and "RANK" not in os.environ:
            raise UsageError(f"WORLD_SIZE is {launch.world_size}, but RANK is not set; set it, or start with torchrun")
        return launch


def pick_device(launch: Launch) -> torch.device:
    """This rank's device: its GPU, or the CPU."""
    if torch.cuda.is_available():
        torch.cuda.set_device(launch.local_rank)
        return torch.device("cuda", launch.local_rank)
    return torch.device("cpu")


def gpu_names() -> list[str]:
    """This machine's GPUs that this process may use, each as CUDA_VISIBLE_DEVICES names it; starts nothing on them."""
    count = torch.cuda.device_count()
    allowed = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return allowed[:count] or [str(number) for number in range(count)]


def gpu_model(device: torch.device) -> str:
    """A GPU's name, such as NVIDIA H200."""
    name: str = torch.cuda.get_device_name(device)
    return name


def share_cores(launch: Launch) -> None:
    """Give this rank its share of the cores: oversubscribed OpenMP threads make small operations 5-10x slower."""
    if launch.local_world_size > 1 or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, num_cores() // launch.local_world_size))


def collective_timeout(timeout: int) -> timedelta:
    """How long collectives wait: longer than a watchdog of `timeout` seconds ever does. Groups do not inherit it."""
    return timedelta(seconds=PATIENCE * timeout + WATCHDOG_FIRST)


def start_communication(
    launch: Launch, device: torch.device, backend: str, timeout: int, store: dist.Store | None
) -> None:
    """Initialise torch.distributed for more than one rank, who meet at `store`.

    `timeout`: seconds after which the watchdog ends a run where a rank hangs. Collectives wait longer than it does.
    """
    if launch.world_size == 1:
        return
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl" and device.type != "cuda":
        raise UserError("parallel.backend nccl needs GPUs and this machine has none; use gloo or auto")
    dist.init_process_group(
        backend,
        store=store,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=collective_timeout(timeout),
    )


def stop_communication() -> None:
    """Leave torch.distributed, if it was entered."""
    if dist.is_initialized():
        dist.destroy_process_group()


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products run natively (GPU tensor cores; AMX or AVX512-BF16 on CPU)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    probes = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(probe and probe() for probe in probes)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The working dtype that a precision setting means on this device."""
    if name == "auto":
        return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    return DTYPES[name]


def peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float | None:
    """Peak matmul FLOP/s: the data sheet's on a known GPU, measured on CPU, None when unknown."""
    if device.type == "cuda":
        name = gpu_model(device)
        return next((peak for word, peak in PEAK_FLOPS.items() if word in name), None)
    size = 1024
    a = torch.ones(size, size, dtype=dtype)
    torch.mm(a, a)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, a)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def memory(device: torch.device) -> tuple[int, int]:
    """(used, total) bytes: peak reserved on a GPU, peak resident set of this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device), torch.cuda.get_device_properties(device).total_memory
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return peak, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_allocated(device: torch.device) -> int:
    """Most bytes that this process's tensors had on a GPU at one time; on CPU, all of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return memory(device)[0]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything asked of it (for timing)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_fp8(device: torch.device) -> None:
    """Raise UserError on a GPU that has no FP8 products; on CPU torch has them, for tests."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError(
            f"precision.fp8 needs a GPU of compute capability 8.9 (Ada) or later, and this is {gpu_model(device)}; set "
            "precision.fp8 none"
        )


def have_te() -> bool:
    """Whether NVIDIA's Transformer Engine is installed."""
    return importlib.util.find_spec("transformer_engine") is not None


def check_te(device: torch.device) -> None:
    """Raise UsageError on a device that Transformer Engine does not run on."""
    if device.type != "cuda":
        raise UsageError(f"precision.layers te needs an NVIDIA GPU, and this run is on {device}; set it to torch")


def load_te() -> ModuleType:
    """`transformer_engine.pytorch`. Raises UserError when it is not installed, or does not load."""
    if not have_te():
        raise UserError(
            "precision.layers te needs Transformer Engine, which is not installed: pip install --no-build-isolation "
            "'transformer-engine[pytorch]', or set precision.layers torch"
        )
    try:
        te = importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        cause = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"Transformer Engine is installed but does not load ({cause[0]}); install the one that fits torch "
            f"{torch.__version__}, or set precision.layers torch"
        ) from error
    if not hasattr(te, "autocast"):
        raise UserError(
            "this Transformer Engine is older than 2.12; install a newer one, or set precision.layers torch"
        )
    return te
