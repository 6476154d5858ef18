"""Datasets from a data section: blends, validation domains, what must agree, and the identity of the order."""

import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megabts.config.run import DataConfig
from megabts.data.blend import BlendedDataset
from megabts.data.build import build_train_dataset, build_valid_datasets, data_hash, data_identity
from megabts.data.indexed import IndexedDataset, IndexedDatasetBuilder
from megabts.data.samples import SampleDataset
from megabts.errors import UsageError, UserError
from megabts.tokenizers.protocol import Tokenizer
from megabts.tokenizers.simple import NullTokenizer

SEQ = 16


def write(prefix: Path, base: int, documents: int = 30, tokenizer: str | None = "tok", vocab_size: int = 500) -> str:
    """A dataset of `documents` x 20 tokens between `base` and `base` + 99."""
    prefix.parent.mkdir(exist_ok=True)
    rng = np.random.default_rng(base)
    with IndexedDatasetBuilder(prefix, np.uint16) as builder:
        for _ in range(documents):
            builder.add_document(rng.integers(base, base + 100, 20).astype(np.uint16), [20])
        sidecar: dict[str, object] = {"tokenizer": tokenizer, "vocab_size": vocab_size, "eod_id": 0}
        if tokenizer is not None:
            sidecar["tokenizer_fingerprint"] = hashlib.sha256(tokenizer.encode()).hexdigest()
        builder.finalize(sidecar | {"text_bytes": documents * 70, "tokens": documents * 20} if tokenizer else None)
    return str(prefix)


@pytest.fixture
def three(tmp_path: Path) -> dict[str, float]:
    return {write(tmp_path / name, base): w for name, base, w in [("a", 0, 5), ("b", 100, 3), ("c", 200, 2)]}


def test_blend_of_several(three: dict[str, float]) -> None:
    blend = build_train_dataset(DataConfig(train=three, seq_length=SEQ), 200)
    assert isinstance(blend, BlendedDataset)
    assert len(blend) == 200
    origins = [int(blend[i][0]) // 100 for i in range(200)]
    assert np.bincount(origins).tolist() == [100, 60, 40]
    assert [os.path.basename(blend.source(i)) for i in range(200)] == ["abc"[origin] for origin in origins]
    assert all(blend[i].shape == (SEQ + 1,) for i in range(200))
    # 1 + 0.5 % more samples than its share, as Megatron builds them: ceil(100 * 1.005) and so on.
    expected = [SampleDataset(IndexedDataset(p), 0, 30, n, SEQ, 1234) for p, n in zip(three, [101, 61, 41])]
    for own, other in zip(blend.datasets, expected):
        assert [own[i].tolist() for i in range(len(own))] == [other[i].tolist() for i in range(len(other))]


def test_one_dataset_is_not_blended(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", 0)
    single = build_train_dataset(DataConfig(train={prefix + ".bin": 7.0}, seq_length=SEQ), 50)
    assert isinstance(single, SampleDataset)
    same = build_train_dataset(DataConfig(train={prefix: 7.0, str(tmp_path / "off"): 0.0}, seq_length=SEQ), 50)
    assert [single[i].tolist() for i in range(50)] == [same[i].tolist() for i in range(50)]


@pytest.mark.parametrize("num_samples", [1, 2, 3, 7, 50, 1000])
def test_uneven_weights_never_draw_too_much(tmp_path: Path, num_samples: int) -> None:
    weights = [1e-6, 3.7, 0.01, 11.1, 5e-3]
    train = {write(tmp_path / f"d{i}", 10 * i): weight for i, weight in enumerate(weights)}
    assert len(build_train_dataset(DataConfig(train=train, seq_length=SEQ), num_samples)) == num_samples


def test_validation_domains(three: dict[str, float], tmp_path: Path) -> None:
    valid = {"math": write(tmp_path / "m", 300), "code": write(tmp_path / "k", 400, tokenizer=None)}
    sets = build_valid_datasets(DataConfig(train=three, valid=valid, seq_length=SEQ), 10)
    assert list(sets) == ["math", "code"]
    assert [len(one) for one in sets.values()] == [10, 10]
    assert sets["math"].bytes_per_token == 3.5
    assert sets["code"].bytes_per_token is None
    whole = IndexedDataset(valid["math"])
    first = np.concatenate([whole.get(0), whole.get(1)])[: SEQ + 1]
    assert sets["math"][0].tolist() == first.tolist()


def test_validation_from_the_split(three: dict[str, float]) -> None:
    config = DataConfig(train=three, split="80,20,0", seq_length=SEQ)
    sets = build_valid_datasets(config, None)
    assert list(sets) == ["a", "b", "c"]
    # 6 documents of 20 tokens: 119 // 16 windows, the first at the first token of document 24.
    assert [len(one) for one in sets.values()] == [7, 7, 7]
    assert sets["b"][0].tolist()[:16] == IndexedDataset(list(three)[1]).get(24).tolist()[:16]
    assert build_valid_datasets(replace(config, split="100,0,0"), None) == {}


def test_two_training_datasets_of_one_name(tmp_path: Path) -> None:
    train = {write(tmp_path / "x" / "text", 0): 1.0, write(tmp_path / "y" / "text", 0): 1.0}
    with pytest.raises(UsageError, match=r"both named text; name them in data\.valid"):
        build_valid_datasets(DataConfig(train=train, split="90,10", seq_length=SEQ), None)


def test_tokenizers_must_agree(three: dict[str, float], tmp_path: Path) -> None:
    other = write(tmp_path / "other", 0, tokenizer="tok2")
    sha, sha2 = (hashlib.sha256(name.encode()).hexdigest()[:8] for name in ("tok", "tok2"))
    between = rf"other was tokenized with tok2 \(sha {sha2}\.\.\), .*a with tok \(sha {sha}\.\.\)"
    with pytest.raises(UserError, match=between):
        build_train_dataset(DataConfig(train={**three, other: 1.0}, seq_length=SEQ), 10)
    with pytest.raises(UserError, match=between):
        build_valid_datasets(DataConfig(train=three, valid={"d": other}, seq_length=SEQ), 10)
    model: Tokenizer = NullTokenizer(500)
    with pytest.raises(UserError, match=rf"a was tokenized with tok \(sha {sha}\.\.\), the model expects .*null"):
        build_train_dataset(DataConfig(train=three, seq_length=SEQ), 10, tokenizer=model)
    unknown = write(tmp_path / "unknown", 0, tokenizer=None)
    build_train_dataset(DataConfig(train={unknown: 1.0, other: 1.0}, seq_length=SEQ), 10)


def test_vocabulary_must_suffice(three: dict[str, float], tmp_path: Path) -> None:
    config = DataConfig(train=three, seq_length=SEQ)
    build_train_dataset(config, 10, vocab_size=500)
    with pytest.raises(UserError, match=r"a: data was tokenized with a vocabulary of 500, model\.vocab_size is 499"):
        build_train_dataset(config, 10, vocab_size=499)
    bare = write(tmp_path / "bare", 0, tokenizer=None)
    largest = IndexedDataset(bare).max_token()
    for cache in ("", str(tmp_path / "cache"), str(tmp_path / "cache")):
        config = DataConfig(train={bare: 1.0}, seq_length=SEQ, cache=cache)
        build_train_dataset(config, 10, vocab_size=largest + 1)
        with pytest.raises(UserError, match=rf"bare: data holds token {largest}, model\.vocab_size is {largest}"):
            build_train_dataset(config, 10, vocab_size=largest)


def test_scan_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(
        train={write(tmp_path / "a", 0, tokenizer=None): 1.0}, seq_length=SEQ, cache=str(tmp_path / "c")
    )
    build_train_dataset(config, 10, vocab_size=100)
    monkeypatch.setattr(IndexedDataset, "max_token", None)
    build_train_dataset(config, 10, vocab_size=100)


def test_refusals(three: dict[str, float], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data\.train is empty"):
        build_train_dataset(DataConfig(), 10)
    with pytest.raises(UserError, match="gone"):
        build_train_dataset(DataConfig(train={str(tmp_path / "gone"): 1.0}), 10)
    with pytest.raises(UsageError, match="weights"):
        build_train_dataset(DataConfig(train=dict.fromkeys(three, 0.0)), 10)
    with pytest.raises(UserError, match=r"a: .* hold 600 tokens, too few for one sample"):
        build_train_dataset(DataConfig(train=three, seq_length=600), 10)
    with pytest.raises(UserError, match=r"a: this split holds none of the file's 30 sequences"):
        build_train_dataset(DataConfig(train=three, split="0,1,0", seq_length=SEQ), 10)
    with pytest.raises(UserError, match="a twice"):
        build_train_dataset(DataConfig(train={f"{next(iter(three))}{end}": 1.0 for end in (".bin", "")}), 10)


def test_hash_follows_what_fixes_the_order(three: dict[str, float], tmp_path: Path) -> None:
    config = DataConfig(train=three, seq_length=SEQ)
    want = data_hash(config, 60)
    first = next(iter(three))
    assert data_hash(config, 60) == want
    assert data_hash(replace(config, valid={"d": first}, cache="elsewhere"), 60) == want
    doubled = {prefix: 2 * weight for prefix, weight in three.items()}
    assert data_hash(replace(config, train=doubled), 60) == want
    changes = [
        replace(config, seed=1),
        replace(config, seq_length=SEQ - 1),
        replace(config, split="90,10,0"),
        replace(config, train={**three, first: 6.0}),
        replace(config, train=dict(reversed(three.items()))),
    ]
    assert len({data_hash(change, 60) for change in changes} | {want}) == 6
    os.utime(first + ".bin", ns=(1, 1))
    assert data_hash(config, 60) != want


def test_hash_follows_length_only_through_epochs(tmp_path: Path) -> None:
    config = DataConfig(train={write(tmp_path / "a", 0): 1.0}, seq_length=SEQ)
    orders: dict[str, list[list[int]]] = {}
    for num_samples in (20, 30, 37, 38, 45, 70, 74, 75):
        dataset = build_train_dataset(config, num_samples)
        order = [dataset[i].tolist() for i in range(20)]
        assert orders.setdefault(data_hash(config, num_samples), order) == order
    assert data_hash(config, 20) == data_hash(config, 37)
    assert len(orders) == len({str(order) for order in orders.values()}) >= 3


def test_moved_data_keeps_its_hash(tmp_path: Path) -> None:
    here = write(tmp_path / "a", 0)
    (tmp_path / "there").mkdir()
    for suffix in (".bin", ".idx"):
        shutil.copy2(here + suffix, tmp_path / "there" / f"a{suffix}")
    there = str(tmp_path / "there" / "a")
    one, two = (data_identity(DataConfig(train={prefix: 1.0}, seq_length=SEQ), 20) for prefix in (here, there))
    assert one == two
