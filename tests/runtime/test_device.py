"""Launch, devices, number formats, peaks and the start of communication."""

import time

import pytest
import torch
import torch.distributed as dist

from megabts.errors import UserError
from megabts.runtime import device as runtime
from megabts.runtime.cores import num_cores
from megabts.runtime.device import Launch
from megabts.runtime.verdict import PATIENCE

CPU = torch.device("cpu")


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_launch_without_a_launcher_is_one_rank(no_launcher: pytest.MonkeyPatch) -> None:
    assert Launch.from_environment() == Launch(0, 1, 0)


def test_launch_reads_what_torchrun_sets(no_launcher: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        no_launcher.setenv(name, value)
    assert Launch.from_environment() == Launch(5, 8, 1, 2)


def test_cores_are_shared_among_the_ranks_of_a_node(no_launcher: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        no_launcher.setattr(runtime, "num_cores", lambda: 12)
        runtime.share_cores(Launch(0, 4, 0, 4))
        assert torch.get_num_threads() == 3
        runtime.share_cores(Launch(0, 40, 0, 40))
        assert torch.get_num_threads() == 1
        no_launcher.setenv("OMP_NUM_THREADS", "2")  # a user's own choice stays
        runtime.share_cores(Launch())
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_num_cores_is_what_this_process_may_use() -> None:
    assert num_cores() >= 1


def test_dtypes() -> None:
    assert runtime.resolve_dtype("float32", CPU) == torch.float32
    assert runtime.resolve_dtype("bfloat16", CPU) == torch.bfloat16


@pytest.mark.parametrize(
    "probes, expected",
    [
        ({}, torch.float32),
        ({"_is_amx_tile_supported": True}, torch.bfloat16),
        ({"_is_avx512_bf16_supported": True}, torch.bfloat16),
    ],
)
def test_auto_is_bfloat16_where_the_cpu_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, probes: dict[str, bool], expected: torch.dtype
) -> None:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: probes.get(name, False), raising=False)
    assert runtime.resolve_dtype("auto", CPU) == expected


def test_peak_of_a_cpu_is_measured() -> None:
    peak = runtime.peak_flops(CPU, torch.float32, seconds=0.05)
    assert peak is not None
    size = 1024
    a = torch.ones(size, size)
    start = time.perf_counter()
    torch.mm(a, a)
    assert peak > 0.2 * 2 * size**3 / (time.perf_counter() - start)


@pytest.mark.parametrize(
    "name, peak", [("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA GeForce RTX 3090", None)]
)
def test_peak_of_a_gpu_is_the_data_sheets(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert runtime.peak_flops(torch.device("cuda"), torch.bfloat16) == peak


def test_memory_is_in_bytes() -> None:
    used, total = runtime.memory(CPU)
    assert 2**26 < used < total < 2**50
    runtime.synchronize(CPU)


def test_nccl_without_a_gpu_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="nccl needs GPUs and this machine has none; use gloo or auto") as caught:
        runtime.start_communication(Launch(0, 2, 0), CPU, "nccl", 10, None)
    assert "\n" not in str(caught.value)
    assert not dist.is_initialized()


def test_one_rank_starts_nothing() -> None:
    runtime.start_communication(Launch(), CPU, "nccl", 10, None)
    assert not dist.is_initialized()
    runtime.stop_communication()


def test_auto_on_cpu_is_gloo_with_the_given_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **keywords: calls.append((args, keywords)))
    runtime.start_communication(Launch(0, 2, 0), CPU, "auto", 77, None)
    ((args, keywords),) = calls
    assert args == ("gloo",)
    assert keywords["timeout"].total_seconds() == PATIENCE * 77 + runtime.WATCHDOG_FIRST


def test_gpus_are_named_as_the_environment_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert runtime.gpu_names() == []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert runtime.gpu_names() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-8f")
    assert runtime.gpu_names() == ["3", "GPU-8f"]
