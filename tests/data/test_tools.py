"""The data tools as people call them: exit codes, one-line errors, and what they print."""

import gzip
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megabts.data.indexed import IndexedDataset
from megabts.data.merge import merge_datasets
from megabts.data.sampling import sample_texts
from megabts.data.sidecar import require_same_tokenizer
from megabts.errors import UserError
from megabts.tokenizers.build import build_tokenizer

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"


def call(tool: str, *arguments: object, stdin: bytes = b"", code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a tool; a failure must be one line on stderr, without traceback."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)],
        input=stdin,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    result = subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    if code == 1:
        assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1
    return result


TOOLS = ("preprocess_data.py", "merge_datasets.py", "inspect_dataset.py", "train_tokenizer.py")


@pytest.mark.parametrize("tool", TOOLS)
def test_help_is_quick(tool: str) -> None:
    """No heavy library is imported for --help; the time allows for a busy machine."""
    code = (
        f"import runpy, sys; sys.argv = ['{tool}', '--help']\n"
        f"try: runpy.run_path(r'{ROOT / 'tools' / tool}', run_name='__main__')\n"
        "except SystemExit: print('HEAVY', {'torch', 'numpy', 'sentencepiece', 'tokenizers'} & set(sys.modules))"
    )
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert time.perf_counter() - start < 3
    assert "usage:" in done.stdout
    assert "HEAVY set()" in done.stdout


def test_megatrons_command_line_gives_megatrons_bytes(tmp_path: Path) -> None:
    flags = "--tokenizer-type NullTokenizer --vocab-size 100 --append-eod --workers 1 --partitions 2 --json-keys text"
    more = "--keep-sequential-samples --log-interval 1"
    out = tmp_path / "new" / "folder" / "mg"
    done = call(
        "preprocess_data.py", "--input", GOLDEN / "ids.jsonl", "--output-prefix", out, *flags.split(), *more.split()
    )
    for suffix in ("bin", "idx"):
        written = Path(f"{out}_text_document.{suffix}").read_bytes()
        assert written == (GOLDEN / f"mg_text_document.{suffix}").read_bytes()
    assert "Processed 3 documents (" in done.stderr
    assert "12 tokens" in done.stdout


def test_standard_input_and_bad_lines(tmp_path: Path) -> None:
    arguments = ("--input", "-", "--output-prefix", tmp_path / "o", "--tokenizer", "bytes", "--workers", 1)
    lines = b'{"text": "a"}\n{"text": 1}\n{"text": "b"}\n'
    start = time.perf_counter()
    done = call("preprocess_data.py", *arguments, stdin=lines, code=1)
    assert time.perf_counter() - start < 10
    assert done.stderr.startswith('error: <stdin>:2: the value of "text" is not text but a number; ')
    assert list(tmp_path.iterdir()) == []
    done = call("preprocess_data.py", *arguments, "--on-bad-line", "skip", stdin=lines)
    assert "2 documents, 1 bad lines left out" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "o_rejects.jsonl",
        "o_text_document.bin",
        "o_text_document.idx",
        "o_text_document.json",
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--split-sentences", "--tokenizer", "bytes"], "--split-sentences is not supported: "),
        (["--find-optimal-num-workers", "--tokenizer", "bytes"], "--find-optimal-num-workers is not supported"),
        (["--trust-remote-code", "--tokenizer", "bytes"], "no code of a model folder is ever run"),
        (["--tokenizer-type", "TikTokenizer"], "TikTokenizer is not supported"),
        ([], "give either --tokenizer or --tokenizer-type"),
        (["--tokenizer", "bytes", "--workers", "0"], "--workers 0: at least 1"),
        (["--tokenizer", "bytes", "--nonsense"], "unknown flag --nonsense"),
    ],
)
def test_wrong_usage_is_exit_code_2(flags: list[str], message: str, tmp_path: Path) -> None:
    done = call("preprocess_data.py", "--input", "x", "--output-prefix", tmp_path / "o", *flags, code=2)
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def preprocess(folder: Path, name: str, texts: list[str], spec: str = "bytes", *flags: str) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    arguments = ("--input", "-", "--output-prefix", folder / name, "--tokenizer", spec, "--workers", 1, *flags)
    call("preprocess_data.py", *arguments, stdin=lines)


def test_merging_equals_preprocessing_all_at_once(tmp_path: Path) -> None:
    texts = [["one", "", "two"], ["three"], ["", "four"]]
    parts = tmp_path / "parts"
    for number, part in enumerate(texts):
        preprocess(parts, f"p{number}", part)
    done = call("merge_datasets.py", "--input", parts, "--output-prefix", tmp_path / "merged")
    assert "3 datasets, 6 documents, 15 tokens" in done.stdout
    preprocess(tmp_path, "whole", [text for part in texts for text in part])
    for suffix in ("bin", "idx", "json"):
        merged = (tmp_path / f"merged.{suffix}").read_bytes()
        assert merged == (tmp_path / f"whole_text_document.{suffix}").read_bytes()


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    preprocess(tmp_path, "a", ["1 2"])
    merge = ("merge_datasets.py", "--input", tmp_path, "--output-prefix")
    inside = call(*merge, tmp_path / "a_text_document", code=1)
    assert "is one of the inputs" in inside.stderr
    preprocess(tmp_path, "b", ["1 2"], "null:100")
    assert "were not tokenized the same way (tokenizer_fingerprint" in call(*merge, tmp_path / "x", code=1).stderr
    for prefix in ("a", "b"):
        (tmp_path / f"{prefix}_text_document.json").unlink()
    assert "no sidecar" in call(*merge, tmp_path / "m" / "x").stdout
    preprocess(tmp_path, "c", ["1 2"], "null:70000")
    assert "stores int32" in call(*merge, tmp_path / "y", code=1).stderr
    (tmp_path / "c_text_document.bin").unlink()
    assert "c_text_document.idx has no" in call(*merge, tmp_path / "y", code=1).stderr
    assert "there is no folder" in call("merge_datasets.py", "--input", "no", "--output-prefix", "y", code=1).stderr
    preprocess(tmp_path, "d", ["1 2"])
    (tmp_path / "d_text_document.json").write_text('{"tokens": 99}')
    with pytest.raises(UserError, match="speaks of"):
        merge_datasets([str(tmp_path / "d_text_document")], str(tmp_path / "z"))


def test_inspecting_and_verifying(tmp_path: Path) -> None:
    preprocess(tmp_path, "i", ["hello\nworld", "", "x" * 1000], "bytes", "--append-eod")
    prefix = tmp_path / "i_text_document"
    done = call("inspect_dataset.py", f"{prefix}.idx", "--documents", 5, "--tokenizer", "bytes", "--verify")
    assert "3 documents, 2 sequences, 1013 tokens" in done.stdout
    assert "text_bytes: 1011" in done.stdout
    assert r"'hello\nworld'" in done.stdout
    assert "document 1: 0 sequences, 0 tokens" in done.stdout
    assert "inside the vocabulary of 257" in done.stdout
    assert "104 101 108" in call("inspect_dataset.py", prefix, "--documents", 1).stdout
    other = call("inspect_dataset.py", prefix, "--documents", 1, "--tokenizer", "null:500", code=1)
    assert "was tokenized with bytes (sha " in other.stderr
    damaged = bytearray(Path(f"{prefix}.bin").read_bytes())
    damaged[1] = 0x40
    Path(f"{prefix}.bin").write_bytes(damaged)
    assert "outside the vocabulary of 257" in call("inspect_dataset.py", prefix, "--verify", code=1).stderr
    Path(f"{prefix}.bin").write_bytes(damaged[:-10])
    assert "(10 missing)" in call("inspect_dataset.py", prefix, code=1).stderr


def test_a_dataset_of_megatron_can_be_inspected() -> None:
    done = call("inspect_dataset.py", GOLDEN / "mg_text_document", "--verify", "--vocab-size", 100, "--documents", 2)
    assert "sidecar    none" in done.stdout
    assert "4 99" in done.stdout
    assert "99, outside" in call("inspect_dataset.py", GOLDEN / "a", "--verify", "--vocab-size", 99, code=1).stderr


def test_same_tokenizer_is_required() -> None:
    data = IndexedDataset(GOLDEN / "a")
    require_same_tokenizer(data.prefix, data.sidecar, build_tokenizer("bytes"))  # nothing known, nothing refused
    known = {"tokenizer": "A", "tokenizer_fingerprint": "12ab" * 16}
    with pytest.raises(UserError, match=r"p was tokenized with A \(sha 12ab12ab\.\.\), the model expects bytes \(sha "):
        require_same_tokenizer("p", known, build_tokenizer("bytes"))


def test_training_a_tokenizer(tmp_path: Path) -> None:
    words = ["some", "words", "of", "text", "that", "repeat", "in", "many", "ways", "and", "make", "pieces"]
    texts = [f"{a} {b}\n    {b}{a} {i}" for i, a in enumerate(words) for b in words]
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    with gzip.open(corpus / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    (corpus / "b.txt").write_text("\n".join(texts))
    for kind, output in (("sentencepiece-bpe", "t.model"), ("hf-bpe", "folder")):
        arguments = (
            "--input",
            corpus,
            "--vocab-size",
            320,
            "--type",
            kind,
            "--bytes-per-file",
            20_000,
            "--threads",
            1,
        )
        done = call("train_tokenizer.py", *arguments, "--output", tmp_path / output)
        assert "320 tokens, " in done.stdout
        tokenizer = build_tokenizer(tmp_path / output)
        assert tokenizer.decode(tokenizer.encode(texts[5])) == texts[5]
        first = tokenizer.fingerprint
        call("train_tokenizer.py", *arguments, "--output", tmp_path / output)
        assert build_tokenizer(tmp_path / output).fingerprint == first
    too_large = call("train_tokenizer.py", "--input", corpus, "--vocab-size", 9999, "--output", tmp_path / "x", code=1)
    assert "--vocab-size 9999 is too large for this text: at most" in too_large.stderr


def test_samples_are_even_and_within_the_budget(tmp_path: Path) -> None:
    for name, length in (("small", 3), ("large", 90)):
        records = [{"text": f"{name[0]}{i:04d}" + "é" * length} for i in range(500)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    texts = list(sample_texts([str(tmp_path)], bytes_per_file=3000))
    for letter in "sl":
        mine = [text for text in texts if text[0] == letter]
        assert 2500 < sum(len(text.encode()) for text in mine) <= 3000
        places = [int(text[1:5]) for text in mine]
        assert places[0] == 0
        assert places[-1] > 400
        assert max(b - a for a, b in itertools.pairwise(places)) < 60
    assert len(list(sample_texts([str(tmp_path)]))) == 1000
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"t": 1}\n')
    with pytest.raises(UserError, match=r"bad.jsonl:2: not a JSON object with text"):
        list(sample_texts([str(tmp_path / "bad.jsonl")]))
    with pytest.raises(UserError, match="standard input"):
        list(sample_texts(["-"]))


def test_a_bad_line_is_not_blamed_on_the_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "one two"}\n[]\n')
    shown = call(
        "train_tokenizer.py", "--input", str(tmp_path / "bad.jsonl"), "--vocab-size", "300",
        "--output", str(tmp_path / "tok"), code=1,
    )  # fmt: skip
    assert shown.stderr.startswith("error: ")
    assert "bad.jsonl:2: " in shown.stderr
    assert "vocab-size" not in shown.stderr
    assert shown.stderr.count("\n") == 1


def test_a_misspelt_flag_gets_one_line_with_the_nearest(tmp_path: Path) -> None:
    shown = call("preprocess_data.py", "--tokeniser", "bytes", "--input", "x", "--output-prefix", "y", code=2)
    assert shown.stderr == "error: unknown flag --tokeniser; did you mean --tokenizer?\n"
    assert "unknown flag --doc" in call("inspect_dataset.py", "prefix", "--doc", "3", code=2).stderr  # no abbreviations
