"""The data suite on next to no data: its yardstick does the same work, and the JSON has the promised names."""

import json
from pathlib import Path

import pytest

from megabts.benchmark import data
from megabts.benchmark.data_text import library_encoders, prepare_text, preprocess_by_document
from megabts.benchmark.suite import Settings
from megabts.config.model import ModelConfig
from megabts.config.run import TrainConfig
from megabts.data.preprocess import PreprocessOptions, preprocess
from megabts.errors import UserError
from megabts.runtime.cores import num_cores
from megabts.tokenizers.build import build_tokenizer
from megabts.tokenizers.train import train_tokenizer
from tests.tools import RunTool

TEXTS = [
    f"The {n}th document: words, numbers 1{n}7 and (some) signs.\n\n  Indented {'no ' * n}more." for n in range(300)
]
TINY_MODEL = ModelConfig(vocab_size=8192, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_size=16)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in [*TEXTS, ""]), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece-bpe", "hf-bpe"])
def test_the_loop_over_documents_gives_the_same_dataset(kind: str, corpus: Path, tmp_path: Path) -> None:
    if kind == "bytes":
        tokenizer = build_tokenizer(kind)
    else:
        tokenizer = train_tokenizer(TEXTS, 300, tmp_path / "tokenizer", kind)
    preprocess_by_document(corpus, tokenizer, str(tmp_path / "theirs"))
    preprocess(tokenizer, PreprocessOptions((str(corpus),), str(tmp_path / "ours"), append_eod=True))
    for suffix in ("bin", "idx"):
        ours = (tmp_path / f"ours_text_document.{suffix}").read_bytes()
        assert ours == (tmp_path / f"theirs.{suffix}").read_bytes()
    encode, encode_all = library_encoders(tokenizer)
    assert encode(TEXTS[3]) == tokenizer.encode(TEXTS[3])
    assert len(encode_all(TEXTS)) == len(TEXTS)  # type: ignore[arg-type]


def test_text_is_cut_at_the_size_and_a_tokenizer_is_trained_on_it(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megabts.benchmark.data_text._VOCAB_SIZE", 300)
    folder = tmp_path / "work"
    folder.mkdir()
    text = prepare_text(Settings(data=corpus, scale=20_000 / 30e6), folder)
    assert 20_000 <= text.num_bytes == text.path.stat().st_size < 21_000
    assert corpus.read_bytes().startswith(text.path.read_bytes())
    assert text.tokenizer.vocab_size == 300
    assert build_tokenizer(text.spec).fingerprint == text.tokenizer.fingerprint


def test_json_of_a_small_run(run_tool: RunTool, corpus: Path, tmp_path: Path) -> None:
    results: dict[str, float] = {}
    for name in ("preprocess", "indexing"):
        out = tmp_path / f"{name}.json"
        flags = ["--only", name, "--data", corpus, "--tokenizer", "bytes", "--scale", 1e-4, "--busy", "--json", out]
        code, table, _ = run_tool("benchmark.py", "--suite", "data", *flags)
        assert "SCALE 0.0001" in table
        written = json.loads(out.read_text())
        assert set(written) == {"data", "scale", "machine", "idle"}
        assert len(written["idle"]["cores_used_by_others"]) == 2
        assert code == 0  # at this scale no line counts
        results |= written["data"]
    for row in ("preprocess_vs_per_document", "preprocess_vs_bare_tokenizer"):
        assert {row, f"{row}_spread", f"{row}_ours", f"{row}_yardstick"} <= results.keys()
    # so little text that the tool mostly starts
    assert 0 < results["preprocess_vs_per_document"] < 1 < results["preprocess_vs_bare_tokenizer"]
    assert 0 < results["indexing_seconds"] < 30


def test_a_gigabyte_is_compared_by_its_rate() -> None:
    seconds = {"tool": [100.0, 50.0], "per document": [8.0, 10.0], "bare tokenizer": [2.0, 1.0]}
    per_core, documents, bare = data._preprocess_rows("preprocess_1gb", 20_000_000, 50, seconds)
    assert per_core.value.median == pytest.approx((10 + 20) / 2 / num_cores())
    assert (documents.name, documents.value.median) == ("preprocess_1gb_vs_per_document", (4 + 10) / 2)
    assert documents.ours
    assert documents.yardstick
    assert (documents.ours.median, documents.yardstick.median) == (15.0, (2.5 + 2) / 2)
    assert (bare.name, bare.value.median) == ("preprocess_1gb_vs_bare_tokenizer", 1.0)


def test_loading_is_compared_with_a_step() -> None:
    (row,) = data.loader(
        Settings(scale=0.1), TINY_MODEL, TrainConfig(steps=100, micro_batch=2, global_batch=4), length=16
    )
    assert row.name == "loader_share_of_step"
    assert row.ours
    assert row.yardstick
    assert 0 < row.ours.median < row.yardstick.median
    assert row.value.median == pytest.approx(row.ours.median / row.yardstick.median, rel=0.5)


def test_too_little_disk_is_one_line(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 10_000})
    monkeypatch.setattr("megabts.benchmark.data.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match=r"has 0.0 GB free, 0.2 are needed; set TMPDIR"):
        data.preprocess_gigabyte(Settings(data=corpus, tokenizer="bytes", scale=0.1))


def test_bad_text_is_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"no text": 1}\n')
    with pytest.raises(UserError, match=r'text.jsonl:2: not a JSON object with text in "text"'):
        data.preprocess(Settings(data=broken, tokenizer="bytes"))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(UserError, match=r"empty.jsonl: the file is empty; give JSON lines with text"):
        data.preprocess(Settings(data=empty, tokenizer="bytes"))
