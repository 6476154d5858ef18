"""The written corpora: format, determinism, and how little train and valid share."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megabts.corpora.python_library import unit_of
from megabts.corpora.write import build_corpora, write_jsonl
from megabts.errors import UsageError, UserError

ROOT = Path(__file__).resolve().parents[2]
DOMAINS = ("code", "math", "prose")
LONG_LINE = 40


def read(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("corpora")
    return out, build_corpora(out, seed=5, math_bytes=1_200_000)


@pytest.fixture(scope="module")
def documents(built):
    return {(d, s): read(built[0] / d / f"{s}.jsonl.gz") for d in DOMAINS for s in ("train", "valid")}


def test_layout_and_sizes(built, documents):
    out, sizes = built
    found = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert found == sorted(f"{d}/{s}.jsonl.gz" for d in DOMAINS for s in ("train", "valid"))
    for (domain, split), rows in documents.items():
        assert all(row.keys() == {"text", "source"} and row["text"] for row in rows)
        assert sizes[domain][split] == (len(rows), sum(len(row["text"].encode()) for row in rows))
        assert sizes[domain][split][1] >= 200_000
    assert sizes["code"]["train"][1] > 3_000_000
    assert sizes["prose"]["train"][1] > 1_000_000
    assert 1_200_000 <= sum(num_bytes for _, num_bytes in sizes["math"].values()) < 1_210_000


def test_no_document_stands_twice(documents):
    texts = [row["text"] for rows in documents.values() for row in rows]
    assert len(texts) == len(set(texts))


def test_code_and_prose_are_split_by_the_same_modules(documents):
    units = {
        split: {unit_of(row["source"]) for domain in ("code", "prose") for row in documents[domain, split]}
        for split in ("train", "valid")
    }
    assert not units["train"] & units["valid"]
    assert len(units["valid"]) >= 5


@pytest.mark.parametrize(("domain", "bound"), [("code", 0.05), ("prose", 0.04)])
def test_valid_lines_are_rarely_in_train(documents, domain, bound):
    def long_lines(rows: list[dict[str, str]]) -> list[str]:
        lines = (line.strip() for row in rows for line in row["text"].split("\n"))
        return [line for line in lines if len(line) > LONG_LINE]

    train = {line for other in ("code", "prose") for line in long_lines(documents[other, "train"])}
    valid = long_lines(documents[domain, "valid"])
    share = sum(line in train for line in valid) / len(valid)
    assert share < bound, f"{share:.2%} of the long lines of {domain}/valid stand in train"


def test_prose_documents_hold_almost_no_code_lines(documents):
    code = {
        line.strip() for s in ("train", "valid") for row in documents["code", s] for line in row["text"].split("\n")
    }
    prose = [line.strip() for row in documents["prose", "train"] for line in row["text"].split("\n")]
    prose = [line for line in prose if len(line) > LONG_LINE]
    assert sum(line in code for line in prose) / len(prose) < 0.01


def test_math_questions_of_valid_are_new(documents):
    def questions(split: str) -> list[str]:
        lines = (line for row in documents["math", split] for line in row["text"].split("\n"))
        return [line for line in lines if line.startswith("Question: ")]

    train, valid = questions("train"), questions("valid")
    assert len(valid) > 500
    assert len(set(train)) == len(train)
    assert not set(train) & set(valid)


def test_the_tool_writes_the_same_bytes_in_another_process(built, tmp_path):
    command = [sys.executable, ROOT / "tools/build_corpora.py", "--out", tmp_path, "--seed", "5"]
    environment = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "77", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [*command, "--math-megabytes", "1.2"], capture_output=True, text=True, env=environment, timeout=120, check=True
    )
    for domain in DOMAINS:
        for split, (count, num_bytes) in built[1][domain].items():
            name = f"{domain}/{split}.jsonl.gz"
            assert (tmp_path / name).read_bytes() == (built[0] / name).read_bytes(), name
            assert [domain, split, f"{count:,}", f"{num_bytes:,}"] in [row.split() for row in done.stdout.split("\n")]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_aside(tmp_path):
    path = tmp_path / "train.jsonl.gz"
    write_jsonl(path, [("a", "old")])

    class Unwritable(list):
        def __iter__(self):
            yield "a", "new"
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"train\.jsonl\.gz: cannot be written: No space left"):
        write_jsonl(path, Unwritable())
    assert read(path) == [{"text": "old", "source": "a"}]
    assert [file.name for file in tmp_path.iterdir()] == ["train.jsonl.gz"]


def test_a_lone_surrogate_is_replaced(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    assert write_jsonl(path, [("s", "a\ud800é")]) == (1, 4)
    assert read(path)[0]["text"] == "a?é"


def test_out_that_is_a_file_is_one_clear_line(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        build_corpora(tmp_path / "out", math_bytes=20_000)


@pytest.mark.parametrize("wrong", [{"valid_fraction": 0}, {"valid_fraction": 0.6}, {"math_bytes": 10}])
def test_impossible_sizes_are_usage_errors(tmp_path, wrong):
    with pytest.raises(UsageError):
        build_corpora(tmp_path, **wrong)
    assert not list(tmp_path.iterdir())


def test_the_tool_reports_a_senseless_size_in_one_line(tmp_path):
    command = [sys.executable, ROOT / "tools/build_corpora.py", "--out", tmp_path / "out", "--math-megabytes", "nan"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "error: --math-megabytes nan: give a size above 0 and below 10000\n"
    assert not (tmp_path / "out").exists()
