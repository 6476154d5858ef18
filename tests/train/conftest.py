"""The data that all runs of these tests train on."""

from pathlib import Path

import pytest

from tests.train.runs import make_data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the datasets `make_data` writes; not to be changed."""
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def blend(data: Path) -> dict[str, float]:
    """The usual training data."""
    return {str(data / "a"): 0.7, str(data / "b"): 0.3}
