"""What the rest of megabts asks of a tokenizer.

A tokenizer is a value: made once, never changed, picklable (it carries its own definition, so worker processes need
no file), and known by a fingerprint, so that data and models tokenized differently are told apart by content.
"""

import hashlib
from pathlib import Path
from typing import Protocol, runtime_checkable

from megabts.errors import UserError

TOKENIZER_FOLDER = "tokenizer"
"""The folder of a checkpoint that holds its tokenizer."""
SPEC_FILE = "tokenizer_spec.json"
"""Canonical file of the tokenizers that need no model (bytes, integers): {"tokenizer": "bytes"}."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back. `vocab_size` is unpadded: every id is in [0, vocab_size)."""

    @property
    def name(self) -> str:
        """How people call it: the path or word it was built from."""

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the definition: equal exactly when the ids mean the same."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, without padding."""

    @property
    def eod_id(self) -> int | None:
        """The end-of-document token, if the tokenizer has one."""

    @property
    def pad_id(self) -> int | None:
        """The padding token, if the tokenizer has one."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of several texts, equal to `encode` of each, faster."""

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""

    def files(self) -> dict[str, bytes]:
        """The definition by file name: from a folder of these files `build_tokenizer` makes this tokenizer again."""


def checkpoint_files(tokenizer: Tokenizer | None) -> dict[str, bytes]:
    """A tokenizer's files by their names inside a checkpoint; none for None."""
    return {f"{TOKENIZER_FOLDER}/{name}": content for name, content in tokenizer.files().items()} if tokenizer else {}


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write a tokenizer's files to a folder, which is made as needed."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer.files().items():
        (Path(folder) / name).write_bytes(content)


def sha256_hex(definition: bytes) -> str:
    """The fingerprint of a definition."""
    return hashlib.sha256(definition).hexdigest()


def read_definition(path: Path) -> bytes:
    """The bytes of a tokenizer file; a missing, unreadable or empty one is a UserError."""
    try:
        definition = path.read_bytes()
    except OSError as error:
        raise UserError(f"tokenizer file {path} cannot be read: {error.strerror}") from error
    if not definition:
        raise UserError(f"tokenizer file {path} is empty; copy it again")
    return definition
