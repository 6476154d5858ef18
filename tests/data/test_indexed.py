"""The indexed format: equal to Megatron-LM's files and an independent writer; every structural damage found."""

import copy
import pickle
import random
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabts.data.index_file import optimal_dtype
from megabts.data.indexed import IndexedDataset, IndexedDatasetBuilder
from megabts.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
Corpus = list[list[list[int]]]  # documents of sequences of tokens


def files_by_struct(corpus: Corpus, code: int) -> tuple[bytes, bytes]:
    """.bin and .idx written value by value from the description of the format."""
    letter, size = {8: ("H", 2), 4: ("i", 4)}[code]
    sequences = [sequence for document in corpus for sequence in document]
    tokens = b"".join(struct.pack("<" + letter, token) for sequence in sequences for token in sequence)
    index = b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, code) + struct.pack("<QQ", len(sequences), len(corpus) + 1)
    index += b"".join(struct.pack("<i", len(sequence)) for sequence in sequences)
    offset = 0
    for sequence in sequences:
        index += struct.pack("<q", offset)
        offset += size * len(sequence)
    index += struct.pack("<q", 0)
    count = 0
    for document in corpus:
        count += len(document)
        index += struct.pack("<q", count)
    return tokens, index


def write(corpus: Corpus, prefix: Path, dtype: object) -> None:
    with IndexedDatasetBuilder(prefix, dtype) as builder:
        for document in corpus:
            for sequence in document:
                builder.add_item(sequence)
            builder.end_document()
        builder.finalize()


def contents(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


CORPORA = st.lists(st.lists(st.lists(st.integers(0, 65535), max_size=6), max_size=3), max_size=8)


@pytest.mark.parametrize("name", ["mg_text_document", "a"])
def test_rewriting_a_megatron_dataset_gives_its_bytes(name: str, tmp_path: Path) -> None:
    source = IndexedDataset(GOLDEN / name)
    with IndexedDatasetBuilder(tmp_path / "copy", source.dtype) as builder:
        for index in range(len(source)):
            builder.add_item(source.get(index))
            builder.end_document()
        builder.finalize()
    assert contents(tmp_path / "copy") == contents(GOLDEN / name)


def test_golden_arrays() -> None:
    dataset = IndexedDataset(GOLDEN / "mg_text_document")
    assert dataset.dtype == np.uint16
    assert len(dataset) == 3
    assert dataset.num_tokens == 12
    assert dataset.sidecar == {}
    assert dataset.lengths.dtype == np.int32
    assert dataset.lengths.tolist() == [4, 2, 6]
    assert dataset.pointers.dtype == np.int64
    assert dataset.pointers.tolist() == [0, 8, 12]
    assert dataset.document_indices.dtype == np.int64
    assert dataset.document_indices.tolist() == [0, 1, 2, 3]
    assert dataset.get(2).tolist() == [5, 6, 7, 8, 9, 99]
    assert dataset.get(2, 1, 3).tolist() == [6, 7, 8]
    assert dataset.get(2, 6).tolist() == []
    assert dataset.max_token() == 99


@settings(max_examples=100, deadline=None)
@given(CORPORA, st.sampled_from([8, 4]))
def test_equal_to_an_independent_writer(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus, code: int) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    dtype = {8: np.uint16, 4: np.int32}[code]
    write(corpus, folder / "items", dtype)
    assert contents(folder / "items") == files_by_struct(corpus, code)
    with IndexedDatasetBuilder(folder / "batch", dtype) as builder:
        flat = [sequence for document in corpus for sequence in document]
        tokens = np.array([token for sequence in flat for token in sequence], dtype)
        builder.add_documents(tokens, [len(sequence) for sequence in flat], [len(document) for document in corpus])
        builder.finalize()
    assert contents(folder / "batch") == contents(folder / "items")
    dataset = IndexedDataset(folder / "items")
    assert [dataset.get(i).tolist() for i in range(len(dataset))] == flat
    assert dataset.token_range() == ((min(tokens), max(tokens)) if len(tokens) else (0, -1))


@settings(max_examples=30, deadline=None)
@given(st.lists(CORPORA, min_size=1, max_size=3))
def test_add_index_equals_writing_all_at_once(tmp_path_factory: pytest.TempPathFactory, parts: list[Corpus]) -> None:
    folder = tmp_path_factory.mktemp("merge")
    for number, part in enumerate(parts):
        write(part, folder / f"part{number}", np.uint16)
    with IndexedDatasetBuilder(folder / "merged", np.uint16) as builder:
        for number in range(len(parts)):
            builder.add_index(folder / f"part{number}")
        builder.finalize()
    assert contents(folder / "merged") == files_by_struct([document for part in parts for document in part], 8)


def test_dtype_limit_is_megatrons() -> None:
    assert [str(optimal_dtype(size)) for size in (2, 65499, 65500, 65536, 200000)] == ["uint16"] * 2 + ["int32"] * 3


def test_reading_outside_is_refused() -> None:
    dataset = IndexedDataset(GOLDEN / "mg_text_document")
    for index in (-1, 3):
        with pytest.raises(IndexError, match="3 sequences"):
            dataset.get(index)
    for offset, length in ((-1, 1), (0, 5), (5, None), (2, -1)):
        with pytest.raises(ValueError, match="has 4 tokens"):
            dataset.get(0, offset, length)
    with pytest.raises(ValueError, match="read-only"):
        dataset.get(0)[0] = 1


def test_a_pickled_dataset_opens_the_files_again(tmp_path: Path) -> None:
    write([[list(range(1000))]], tmp_path / "d", np.uint16)
    dataset = IndexedDataset(tmp_path / "d.idx")
    assert len(pickle.dumps(dataset)) < 300
    assert copy.copy(dataset).get(0).tolist() == list(range(1000))


def test_tokens_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "d", np.uint16) as builder:
        for tokens in (np.array([65536]), np.array([-1]), np.array([1.5])):
            with pytest.raises(ValueError, match="do not fit"):
                builder.add_item(tokens)
        with pytest.raises(ValueError, match="do not match"):
            builder.add_document([1, 2, 3], [1, 1])
        with pytest.raises(ValueError, match="documents of 2"):
            builder.add_documents([1, 2, 3], [3], [2])
        builder.add_item([1])
        with pytest.raises(ValueError, match="end_document"):
            builder.finalize()
    with pytest.raises(UserError, match="cannot be stored as float32"):
        IndexedDatasetBuilder(tmp_path / "d", np.float32)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_or_changed_without_finalize(tmp_path: Path) -> None:
    write([[[1, 2]]], tmp_path / "d", np.uint16)
    before = contents(tmp_path / "d")
    with IndexedDatasetBuilder(tmp_path / "d", np.uint16) as builder:
        builder.add_document([3, 4], [2])
    assert contents(tmp_path / "d") == before
    assert len(list(tmp_path.iterdir())) == 2


def test_replacing_a_dataset_removes_its_old_sidecar(tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "d", np.uint16) as builder:
        builder.finalize({"tokenizer": "old", "sequences": 0, "tokens": 0})
    assert IndexedDataset(tmp_path / "d").sidecar["tokenizer"] == "old"
    write([[[1]]], tmp_path / "d", np.uint16)
    assert IndexedDataset(tmp_path / "d").sidecar == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "as JSON"), (b"[]", "not a JSON object"), (b"\xff", "as JSON"), (b'{"tokens": 11}', "11 tokens.*has 12")],
)
def test_a_sidecar_of_something_else_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    for suffix in ("bin", "idx"):
        (tmp_path / f"d.{suffix}").write_bytes((GOLDEN / f"mg_text_document.{suffix}").read_bytes())
    (tmp_path / "d.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        IndexedDataset(tmp_path / "d")


def damage_cases() -> dict[str, tuple[str, bytes]]:
    """Name -> (file, damaged content), for golden dataset `a` (10 sequences, 11 document marks)."""
    index, tokens = (GOLDEN / "a.idx").read_bytes(), (GOLDEN / "a.bin").read_bytes()
    lengths, pointers, marks = 34, 34 + 40, 34 + 120

    def put(offset: int, code: str, value: int) -> tuple[str, bytes]:
        packed = struct.pack("<" + code, value)
        return "idx", index[:offset] + packed + index[offset + len(packed) :]

    cuts = (0, 1, 8, 9, 16, 17, 18, 26, 33, 34, 36, 50, pointers, pointers + 4, 100, marks, marks + 7, len(index) - 1)
    cases = {f"idx cut to {cut}": ("idx", index[:cut]) for cut in cuts}
    cases |= {f"bin short by {n}": ("bin", tokens[:-n]) for n in range(1, 11)}
    cases |= {f"bin long by {n}": ("bin", tokens + bytes(n)) for n in (1, 2, 10)}
    cases |= {f"dtype {code}": put(17, "B", code) for code in (0, 1, 4, 5, 6, 7, 9, 255)}
    cases |= {f"sequences {n}": put(18, "Q", n) for n in (0, 9, 11, 1 << 63)}
    cases |= {f"documents {n}": put(26, "Q", n) for n in (0, 10, 12, (1 << 64) - 1)}
    cases |= {f"version {n}": put(9, "Q", n) for n in (0, 2)}
    return cases | {
        "bin empty": ("bin", b""),
        "idx long by 1": ("idx", index + b"\0"),
        "multimodal": ("idx", index + bytes(10)),
        "magic": ("idx", b"X" + index[1:]),
        "length negative": put(lengths, "i", -7),
        "length one more": put(lengths, "i", 8),
        "length huge": put(lengths + 36, "i", 2**31 - 1),
        "last length one less": put(lengths + 36, "i", 11),
        "pointers decreasing": put(pointers + 40, "q", 2),
        "first pointer": put(pointers, "q", 2),
        "pointer negative": put(pointers + 8, "q", -(2**63)),
        "first mark": put(marks, "q", 1),
        "last mark": put(marks + 80, "q", 9),
        "mark beyond": put(marks + 40, "q", 99),
        "mark negative": put(marks + 40, "q", -5),
    }


@pytest.mark.parametrize("case", damage_cases())
def test_structural_damage_is_found_at_open(case: str, tmp_path: Path) -> None:
    for suffix in ("bin", "idx"):
        (tmp_path / f"d.{suffix}").write_bytes((GOLDEN / f"a.{suffix}").read_bytes())
    suffix, content = damage_cases()[case]
    (tmp_path / f"d.{suffix}").write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(UserError) as raised:
        IndexedDataset(tmp_path / "d")
    assert time.perf_counter() - start < 1
    message = str(raised.value)
    assert str(tmp_path / "d.") in message
    assert "\n" not in message


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file .*d\.idx"):
        IndexedDataset(tmp_path / "d")
    (tmp_path / "d.idx").write_bytes((GOLDEN / "a.idx").read_bytes())
    with pytest.raises(UserError, match=r"there is no file .*d\.bin"):
        IndexedDataset(tmp_path / "d")


def test_flipped_bits_of_an_index_never_crash(tmp_path: Path) -> None:
    """A flip is reported, or it moved an inner document mark without breaking the order: nothing else can pass."""
    index = (GOLDEN / "a.idx").read_bytes()
    (tmp_path / "d.bin").write_bytes((GOLDEN / "a.bin").read_bytes())
    generator = random.Random(0)
    silent = 0
    for _ in range(400):
        bit = generator.randrange(8 * len(index))
        damaged = bytearray(index)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "d.idx").write_bytes(damaged)
        start = time.perf_counter()
        try:
            dataset = IndexedDataset(tmp_path / "d")
        except UserError:
            assert time.perf_counter() - start < 1
            continue
        silent += 1
        moved = dataset.document_indices.tolist()
        assert moved != list(range(11))
        assert moved == sorted(moved)
        assert dataset.num_tokens == 59
        if bit // 8 == 17:  # uint16 read as int16: the only other flip that keeps all sizes
            pytest.fail("a changed token type went unseen")
    assert silent < 30
