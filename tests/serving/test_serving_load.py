"""What is served, from a folder: names, limits, what is refused before anybody is served."""

from pathlib import Path
from typing import Any

import pytest

from megabts.config.run import ParallelConfig
from megabts.errors import UsageError, UserError
from megabts.inference.launch import join
from megabts.serving.load import Source, load_served
from megabts.serving.served import Limits, Served
from tests.serving.tiny import write_dense

MEMBERS = Path(__file__).parents[1] / "golden" / "bts" / "members"


def served(checkpoint: Path, limits: dict[str, Any] | None = None, **source: Any) -> Served:
    return load_served(Source(checkpoint, **source), join(ParallelConfig()), **(limits or {}))[0]


def test_limits_follow_the_model(checkpoint: Path) -> None:
    assert served(checkpoint).limits == Limits(16, 16 * 256, 64, 255, 255)
    given = {"max_rows": 2, "max_tokens": 100, "queue": 1, "max_prompt_tokens": 50, "max_new_tokens": 1000}
    assert served(checkpoint, given).limits == Limits(2, 100, 1, 50, 99)
    assert served(checkpoint, {"max_rows": 1}).limits.max_tokens == 256  # the longest fits always
    with pytest.raises(UsageError, match="--max-tokens is 1"):
        served(checkpoint, {"max_tokens": 1})


def test_names_and_members(checkpoint: Path, tmp_path: Path) -> None:
    whole = served(checkpoint)
    assert (whole.name, whole.method, whole.experts) == ("tiny", "bts", ("code", "math"))
    small = served(checkpoint, name="other", without=["code"])
    assert (small.name, small.experts) == ("other", ("math",))
    assert small.describe()["members"] == ["hub", "math"]
    run = served(write_dense(tmp_path / "dense" / "step_00000003", 0))
    assert (run.name, run.method, run.stitched) == ("dense", "dense", False)
    assert run.describe() == {"method": "dense", "members": [], "gate_places": [], "max_tokens": 256}


def test_tokenizers_must_be_there_and_fit(checkpoint: Path) -> None:
    with pytest.raises(UserError, match="has no tokenizer; give --tokenizer"):
        served(MEMBERS / "hub")
    with pytest.raises(UserError, match="tokenizer bytes has 257 ids and the model a vocabulary of 97"):
        served(MEMBERS / "hub", tokenizer="bytes")
    assert served(MEMBERS / "hub", tokenizer="null:97").encode("1 2 3") == [1, 2, 3]
