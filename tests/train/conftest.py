"""The data that all runs of these tests train on."""

from pathlib import Path

import pytest

import megabts.train.trainer as trainer_module
from tests.train.runs import make_data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the datasets `make_data` writes; not to be changed."""
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def blend(data: Path) -> dict[str, float]:
    """The usual training data."""
    return {str(data / "a"): 0.7, str(data / "b"): 0.3}


@pytest.fixture(autouse=True)
def _unknown_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a tiny run's time would go into measuring what the machine could do."""
    monkeypatch.setattr(trainer_module, "peak_flops", lambda device, dtype: None)
