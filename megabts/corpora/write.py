"""Writes the three built-in domains (code, math, prose), and math_code on request, as compressed JSON lines.

    OUT/code/train.jsonl.gz   OUT/math/train.jsonl.gz   OUT/prose/train.jsonl.gz
    OUT/code/valid.jsonl.gz   OUT/math/valid.jsonl.gz   OUT/prose/valid.jsonl.gz

Each line is {"text": ..., "source": ...}. The bytes depend only on the Python installation and the arguments: no time
stamp or file name goes into the gzip header. A file appears under its name only when it is complete.
"""

import gzip
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from megabts.corpora.math_code import generate_programs
from megabts.corpora.math_problems import generate_documents
from megabts.corpora.python_library import library_documents, valid_units
from megabts.errors import UsageError, UserError

MIN_VALID_BYTES = 200_000

Texts = list[tuple[str, str]]  # (source, text)
Generate = Callable[[int, str, int, set[str]], Iterator[str]]  # (seed, split, bytes, questions used) -> documents


def write_jsonl(path: Path, texts: Texts) -> tuple[int, int]:
    """Write the documents and return (how many, their UTF-8 bytes).

    Raises:
        UserError: the folder cannot be written.
    """
    aside, num_bytes = path.with_name(path.name + ".partial"), 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
            for source, text in texts:
                # Docstrings may hold lone surrogates, which UTF-8 has no bytes for.
                data = text.encode("utf-8", "replace")
                num_bytes += len(data)
                line = json.dumps({"text": data.decode(), "source": source}, ensure_ascii=False)
                file.write(line.encode() + b"\n")
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        if aside.exists():
            aside.unlink()
    return len(texts), num_bytes


def _python_domains(valid_fraction: float) -> Iterator[tuple[str, str, Texts]]:
    """(domain, split, documents) of code and prose, split by the same units."""
    code, prose = library_documents()
    held_out = valid_units([code, prose], valid_fraction, MIN_VALID_BYTES)
    for domain, documents in (("code", code), ("prose", prose)):
        for split in ("train", "valid"):
            chosen = [d for d in documents if (d.unit in held_out) == (split == "valid")]
            yield domain, split, [(d.source, d.text) for d in chosen]


def _generated(
    domain: str, generate: Generate, seed: int, num_bytes: int, valid_fraction: float, seen: set[str]
) -> Iterator[tuple[str, str, Texts]]:
    """(domain, split, documents) of generated problems; no question stands in both splits, nor in `seen`."""
    valid_bytes = int(min(max(valid_fraction * num_bytes, MIN_VALID_BYTES), num_bytes / 4))
    for split, size in (("valid", valid_bytes), ("train", num_bytes - valid_bytes)):
        texts = generate(seed, split, size, seen)
        yield domain, split, [(f"{domain}_problems/{seed}/{split}/{index}", text) for index, text in enumerate(texts)]


def build_corpora(
    out: Path, seed: int = 0, math_bytes: int = 6_000_000, valid_fraction: float = 0.05, math_code_bytes: int = 0
) -> dict[str, dict[str, tuple[int, int]]]:
    """Write all domains under `out` and return {domain: {split: (documents, bytes of text)}}.

    Args:
        out: folder that gets one folder per domain.
        seed: of the mathematics problems; code and prose do not depend on it.
        math_bytes: size of the mathematics text, both splits together.
        math_code_bytes: size of a fourth domain, math_code: mathematics in Python; 0 leaves it out.
        valid_fraction: share of the valid split; it holds about 200 kB at least, but at most a quarter of a domain.

    Raises:
        UsageError: a size or share that cannot be meant.
        UserError: the folder cannot be written, or this Python has no library sources.
    """
    if not 0 < valid_fraction <= 0.25:
        raise UsageError(f"valid fraction {valid_fraction}: give a share above 0 and at most 0.25")
    for name, size in (("math", math_bytes), ("math_code", math_code_bytes or 10_000)):
        if size < 10_000:
            raise UsageError(f"{name} corpus of {size} bytes: ask for at least 10,000 (0.01 megabytes)")
    sizes: dict[str, dict[str, tuple[int, int]]] = {}
    seen: set[str] = set()
    sources = [
        _generated("math", generate_documents, seed, math_bytes, valid_fraction, seen),
        _python_domains(valid_fraction),
    ]
    if math_code_bytes:
        sources.append(_generated("math_code", generate_programs, seed, math_code_bytes, valid_fraction, seen))
    for domains in sources:
        for domain, split, texts in domains:
            sizes.setdefault(domain, {})[split] = write_jsonl(out / domain / f"{split}.jsonl.gz", texts)
    return {domain: {split: sizes[domain][split] for split in ("train", "valid")} for domain in sorted(sizes)}
