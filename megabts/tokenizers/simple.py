"""Tokenizers without a model: UTF-8 bytes, and integers written as text.

`bytes` needs no training, loses nothing and has 257 ids: good for tests and for tiny models. `null:VOCAB` reads
text that already consists of ids ("12 7 99"), for data tokenized elsewhere, like Megatron-LM's NullTokenizer.
"""

import json

from megabts.errors import UserError
from megabts.tokenizers.protocol import SPEC_FILE, sha256_hex


def _spec_files(spec: str) -> dict[str, bytes]:
    return {SPEC_FILE: (json.dumps({"tokenizer": spec}) + "\n").encode()}


class BytesTokenizer:
    """Ids 0..255 are the bytes of the UTF-8 text; 256 is the end of a document."""

    name = "bytes"
    vocab_size = 257
    eod_id = 256
    pad_id: int | None = None
    fingerprint = sha256_hex(b"megabts bytes tokenizer: 256 bytes, eod 256")

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """Text of the bytes; the end-of-document token is left out, incomplete characters become U+FFFD."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def files(self) -> dict[str, bytes]:
        return _spec_files(self.name)


class NullTokenizer:
    """Text of integers in [0, vocab_size), separated by white space; the last id is the end of a document."""

    pad_id: int | None = None

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < 2:
            raise UserError(f"null:{vocab_size}: the vocabulary needs at least 2 ids (one is the end of a document)")
        self.vocab_size = vocab_size
        self.eod_id = vocab_size - 1
        self.name = f"null:{vocab_size}"
        self.fingerprint = sha256_hex(self.name.encode())

    def encode(self, text: str) -> list[int]:
        """Raises UserError for a word that is no integer or lies outside the vocabulary."""
        ids = []
        for word in text.split():
            if not (word.isascii() and word.isdigit() and len(word) < 12 and int(word) < self.vocab_size):
                raise UserError(f"{word[:40]!r} is not a token id in 0..{self.vocab_size - 1} ({self.name})")
            ids.append(int(word))
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return " ".join(str(int(i)) for i in ids)

    def files(self) -> dict[str, bytes]:
        return _spec_files(self.name)
