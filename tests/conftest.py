"""What every test shares: hypothesis without deadlines, GPU tests skipped without a GPU, threads per rank."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

GPU_TESTS = Path(__file__).parent / "gpu"

# Deadlines measure the machine's load, not the code.
settings.register_profile("megabts", deadline=None, print_blob=True)
settings.load_profile("megabts")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is below tests/gpu, and skip whatever is marked `gpu` where there is no CUDA device."""
    for item in items:
        if GPU_TESTS in item.path.parents:
            item.add_marker(pytest.mark.gpu)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    # torch is imported here, not above: a run without GPU tests does not pay for it.
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def rank_environment() -> Callable[[int], dict[str, str]]:
    """`rank_environment(ranks)`: this process's environment with the cores shared out among that many ranks."""

    def environment(ranks: int) -> dict[str, str]:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // ranks))}

    return environment
