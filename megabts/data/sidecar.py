"""The sidecar `PREFIX.json` beside a dataset: which tokenizer made it, and how much text went in.

    {"tokenizer": "tok/tokenizer.model", "tokenizer_fingerprint": "12ab...", "vocab_size": 32000, "eod_id": 2,
     "append_eod": true, "documents": 972, "sequences": 972, "tokens": 4012345, "text_bytes": 13570320}

`text_bytes` counts the UTF-8 bytes of the text that was tokenized, which turns a loss per token into bits per byte.
Megatron-LM ignores the file, and a dataset without one (made by Megatron-LM) is fine: nothing is known about it then.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

from megabts.errors import UserError
from megabts.tokenizers.protocol import Tokenizer

COUNTS = ("documents", "sequences", "tokens", "text_bytes")
_SAME = ("tokenizer_fingerprint", "vocab_size", "eod_id", "append_eod")


def describe_tokenizer(tokenizer: Tokenizer, append_eod: bool) -> dict[str, Any]:
    """The part of a sidecar that says how text became tokens."""
    return {
        "tokenizer": tokenizer.name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "append_eod": append_eod,
    }


def read_sidecar(prefix: str, sequences: int, tokens: int) -> dict[str, Any]:
    """The sidecar of a dataset with so many sequences and tokens, or {}. Raises UserError for one of other data."""
    path = f"{prefix}.json"
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON; rebuild the dataset, or remove the file") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; rebuild the dataset, or remove the file")
    for name, found in (("sequences", sequences), ("tokens", tokens)):
        if content.get(name, found) != found:
            raise UserError(
                f"{path} speaks of {content[name]} {name}, the dataset has {found}: it belongs to other data, "
                "rebuild the dataset or remove the file"
            )
    return content


def require_same_tokenizer(prefix: str, sidecar: dict[str, Any], tokenizer: Tokenizer, user: str = "the model") -> None:
    """Raise UserError when the data at `prefix` was made with another tokenizer than `user` expects."""
    made_with = sidecar.get("tokenizer_fingerprint")
    if made_with is not None and made_with != tokenizer.fingerprint:
        raise UserError(
            f"{prefix} was tokenized with {sidecar.get('tokenizer')} (sha {str(made_with)[:8]}..), {user} expects "
            f"{tokenizer.name} (sha {tokenizer.fingerprint[:8]}..); tokenize the data again"
        )


def merge_sidecars(parts: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """The sidecar of (prefix, sidecar) parts put together; {} if one of them has none.

    Raises UserError when they were not all tokenized the same way. A count that a part does not have is left out.
    """
    if not all(sidecar for _, sidecar in parts):
        return {}
    first_prefix, first = parts[0]
    for prefix, sidecar in parts[1:]:
        for name in _SAME:
            if sidecar.get(name) != first.get(name):
                raise UserError(
                    f"{prefix} and {first_prefix} were not tokenized the same way ({name}: {sidecar.get(name)} and "
                    f"{first.get(name)}); tokenize one of them again"
                )
    counts = {
        name: sum(sidecar[name] for _, sidecar in parts)
        for name in COUNTS
        if all(isinstance(sidecar.get(name), int) for _, sidecar in parts)
    }
    return {name: value for name, value in first.items() if name not in COUNTS} | counts
