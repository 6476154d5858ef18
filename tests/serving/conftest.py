"""A small BTS checkpoint, and tools/serve.py serving it in a process of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.process import ServerProcess
from tests.serving.tiny import write_stitched


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub, two experts and random stitches, of bytes."""
    return write_stitched(tmp_path_factory.mktemp("serving") / "tiny")


@pytest.fixture(scope="session")
def server(checkpoint: Path) -> Iterator[ServerProcess]:
    """One server for all tests that leave it as it was."""
    with ServerProcess(checkpoint, "--max-rows", "32", "--queue", "32") as process:
        yield process


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the outputs of all members mixed, by what they foretold of the last tokens too."""
    return write_stitched(tmp_path_factory.mktemp("serving") / "mixture", output="mixture", evidence=4)


@pytest.fixture(scope="session")
def mixture_server(mixture: Path) -> Iterator[ServerProcess]:
    """A server of that one."""
    with ServerProcess(mixture) as process:
        yield process
