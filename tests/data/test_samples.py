"""Sample indices against Megatron's own arrays and against a token-by-token loop; reading, splits, cache."""

import ast
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from megabts.data.indexed import IndexedDataset
from megabts.data.samples import SampleDataset, build_sample_indices, read_sample, split_ranges
from megabts.data.validation import ValidationSet
from megabts.errors import UsageError, UserError

GOLDEN = Path(__file__).parents[1] / "golden"


class MemoryDataset:
    """Sequences held in memory, with the interface of IndexedDataset that samples use."""

    def __init__(self, sequences: list[list[int]]) -> None:
        self.sequences = [np.array(sequence, dtype=np.uint16) for sequence in sequences]
        self.lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int32)
        self.prefix = "memory"
        self.sidecar: dict[str, object] = {}

    def __len__(self) -> int:
        return len(self.sequences)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        return self.sequences[index][offset : None if length is None else offset + length]


def numbered(lengths: list[int]) -> IndexedDataset:
    """Every token of the dataset is another number."""
    ends = np.cumsum([0, *lengths])
    return cast(IndexedDataset, MemoryDataset([list(range(begin, end)) for begin, end in pairwise(ends)]))


def read_all(dataset: SampleDataset | ValidationSet) -> list[list[int]]:
    return [dataset[i].tolist() for i in range(len(dataset))]


def golden_arrays() -> dict[str, dict[str, np.ndarray]]:
    """{split: {name: array}} as Megatron's GPTDataset printed them."""
    arrays: dict[str, dict[str, np.ndarray]] = {}
    for line in (GOLDEN / "gpt_dataset_indices.txt").read_text().splitlines():
        if head := re.match(r"(train|valid|test) (\d+) indices (\[.*\])", line):
            part = arrays.setdefault(head[1], {"indices": np.array(ast.literal_eval(head[3]))})
        elif body := re.match(r" (doc|sample|shuf) (\w+) (\[.*\])", line):
            part[body[1]] = np.array(ast.literal_eval(body[3]), dtype=body[2])
    return arrays


def loop_indices(
    lengths: list[int], seq_length: int, num_samples: int | None, seed: int
) -> tuple[list[int], list[tuple[int, int]], list[int]]:
    """The three arrays by walking over the tokens one at a time."""
    per_epoch = sum(lengths)
    epochs = 1
    while num_samples is not None and epochs * per_epoch < num_samples * seq_length + 1:
        epochs += 1
    total = (epochs * per_epoch - 1) // seq_length
    head = total
    if num_samples is not None and epochs > 1:
        sans = ((epochs - 1) * per_epoch - 1) // seq_length
        if num_samples - sans < int(0.80 * ((per_epoch - 1) // seq_length)):
            head = sans
    rng = np.random.RandomState(seed)
    groups = [epochs] if head == total else [epochs - 1, 1]
    document: list[int] = []
    for group in groups:
        part = np.array(list(range(len(lengths))) * group, dtype=np.int32)
        rng.shuffle(part)
        document += part.tolist()
    places = [(position, offset) for position, number in enumerate(document) for offset in range(lengths[number])]
    rows = [(0, 0)] + [places[i * seq_length] for i in range(1, total + 1)]
    shuffle: list[int] = []
    for begin, end in [(0, head), (head, total)]:
        part = np.arange(begin, end, dtype=np.uint32)
        rng.shuffle(part)
        shuffle += part.tolist()
    return document, rows, shuffle


@pytest.mark.parametrize("part, num_samples", [("train", 20), ("valid", 4), ("test", 2)])
def test_indices_equal_megatrons(part: str, num_samples: int) -> None:
    lengths = IndexedDataset(str(GOLDEN / "a")).lengths
    golden = golden_arrays()[part]
    begin, end = split_ranges("80,10,10", len(lengths))[("train", "valid", "test").index(part)]
    assert list(range(begin, end)) == golden["indices"].tolist()
    built = build_sample_indices(lengths, golden["indices"].astype(np.int32), 8, num_samples, 1234)
    for ours, theirs in ((built.document, "doc"), (built.sample, "sample"), (built.shuffle, "shuf")):
        assert ours.dtype == golden[theirs].dtype
        np.testing.assert_array_equal(ours, golden[theirs])


def test_first_sample_equals_megatrons() -> None:
    text = (GOLDEN / "gpt_dataset_indices.txt").read_text()
    match = re.search(r"first sample tokens (\[.*?\]) (\[.*?\])", text)
    assert match is not None
    tokens, labels = ast.literal_eval(match[1]), ast.literal_eval(match[2])
    dataset = SampleDataset(IndexedDataset(str(GOLDEN / "a")), 0, 8, 20, 8, 1234)
    assert dataset[0].dtype == np.int64
    assert dataset[0].tolist() == tokens + labels[-1:]
    assert len(dataset) == 22


def test_indices_equal_a_token_loop() -> None:
    rng = np.random.default_rng(0)
    apart = 0
    for case in range(400):
        lengths = rng.integers(0, rng.integers(2, 30), size=rng.integers(1, 12)).tolist()
        seq_length = int(rng.integers(1, 20))
        num_samples = None if case % 5 == 0 else int(rng.integers(1, 60))
        if sum(lengths) <= seq_length:
            continue
        document, rows, shuffle = loop_indices(lengths, seq_length, num_samples, case)
        numbers = np.arange(len(lengths), dtype=np.int32)
        built = build_sample_indices(np.array(lengths, dtype=np.int32), numbers, seq_length, num_samples, case)
        assert built.document.tolist() == document
        assert [tuple(row) for row in built.sample.tolist()] == rows
        assert built.shuffle.tolist() == shuffle
        apart += len(set(document[-len(lengths) :])) == len(lengths) and len(document) > len(lengths)
        stream = [token for number in document for token in numbered(lengths).get(number)]
        for i in range(len(shuffle)):
            begin = shuffle[i] * seq_length
            assert read_sample(numbered(lengths), built, i).tolist() == stream[begin : begin + seq_length + 1]
    assert apart > 20, "the separate last epoch was hardly tried"


@pytest.mark.parametrize(
    "split, count, ranges",
    [
        ("969, 30, 1", 1000, ((0, 969), (969, 999), (999, 1000))),
        ("969,30,1", 1000, ((0, 969), (969, 999), (999, 1000))),
        ("100,0,0", 7, ((0, 7), (7, 7), (7, 7))),
        ("1", 7, ((0, 7), (7, 7), (7, 7))),
        ("0.5/0.5", 5, ((0, 2), (2, 5), (5, 5))),
        ("0,1", 4, ((0, 0), (0, 4), (4, 4))),
        ("1,1,2", 6, ((0, 2), (2, 3), (3, 6))),
    ],
)
def test_split(split: str, count: int, ranges: tuple[tuple[int, int], ...]) -> None:
    assert split_ranges(split, count) == ranges


@pytest.mark.parametrize("split", ["", "abc", "0,0,0", "1,1,1,1", "1.2.3", "80,-10,30"])
def test_split_that_cannot_be_meant(split: str) -> None:
    with pytest.raises(UsageError, match=r"data\.split"):
        split_ranges(split, 10)


def test_empty_split_and_too_few_tokens() -> None:
    with pytest.raises(UserError, match="memory: this split holds none of the file's 2 sequences"):
        SampleDataset(numbered([3, 4]), 2, 2, 5, 2, 0)
    with pytest.raises(UserError, match=r"memory: .* hold 7 tokens, too few .* = 8 tokens"):
        SampleDataset(numbered([3, 4]), 0, 2, 5, 7, 0)
    assert len(SampleDataset(numbered([3, 5]), 0, 2, None, 7, 0)) == 1
    with pytest.raises(UserError, match="no tokens"):
        build_sample_indices(np.zeros(3, np.int32), np.arange(3, dtype=np.int32), 4, 5, 0)


def test_validation_windows_follow_the_text() -> None:
    lengths = [7, 0, 1, 12, 3, 0, 10]
    windows = ValidationSet(numbered(lengths), 0, 7, seq_length=4)
    stream = list(range(33))
    assert read_all(windows) == [stream[4 * i : 4 * i + 5] for i in range(8)]
    part = ValidationSet(numbered(lengths), 3, 6, seq_length=4)
    assert read_all(part) == [stream[8 + 4 * i : 13 + 4 * i] for i in range(3)]


def test_fewer_validation_windows_are_spread_evenly() -> None:
    every = ValidationSet(numbered([1001]), 0, 1, seq_length=10)
    some = ValidationSet(numbered([1001]), 0, 1, seq_length=10, max_samples=8)
    assert len(every) == 100
    starts = [int(some[i][0]) // 10 for i in range(len(some))]
    assert len(starts) == 8
    assert {b - a for a, b in pairwise(starts)} == {12, 13}
    assert len(ValidationSet(numbered([1001]), 0, 1, 10, max_samples=500)) == 100


def cached(folder: Path, cache: Path, seed: int = 7) -> SampleDataset:
    return SampleDataset(IndexedDataset(str(folder / "a")), 0, 10, 40, 8, seed, str(cache))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for suffix in (".idx", ".bin"):
        shutil.copy(GOLDEN / f"a{suffix}", tmp_path / f"a{suffix}")
    return tmp_path


def test_cache_is_read_back(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cached(data, data / "cache")
    monkeypatch.setattr("megabts.data.samples.build_sample_indices", None)
    second = cached(data, data / "cache")
    assert isinstance(second.indices.sample, np.memmap)
    for name, array in vars(first.indices).items():
        np.testing.assert_array_equal(array, getattr(second.indices, name))
    with pytest.raises(TypeError):
        cached(data, data / "cache", seed=8)


def test_cache_key_follows_the_files(data: Path) -> None:
    cached(data, data / "cache")
    os.utime(data / "a.bin", ns=(1, 1))
    cached(data, data / "cache")
    assert len(list((data / "cache").iterdir())) == 2


@pytest.mark.parametrize("name", ["document.npy", "sample.npy", "shuffle.npy", "index.json"])
@pytest.mark.parametrize("damage", ["short", "empty", "flip", "gone"])
def test_damaged_cache_is_built_again(data: Path, name: str, damage: str) -> None:
    want = read_all(cached(data, data / "cache"))
    (folder,) = (data / "cache").iterdir()
    whole = (folder / name).read_bytes()
    flipped = whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
    if damage == "gone":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes({"short": whole[:-5], "empty": b"", "flip": flipped}[damage])
    assert read_all(cached(data, data / "cache")) == want
    assert [file.name for file in (data / "cache").iterdir()] == [folder.name]
    assert (folder / name).read_bytes() == whole


def test_ranks_share_a_damaged_cache(data: Path) -> None:
    want = read_all(cached(data, data / "cache"))
    (folder,) = (data / "cache").iterdir()
    for _ in range(5):
        (folder / "sample.npy").write_bytes(b"short")
        with ThreadPoolExecutor(8) as ranks:
            found = list(ranks.map(lambda _: read_all(cached(data, data / "cache")), range(16)))
        assert found == [want] * 16
        assert [file.name for file in (data / "cache").iterdir()] == [folder.name]


def test_cache_that_cannot_be_written(data: Path) -> None:
    (data / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"data\.cache .*cache cannot be written"):
        cached(data, data / "cache")
