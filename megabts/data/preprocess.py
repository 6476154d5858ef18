"""JSON lines to indexed datasets: read, tokenize in worker processes, write.

The order of documents is the order of the input, whatever the number of workers, so the output is the same byte for
byte. Memory stays bounded: batches are small (at most `_BATCH_BYTES` of text, or one long line), and a few per worker
are under way. Datasets appear under their names only when everything is done; when it fails, nothing is left.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megabts.data.encode import BadLine, EncodedBatch, Encoder
from megabts.data.index_file import optimal_dtype
from megabts.data.indexed import IndexedDatasetBuilder
from megabts.data.ordered_map import ordered_map
from megabts.data.readers import find_inputs, line_batches
from megabts.data.sidecar import describe_tokenizer
from megabts.errors import UsageError, UserError
from megabts.tokenizers.protocol import Tokenizer
from megabts.tokenizers.words import WordEncoder

_BATCH_LINES = 1000
_BATCH_BYTES = 1 << 18
BAD_LINE_CHOICES = ("stop", "skip")


@dataclass(frozen=True)
class PreprocessOptions:
    """What to read and write. See `tools/preprocess_data.py --help`."""

    inputs: tuple[str, ...]
    """files, folders, patterns; `-` is standard input"""
    output_prefix: str
    """key K becomes the dataset {output_prefix}_{K}_document"""
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    workers: int = 1
    log_interval: int = 1000
    """documents between two progress lines"""
    on_bad_line: str = "stop"
    """stop, or skip: count bad lines and write them to {output_prefix}_rejects.jsonl"""
    max_line_bytes: int = 16 << 20

    def __post_init__(self) -> None:
        for key in self.json_keys:
            if not key or "/" in key or self.json_keys.count(key) > 1:
                raise UsageError(f"--json-keys: {key!r} is given twice or makes no file name")
        for flag, value in (("workers", self.workers), ("log-interval", self.log_interval)):
            if value < 1:
                raise UsageError(f"--{flag} {value}: at least 1 is needed")
        if self.max_line_bytes < 2:
            raise UsageError(f"--max-line-bytes {self.max_line_bytes}: at least 2 is needed")
        if self.on_bad_line not in BAD_LINE_CHOICES:
            raise UsageError(f"--on-bad-line {self.on_bad_line} is unknown; use {' or '.join(BAD_LINE_CHOICES)}")

    def dataset_prefix(self, key: str) -> str:
        return f"{self.output_prefix}_{key}_document"

    @property
    def rejects_path(self) -> str:
        return f"{self.output_prefix}_rejects.jsonl"


@dataclass
class PreprocessReport:
    """What was done."""

    documents: int = 0
    bad_lines: int = 0
    first_bad_line: str = ""
    """where, and why"""
    input_bytes: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    """for each dataset prefix"""
    text_bytes: dict[str, int] = field(default_factory=dict)
    """for each dataset prefix, in UTF-8"""


def preprocess(
    tokenizer: Tokenizer, options: PreprocessOptions, log: Callable[[str], None] = lambda line: None
) -> PreprocessReport:
    """Tokenize all inputs. `log` gets progress lines.

    Raises UserError for missing or empty input, a bad line (unless they are skipped), a full disk, a dead worker.
    """
    if options.append_eod and tokenizer.eod_id is None:
        raise UserError(
            f"tokenizer {tokenizer.name} has no end-of-document token; use one with an eos token, or leave out "
            "--append-eod"
        )
    files = find_inputs(options.inputs)
    dtype = optimal_dtype(tokenizer.vocab_size)
    stop = options.on_bad_line == "stop"
    words = WordEncoder(tokenizer, dtype)
    encoder = Encoder(words, options.json_keys, options.append_eod, options.max_line_bytes, stop)
    batches = line_batches(files, options.max_line_bytes, _BATCH_LINES, _BATCH_BYTES)
    report = PreprocessReport()
    with ExitStack() as stack:
        builders = [
            stack.enter_context(IndexedDatasetBuilder(options.dataset_prefix(key), dtype)) for key in options.json_keys
        ]
        rejects = stack.enter_context(RejectsFile(options.rejects_path))
        results = stack.enter_context(closing(ordered_map(encoder, batches, options.workers)))  # type: ignore[type-var]
        for batch in _with_progress(results, report, options.log_interval, log):
            _take(batch, stop, builders, rejects, report)
        if not any(builder.num_sequences for builder in builders):
            raise UserError(_nothing(options, report))
        _finish(tokenizer, options, builders, rejects, report)
    return report


def _take(
    batch: EncodedBatch,
    stop: bool,
    builders: list[IndexedDatasetBuilder],
    rejects: "RejectsFile",
    report: PreprocessReport,
) -> None:
    if batch.bad_lines and not report.first_bad_line:
        bad = batch.bad_lines[0]
        report.first_bad_line = f"{bad.source}:{bad.line}: {bad.reason}"
    if batch.bad_lines and stop:
        raise UserError(f"{report.first_bad_line}; repair it, or leave such lines out (--on-bad-line skip)")
    rejects.add(batch.bad_lines)
    report.bad_lines += len(batch.bad_lines)
    report.documents += batch.num_documents
    report.input_bytes += batch.input_bytes
    for builder, key in zip(builders, batch.keys, strict=True):
        builder.add_documents(key.tokens, key.lengths, key.sequences)
        report.tokens[builder.prefix] = report.tokens.get(builder.prefix, 0) + len(key.tokens)
        report.text_bytes[builder.prefix] = report.text_bytes.get(builder.prefix, 0) + key.text_bytes


def _finish(
    tokenizer: Tokenizer,
    options: PreprocessOptions,
    builders: list[IndexedDatasetBuilder],
    rejects: "RejectsFile",
    report: PreprocessReport,
) -> None:
    rejects.finish()
    for builder in builders:
        counts = {
            "documents": builder.num_documents,
            "sequences": builder.num_sequences,
            "tokens": report.tokens[builder.prefix],
            "text_bytes": report.text_bytes[builder.prefix],
        }
        builder.finalize(describe_tokenizer(tokenizer, options.append_eod) | counts)


def _nothing(options: PreprocessOptions, report: PreprocessReport) -> str:
    where = ", ".join(options.inputs)
    if report.bad_lines:
        first = report.first_bad_line
        return f"{where}: all {report.bad_lines} lines are bad, nothing was written; the first: {first}"
    if report.documents:
        return f"{where}: the {report.documents} documents have no text, nothing was written"
    return f"{where}: the input is empty, nothing was written"


def _with_progress(
    batches: Iterator[EncodedBatch], report: PreprocessReport, interval: int, log: Callable[[str], None]
) -> Iterator[EncodedBatch]:
    """The same batches; a line is logged whenever another `interval` documents are done."""
    start = time.perf_counter()
    logged = 0
    for batch in batches:
        yield batch
        if report.documents // interval > logged:
            logged = report.documents // interval
            seconds = time.perf_counter() - start
            rate, speed = report.documents / seconds, report.input_bytes / seconds / 2**20
            log(f"Processed {report.documents} documents ({rate:.1f} docs/s, {speed:.2f} MB/s).")


class RejectsFile:
    """The bad lines, as JSON lines {"source", "line", "reason", "start"}; the file exists only if there are some."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._temporary = Path(f"{path}.tmp{os.getpid()}")
        self._count = 0

    def __enter__(self) -> "RejectsFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self._temporary.unlink(missing_ok=True)

    def add(self, lines: list[BadLine]) -> None:
        if not lines:
            return
        self._count += len(lines)
        try:
            with self._temporary.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(line)) + "\n" for line in lines)
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}; nothing was put in place") from error

    def finish(self) -> None:
        """Put the file in place; one of an earlier run goes."""
        if self._count:
            os.replace(self._temporary, self._path)
        else:
            self._path.unlink(missing_ok=True)
