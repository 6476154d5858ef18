"""The text, the tokenizer and the yardsticks of the data suite.

Yardsticks use the tokenizer's library as it is, without megabts around it: SentencePiece or Hugging Face `tokenizers`.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megabts.benchmark.suite import Settings
from megabts.corpora.write import build_corpora
from megabts.data.index_file import optimal_dtype
from megabts.data.indexed import IndexedDatasetBuilder
from megabts.data.readers import find_inputs, read_lines
from megabts.data.sampling import sample_texts
from megabts.errors import UserError
from megabts.runtime.cores import num_cores
from megabts.tokenizers.build import build_tokenizer
from megabts.tokenizers.hugging_face import HuggingFaceTokenizer
from megabts.tokenizers.protocol import Tokenizer
from megabts.tokenizers.sentence_piece import SentencePieceTokenizer
from megabts.tokenizers.train import train_tokenizer

TEXT_BYTES = 30_000_000
"""Most JSON lines measured at once (times the scale): the slowest yardstick takes about ten seconds for them."""
_VOCAB_SIZE = 8192
_TRAIN_BYTES = 4_000_000
_MAX_LINE_BYTES = 16 << 20

Encode = Callable[[str], list[int]]
EncodeAll = Callable[[list[str]], object]


@dataclass(frozen=True)
class Text:
    """What is tokenized."""

    path: Path
    """JSON lines {"text": ...}, not compressed."""
    num_bytes: int
    """Size of the file."""
    texts: list[str]
    tokenizer: Tokenizer
    spec: str
    """The tokenizer as the command line names it."""


def prepare_text(settings: Settings, folder: Path) -> Text:
    """Write the text to `folder`, and the tokenizer if one has to be trained. Raises UserError."""
    given = build_tokenizer(settings.tokenizer) if settings.tokenizer else None
    size = round(TEXT_BYTES * settings.scale)
    path = folder / "text.jsonl"
    sources = [str(settings.data)] if settings.data else _built_in(folder, size, settings.progress)
    num_bytes = _copy(sources, path, size)
    texts = list(sample_texts([str(path)]))
    if given:
        return Text(path, num_bytes, texts, given, settings.tokenizer)
    settings.progress(f"training a tokenizer of {_VOCAB_SIZE} ids")
    spec = str(folder / "tokenizer")
    sample = sample_texts([str(path)], _TRAIN_BYTES)
    tokenizer = train_tokenizer(sample, _VOCAB_SIZE, spec, num_threads=num_cores())
    return Text(path, num_bytes, texts, tokenizer, spec)


def _built_in(folder: Path, size: int, progress: Callable[[str], None]) -> list[str]:
    progress("writing the built-in corpora")
    build_corpora(folder / "corpora", 0, size // 4, 0.05, 0)
    return [str(folder / "corpora" / domain / "train.jsonl.gz") for domain in ("code", "prose", "math")]


def _copy(sources: list[str], path: Path, size: int) -> int:
    """The first lines of all files in turn, about `size` bytes. Returns their size. Raises UserError for none."""
    written = 0
    readers: list[Iterator[bytes]] = [read_lines(file, _MAX_LINE_BYTES) for file in find_inputs(sources)]
    with open(path, "wb") as file:
        for line in itertools.chain.from_iterable(itertools.zip_longest(*readers, fillvalue=b"")):
            if written >= size:
                break
            if line.strip():
                written += file.write(line + b"\n")
    if not written:
        raise UserError(f"{', '.join(sources)}: the file is empty; give JSON lines with text")
    return written


def library_encoders(tokenizer: Tokenizer) -> tuple[Encode, EncodeAll]:
    """The library's own functions: ids of one text, and of many with all cores."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.definition)
        return processor.encode, lambda texts: processor.encode(texts, num_threads=num_cores())
    if isinstance(tokenizer, HuggingFaceTokenizer):
        import tokenizers

        library = tokenizers.Tokenizer.from_buffer(tokenizer.definition)
        library.no_truncation()
        library.no_padding()
        return (
            lambda text: library.encode(text, add_special_tokens=False).ids,
            lambda texts: library.encode_batch_fast(texts, add_special_tokens=False),
        )
    return tokenizer.encode, tokenizer.encode_batch


def preprocess_by_document(path: Path, tokenizer: Tokenizer, prefix: str) -> None:
    """Megatron-LM's way in one process: parse a line, encode its text, append its tokens, one document at a time."""
    encode, _ = library_encoders(tokenizer)
    dtype = optimal_dtype(tokenizer.vocab_size)
    end = [] if tokenizer.eod_id is None else [tokenizer.eod_id]
    with open(path, encoding="utf-8") as lines, IndexedDatasetBuilder(prefix, dtype) as builder:
        for line in lines:
            ids = encode(json.loads(line)["text"])
            tokens = np.array(ids + end if ids else ids, dtype)
            builder.add_document(tokens, [len(tokens)] if ids else [])
        builder.finalize()
