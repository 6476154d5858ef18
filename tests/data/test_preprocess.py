"""Preprocessing: the same bytes for any number of workers, bad input named, nothing left behind when it stops."""

import gzip
import itertools
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from megabts.data.encode import Encoder
from megabts.data.indexed import IndexedDataset
from megabts.data.ordered_map import ordered_map
from megabts.data.preprocess import PreprocessOptions, PreprocessReport, preprocess
from megabts.data.readers import LineBatch
from megabts.errors import UsageError, UserError
from megabts.tokenizers.build import build_tokenizer
from megabts.tokenizers.train import train_tokenizer
from megabts.tokenizers.words import WordEncoder

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
TOOL = [sys.executable, str(ROOT / "tools" / "preprocess_data.py")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def run_bytes(folder: Path, *inputs: str, spec: str = "bytes", **options: object) -> PreprocessReport:
    """Preprocess into folder/out, by default with a tokenizer whose ids are known without running it."""
    known = PreprocessOptions(tuple(inputs), str(folder / "out"), **options)  # type: ignore[arg-type]
    return preprocess(build_tokenizer(spec), known)


def write_lines(path: Path, records: list[object]) -> str:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


def documents(prefix: Path | str) -> list[list[bytes]]:
    """Documents of sequences of a dataset of the bytes tokenizer, the end token (256) written as |."""
    data = IndexedDataset(prefix)
    marks = data.document_indices.tolist()
    rows = [b"".join(b"|" if t == 256 else bytes([t]) for t in data.get(i).tolist()) for i in range(len(data))]
    return [rows[first:end] for first, end in itertools.pairwise(marks)]


def produced(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("out*")}


def test_golden_bytes(tmp_path: Path) -> None:
    run_bytes(tmp_path, str(GOLDEN / "ids.jsonl"), spec="null:100", append_eod=True)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"out_text_document.{suffix}").read_bytes() == (
            GOLDEN / f"mg_text_document.{suffix}"
        ).read_bytes()


@pytest.mark.parametrize("seed", range(6))
def test_random_corpora_equal_bytes_written_by_hand(seed: int, tmp_path: Path) -> None:
    """Ids as text, so that the expected files follow from the format alone; some documents are empty or have parts."""
    generator = random.Random(seed)
    vocab, letter, size, code = (100, "H", 2, 8) if seed % 2 else (70000, "i", 4, 4)
    eod = bool(seed & 2)
    corpus = [
        [
            [generator.randrange(vocab - 1) for _ in range(generator.choice((0, 1, 5)))]
            for _ in range(generator.choice((1, 1, 3)))
        ]
        for _ in range(50)
    ]
    texts = [[" ".join(map(str, part)) for part in parts] for parts in corpus]
    source = write_lines(tmp_path / "in.jsonl", [{"text": parts if len(parts) > 1 else parts[0]} for parts in texts])
    run_bytes(tmp_path, source, spec=f"null:{vocab}", append_eod=eod, workers=1 + seed % 2)
    kept = [[part for part in parts if part] for parts in corpus]
    if eod:
        kept = [[*parts[:-1], [*parts[-1], vocab - 1]] if parts else [] for parts in kept]
    flat = [part for parts in kept for part in parts]
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(flat), len(kept) + 1)
    index += struct.pack(f"<{len(flat)}i", *map(len, flat))
    index += struct.pack(f"<{len(flat)}q", *(size * sum(map(len, flat[:i])) for i in range(len(flat))))
    index += struct.pack(f"<{len(kept) + 1}q", *(sum(map(len, kept[:i])) for i in range(len(kept) + 1)))
    assert (tmp_path / "out_text_document.idx").read_bytes() == index
    tokens = [token for part in flat for token in part]
    assert (tmp_path / "out_text_document.bin").read_bytes() == struct.pack(f"<{len(tokens)}{letter}", *tokens)


@pytest.mark.parametrize("kind", ["sentencepiece-bpe", "hf-bpe"])
def test_workers_do_not_change_a_byte(kind: str, tmp_path: Path) -> None:
    generator = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta\n", "  epsilon", "é", "\u2581", "12"]
    texts = [" ".join(generator.choices(words, k=generator.randrange(300))) for _ in range(3000)]
    train_tokenizer(texts[:100], 280, tmp_path / "tokenizer", kind)
    source = write_lines(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    outputs = []
    for workers in (1, 2):
        report = run_bytes(tmp_path, source, spec=str(tmp_path / "tokenizer"), append_eod=True, workers=workers)
        outputs.append(produced(tmp_path))
    assert outputs[0] == outputs[1]
    assert report.documents == 3000
    tokenizer, data = build_tokenizer(tmp_path / "tokenizer"), IndexedDataset(tmp_path / "out_text_document")
    for i in (0, 1, 1500, 2999):
        first, end = data.document_indices[i : i + 2].tolist()
        ids = [token for sequence in range(first, end) for token in data.get(sequence).tolist()]
        assert ids == ([*tokenizer.encode(texts[i]), tokenizer.eod_id] if texts[i] else [])


def test_documents_keys_and_sidecar(tmp_path: Path) -> None:
    records = [{"text": "aé", "title": "T"}, {"text": "", "title": "U"}, {"text": ["x", "", "yz"], "title": ""}]
    report = run_bytes(tmp_path, write_lines(tmp_path / "i", records), json_keys=("text", "title"), append_eod=True)
    assert documents(tmp_path / "out_text_document") == [["aé|".encode()], [], [b"x", b"yz|"]]
    assert documents(tmp_path / "out_title_document") == [[b"T|"], [b"U|"], []]
    assert report.documents == 3
    sidecar = IndexedDataset(tmp_path / "out_text_document").sidecar
    assert sidecar == {
        "tokenizer": "bytes",
        "tokenizer_fingerprint": build_tokenizer("bytes").fingerprint,
        "vocab_size": 257,
        "eod_id": 256,
        "append_eod": True,
        "documents": 3,
        "sequences": 3,
        "tokens": 8,
        "text_bytes": 6,
    }


GOOD_ODDITIES = {
    "byte order mark": b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n',
    "windows line ends": b'{"text": "a"}\r\n{"text": "b"}\r\n',
    "empty lines": b'\n{"text": "a"}\n  \r\n\n{"text": "b"}\n\n',
    "no last line end": b'{"text": "a"}\n{"text": "b"}',
    "NaN in another key": b'{"text": "a", "score": NaN}\n{"text": "b", "score": -Infinity}\n',
    "white space": b'  {"text": "a"}  \n\t{ "text" : "b" }\n',
    "line separator inside": '{"text": "a"}\n{"x": "\u2028", "text": "b"}\n'.encode(),
}


@pytest.mark.parametrize("case", GOOD_ODDITIES)
def test_odd_input_that_is_fine(case: str, tmp_path: Path) -> None:
    (tmp_path / "i.jsonl").write_bytes(GOOD_ODDITIES[case])
    run_bytes(tmp_path, str(tmp_path / "i.jsonl"))
    assert documents(tmp_path / "out_text_document") == [[b"a"], [b"b"]]


BAD_LINES = {
    "unterminated string": (b'{"text": "abc', "not JSON: Unterminated string starting at column 10"),
    "cut": (b'{"text": "abc"', "not JSON: Expecting ',' delimiter"),
    "two objects": (b'{"text": "a"}{"text": "b"}', "not JSON: Extra data"),
    "not an object": (b'["text"]', "not a JSON object but a list"),
    "bare text": (b'"text"', "not a JSON object but a string"),
    "bare NaN": (b"NaN", "not a JSON object but a number"),
    "missing key": (b'{"txt": "abc", "id": 1}', 'no key "text", only "txt", "id"'),
    "empty object": (b"{}", 'no key "text", only none'),
    "null": (b'{"text": null}', 'the value of "text" is not text but null'),
    "number": (b'{"text": 17}', 'the value of "text" is not text but a number'),
    "NaN as text": (b'{"text": NaN}', 'the value of "text" is not text but a number'),
    "boolean": (b'{"text": true}', 'the value of "text" is not text but a boolean'),
    "list of numbers": (b'{"text": ["a", 1]}', 'the value of "text" is not text but a number'),
    "invalid UTF-8": (b'{"text": "ab\xff"}', "not UTF-8: byte 0xff at column 13"),
    "UTF-16 mark": (b'\xff\xfe{"text": "a"}', "not UTF-8: byte 0xff at column 1"),
    "mark inside a file": (b'\xef\xbb\xbf{"text": "a"}', "not JSON"),
    "half a surrogate": (b'{"text": "a\\ud800"}', "half of a surrogate pair"),
    "deep nesting": (
        b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "not JSON that can be read|not text but a list",
    ),
    "endless number": (b'{"text": ' + b"1" * 5000 + b"}", "not JSON that can be read"),
    "too long": (b'{"text": "' + b"a" * 300_000 + b'"}', "longer than 250000 bytes"),
    "control character": (b'{"text": "a\x00"}', "not JSON: Invalid control character"),
}


def thousand_lines(path: Path, bad: bytes) -> str:
    good = [b'{"text": "document %d"}' % i for i in range(1000)]
    good[516] = bad
    path.write_bytes(b"\n".join(good) + b"\n")
    return str(path)


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_recognised(case: str) -> None:
    bad, reason = BAD_LINES[case]
    batch = LineBatch("data.jsonl", 516, [b'{"text": "a"}', bad, b'{"text": "b"}'])
    for stop in (True, False):
        words = WordEncoder(build_tokenizer("bytes"), np.dtype(np.uint16))
        encoder = Encoder(words, ("text",), False, 250_000, stop)
        result = encoder(batch)
        assert [(line.source, line.line) for line in result.bad_lines] == [("data.jsonl", 517)]
        assert re.search(reason, result.bad_lines[0].reason)
        assert "\n" not in result.bad_lines[0].reason
        assert result.num_documents == (0 if stop else 2)


@pytest.mark.parametrize("case", ["unterminated string", "invalid UTF-8", "too long"])
def test_a_bad_line_is_named_or_skipped(case: str, tmp_path: Path) -> None:
    bad, reason = BAD_LINES[case]
    source = thousand_lines(tmp_path / "data.jsonl", bad)
    with pytest.raises(UserError, match=reason) as raised:
        run_bytes(tmp_path, source, max_line_bytes=250_000)
    assert str(raised.value).startswith(f"{source}:517: ")
    assert "\n" not in str(raised.value)
    assert produced(tmp_path) == {}
    report = run_bytes(tmp_path, source, max_line_bytes=250_000, on_bad_line="skip")
    assert (report.documents, report.bad_lines) == (999, 1)
    kept = documents(tmp_path / "out_text_document")
    assert kept[515:517] == [[b"document 515"], [b"document 517"]]
    reject = json.loads((tmp_path / "out_rejects.jsonl").read_text())
    assert (reject["source"], reject["line"]) == (source, 517)
    assert bad.decode("utf-8", "replace").startswith(reject["start"][:2000])
    assert len(reject["start"]) <= 2000


def test_lines_the_tokenizer_refuses_are_bad_lines(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "ids.jsonl", [{"text": "1 2"}, {"text": "3 x"}, {"text": "4"}, {"text": "100"}])
    with pytest.raises(UserError, match=r"ids.jsonl:2: 'x' is not a token id"):
        run_bytes(tmp_path, source, spec="null:100")
    assert run_bytes(tmp_path, source, spec="null:100", on_bad_line="skip").bad_lines == 2
    data = IndexedDataset(tmp_path / "out_text_document")
    assert [data.get(i).tolist() for i in range(2)] == [[1, 2], [4]]
    run_bytes(tmp_path, write_lines(tmp_path / "good.jsonl", [{"text": "1"}]), spec="null:100", on_bad_line="skip")
    assert not (tmp_path / "out_rejects.jsonl").exists()  # those of the run before are gone


def test_inputs_files_folders_patterns_and_gzip(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    write_lines(data / "b.jsonl", [{"text": "b"}])
    write_lines(data / "a.json", [{"text": "a"}])
    write_lines(data / "ignored.txt", [{"text": "no"}])
    with gzip.open(data / "sub" / "c.jsonl.gz", "wb") as file:
        file.write(b'\xef\xbb\xbf{"text": "c"}\n')
    orders = {
        (str(data),): b"abc",
        (f"{data}/*.json*",): b"ab",
        (f"{data}/**/*.gz", str(data / "b.jsonl")): b"cb",
        (str(data / "b.jsonl"), str(data / "a.json"), str(data / "b.jsonl")): b"bab",
    }
    for inputs, order in orders.items():
        run_bytes(data, *inputs)  # the output lies in the input folder, and is not taken for input the next time
        assert b"".join(part for parts in documents(data / "out_text_document") for part in parts) == order


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "does not exist"),
        ("*.jsonl", None, "matches no file"),
        ("folder", "folder", "has no files ending in"),
        ("empty.jsonl", b"", "the input is empty"),
        ("blank.jsonl", b"\n \n", "the input is empty"),
        ("textless.jsonl", b'{"text": ""}\n', "the 1 documents have no text"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000, mtime=0)[:-9], "no complete gzip file"),
        ("not.jsonl.gz", b'{"text": "a"}\n', "no complete gzip file"),
        ("data.jsonl.zst", b"x", "are not read"),
    ],
)
def test_input_that_cannot_be(name: str, content: bytes | str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        run_bytes(tmp_path, str(path))
    assert str(path) in str(raised.value)
    assert produced(tmp_path) == {}


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_lines(tmp_path / "secret.jsonl", [{"text": "a"}])

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("megabts.data.readers.open", refuse, raising=False)  # a mode of 0 does not stop root
    with pytest.raises(UserError, match=r"secret.jsonl cannot be read: Permission denied"):
        run_bytes(tmp_path, source)


def test_only_bad_lines_is_an_error(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [1, 2])
    with pytest.raises(
        UserError, match=r"all 2 lines are bad, .*the first: .*in\.jsonl:1: not a JSON object but a number"
    ):
        run_bytes(tmp_path, source, on_bad_line="skip")


@pytest.mark.parametrize(
    "options",
    [{"workers": 0}, {"log_interval": 0}, {"json_keys": ("a", "a")}, {"json_keys": ("a/b",)}, {"on_bad_line": "x"}],
)
def test_options_that_cannot_be(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        PreprocessOptions(("i",), "o", **options)  # type: ignore[arg-type]


def test_append_eod_needs_one_before_any_work(tmp_path: Path) -> None:
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    source = write_lines(tmp_path / "in.jsonl", [{"text": "aa"}])
    with pytest.raises(UserError, match="has no end-of-document token"):
        run_bytes(tmp_path, source, spec=str(tmp_path / "tokenizer.json"), append_eod=True)
    run_bytes(tmp_path, source, spec=str(tmp_path / "tokenizer.json"))
    assert IndexedDataset(tmp_path / "out_text_document").sidecar["eod_id"] is None


def _square(number: int) -> int:
    if number == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 107:
        raise UserError("one hundred and seven")
    return number * number


def test_ordered_map_keeps_the_order_and_reads_no_further_than_needed() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(10, 60):
            taken.append(number)
            yield number

    results = ordered_map(_square, items(), 2)
    assert next(results) == 100
    assert len(taken) <= 6  # two of each worker, and the ones that were ready
    assert list(results) == [number * number for number in range(11, 60)]


def test_ordered_map_raises_errors_and_notices_death() -> None:
    with pytest.raises(UserError, match="one hundred and seven"):
        list(ordered_map(_square, range(105, 110), 2))
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"killed by signal 9 \(SIGKILL\)"):
        list(ordered_map(_square, range(5, 100), 2))
    assert time.perf_counter() - start < 5
    with pytest.raises(ValueError, match="at least 1"):
        list(ordered_map(_square, [1], 0))


THREADED = "import runpy, sys, threading; threading.Thread(target=threading.Event().wait, daemon=True).start(); "
THREADED += "sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"


def start_endless(tmp_path: Path, threaded: bool) -> subprocess.Popen[bytes]:
    """The tool with two workers, reading from a pipe that stays open, with some documents done.

    `threaded`: in a process of two threads, which may not be forked.
    """
    flags = ["--input", "-", "--output-prefix", str(tmp_path / "out"), "--tokenizer", "bytes", "--workers", "2"]
    process = subprocess.Popen(
        [*([TOOL[0], "-c", THREADED, TOOL[1]] if threaded else TOOL), *flags, "--log-interval", "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stderr is not None
    process.stdin.write(b'{"text": "abc"}\n' * 20_000)
    process.stdin.flush()
    assert b"Processed" in process.stderr.readline()
    return process


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def workers_of(pid: int, spawned: bool) -> list[int]:
    """Forked workers have the tool's own command line, spawned ones another."""
    name = b"spawn_main" if spawned else b"preprocess_data.py"
    return [child for child in children_of(pid) if name in Path(f"/proc/{child}/cmdline").read_bytes()]


def gone(pids: list[int], seconds: float = 5) -> bool:
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.05)
    return False


def write_until_closed(pipe: IO[bytes]) -> None:
    """The tool notices a dead worker when it has something to give it."""
    try:
        for _ in range(1000):
            pipe.write(b'{"text": "abc"}\n' * 20_000)
            pipe.flush()
    except BrokenPipeError:
        return
    pytest.fail("the tool goes on without a worker")


@pytest.mark.parametrize("spawned", [False, True], ids=["forked", "spawned"])
@pytest.mark.parametrize("how", ["ctrl-c", "terminate", "kill a worker", "kill the parent"])
def test_being_stopped_leaves_nothing_under_final_names(how: str, spawned: bool, tmp_path: Path) -> None:
    process = start_endless(tmp_path, spawned)
    workers = workers_of(process.pid, spawned)
    assert len(workers) == 2
    start = time.perf_counter()
    if how == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)
    elif how == "terminate":
        process.terminate()
    elif how == "kill a worker":
        os.kill(workers[0], signal.SIGKILL)
        assert process.stdin is not None
        write_until_closed(process.stdin)
    else:
        process.kill()
    _, errors = process.communicate(timeout=5)
    assert time.perf_counter() - start < 10
    assert gone(workers)
    left = [path.name for path in tmp_path.iterdir()]
    last = errors.decode().strip().splitlines()[-1] if errors.strip() else ""
    if how == "kill the parent":
        assert all(".tmp" in name for name in left)
        return
    assert left == []
    assert "Traceback" not in errors.decode()
    assert process.returncode == (1 if how == "kill a worker" else 130)
    assert last == "interrupted" or "killed by signal 9 (SIGKILL)" in last


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: both fail in the middle of writing."""
    source = write_lines(tmp_path / "in.jsonl", [{"text": "x" * 1000}] * 2000)
    command = " ".join([*TOOL, "--input", source, "--output-prefix", str(tmp_path / "out"), "--tokenizer bytes"])
    done = subprocess.run(["bash", "-c", f"ulimit -f 1000; {command}"], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: cannot write {tmp_path}/out_text_document: ")
    assert "Traceback" not in done.stderr
    assert produced(tmp_path) == {}
