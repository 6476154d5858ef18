"""Encoding many texts by their words, each of which is encoded once and remembered.

A text is cut at spaces (the space stays with the word after it). For most BPE tokenizers this changes no id:

- SentencePiece BPE merges two neighbours only if together they are a piece. Where no piece has a space behind another
  character, nothing is ever merged across a cut, and a cut text is merged as the whole one is.
- A byte-level BPE of Hugging Face merges within the matches of a regular expression. With the expressions of GPT-2,
  GPT-4, Llama 3 and Qwen every match ends where a word does: none goes on from another character to a space.

`find_cuts` reads the tokenizer's own definition and says None unless it is sure. A dictionary then does what merging
would: natural text is encoded two to four times as fast. The words known are forgotten when they become many.
"""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from megabts.tokenizers.hugging_face import HuggingFaceTokenizer
from megabts.tokenizers.protocol import Tokenizer
from megabts.tokenizers.sentence_piece import SentencePieceTokenizer

MAX_WORDS = 1 << 19
"""Words remembered: about 100 MB. What comes often is soon known again."""
_MAX_CHARACTERS = 64
"""Longer words are seldom met again."""
_JOINED = 100
"""New words that are encoded as one text."""

_META_SPACE = "\u2581"  # how SentencePiece writes a space inside its pieces
_AFTER_NO_SPACE = re.compile(r"(?<=[^ ]) ")
_AFTER_NO_WHITE_SPACE = re.compile(r"(?<=\S) ")
_BYTE_SPACE = "\u0120"  # how byte-level BPE writes it
_BPE = 2  # TrainerSpec.ModelType
_TEXT_PIECES = (1, 4, 5)  # SentencePiece.Type: normal, user-defined, unused

_LETTERS_AND_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_KNOWN_SPLITS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
    _LETTERS_AND_CONTRACTIONS + r"|\p{N}{1,3}" + _REST,  # GPT-4, Llama 3
    _LETTERS_AND_CONTRACTIONS + r"|\p{N}" + _REST,  # Qwen 2 and 3
)


class Cuts(NamedTuple):
    """Where texts may be cut, and how to find the cuts in their ids."""

    spaces: re.Pattern[str]
    """Matches the spaces that texts may be cut in front of."""
    begins_with_space: np.ndarray | None
    """Whether an id's text begins with a space, bool [vocab_size]; None: words are encoded as fast one by one."""


class WordEncoder:
    """A tokenizer's `encode_batch` with tokens as raw bytes. Picklable; a copy begins without known words.

    Args:
        tokenizer: what encodes words that are not known.
        dtype: how tokens are stored.
    """

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype[Any]) -> None:
        self.tokenizer = tokenizer
        self.dtype = dtype
        self._cuts = find_cuts(tokenizer)
        self._known: dict[str, bytes] = {}  # by the word without the space in front that belongs to it

    def __reduce__(self) -> tuple[type["WordEncoder"], tuple[Tokenizer, np.dtype[Any]]]:
        return WordEncoder, (self.tokenizer, self.dtype)

    def encode_batch(self, texts: list[str]) -> list[bytes]:
        """Tokens of every text. Raises what the tokenizer raises."""
        if self._cuts is None:
            return self._encode(texts)
        if len(self._known) > MAX_WORDS:
            self._known.clear()
        cut = [self._cut(text, self._cuts.spaces) for text in texts]
        firsts = self._encode([words.pop(0) for words in cut])
        new = list(set().union(*cut).difference(self._known))
        self._known.update(self._encode_new(new))
        tokens = [first + b"".join(map(self._known.__getitem__, words)) for first, words in zip(firsts, cut)]
        for word in new:
            if len(word) > _MAX_CHARACTERS:
                del self._known[word]
        return tokens

    def _cut(self, text: str, spaces: re.Pattern[str]) -> list[str]:
        """Words, without the space in front that all but the first have."""
        if spaces is _AFTER_NO_SPACE and "  " not in text:
            return text.split(" ")  # the same, several times as fast
        return spaces.split(text)

    def _encode_new(self, words: list[str]) -> dict[str, bytes]:
        """Tokens of words with a space in front of each.

        Hugging Face's library takes one text of many words in a third of the time that as many texts take. It may be
        cut before every word; there the tokens are that begin with a space, if words have none themselves. Where there
        are more or fewer of those than words, the words of that text are taken one by one.
        """
        fresh: dict[str, bytes] = {}
        begins = self._cuts.begins_with_space if self._cuts else None
        if begins is not None:
            plain = [word for word in words if word and " " not in word and not word[-1].isspace()]
            parts = [plain[start : start + _JOINED] for start in range(0, len(plain), _JOINED)]
            for part, tokens in zip(parts, self._encode(["".join([f" {word}" for word in part]) for part in parts])):
                starts = np.flatnonzero(begins[np.frombuffer(tokens, self.dtype)])
                if len(starts) == len(part):
                    places = [*(starts * self.dtype.itemsize).tolist(), len(tokens)]
                    fresh.update((word, tokens[i:j]) for word, i, j in zip(part, places, places[1:]))
        rest = [word for word in words if word not in fresh]
        return fresh | dict(zip(rest, self._encode([f" {word}" for word in rest])))

    def _encode(self, texts: list[str]) -> list[bytes]:
        ids = self.tokenizer.encode_batch(texts)
        size = self.dtype.itemsize
        tokens = np.fromiter(chain.from_iterable(ids), self.dtype, sum(map(len, ids))).tobytes()
        ends = np.cumsum([size * len(part) for part in ids]).tolist()
        return [tokens[start:end] for start, end in zip([0, *ends], ends)]


def find_cuts(tokenizer: Tokenizer) -> Cuts | None:
    """Where texts may be cut without changing an id; None when that is not certain."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return Cuts(_AFTER_NO_SPACE, None) if _merges_stop_at_spaces(tokenizer.definition) else None
    if isinstance(tokenizer, HuggingFaceTokenizer) and not tokenizer.include_special_tokens:
        definition = json.loads(tokenizer.definition)
        if _splits_at_spaces(definition):
            return Cuts(_AFTER_NO_WHITE_SPACE, _begins_with_space(definition, tokenizer.vocab_size))
    return None


def _merges_stop_at_spaces(definition: bytes) -> bool:
    """Whether a SentencePiece model is a BPE that keeps texts as they are, with no space inside or ending a piece."""
    pieces, trainer, normalizer = [], {}, {}
    for number, value in _fields(definition):
        if number == 1 and (value.rfind(_META_SPACE.encode()) > 2 or b" " in value):  # two bytes say it is a text
            pieces.append(dict(_fields(value)))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    # numbers as in sentencepiece_model.proto; a field that is not there has its default
    kept = not normalizer.get(2) and [normalizer.get(field, 1) for field in (3, 4, 5)] == [0, 0, 1]
    bytes_for_unknown = trainer.get(35, 0) == 1
    texts = (piece[1].decode("utf-8") for piece in pieces if piece.get(3, 1) in _TEXT_PIECES)
    inside = any(_AFTER_NO_SPACE.search(text.replace(_META_SPACE, " ")) for text in texts)
    return kept and bytes_for_unknown and trainer.get(3, 1) == _BPE and not inside


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protocol buffer's fields: integers and bytes."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(message):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        yield key >> 3, message[position : position + size]
        position += size


def _splits_at_spaces(definition: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is a BPE over the matches of an expression that stops at spaces, and nothing more."""
    model, normalizer = definition["model"], definition.get("normalizer")
    steps = _steps(definition.get("pre_tokenizer"))
    return (
        model.get("type") == "BPE"
        and not any(model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        and (normalizer is None or normalizer["type"] == "NFC")  # nothing composes with a space after it
        and all(map(_is_local, steps))
        and any(map(_stops_at_spaces, steps))
        and not any(
            token["lstrip"] or token["rstrip"] or re.search(r"\s", token["content"])
            for token in definition.get("added_tokens", [])
        )
    )


def _steps(pre_tokenizer: dict[str, Any] | None) -> Sequence[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    return pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]


def _is_local(step: dict[str, Any]) -> bool:
    """Whether a step treats a part cut off before a space as it does the same part of the whole text."""
    if step["type"] == "ByteLevel":
        return not step["add_prefix_space"]
    return step["type"] == "Digits" or _stops_at_spaces(step)


def _stops_at_spaces(step: dict[str, Any]) -> bool:
    if step["type"] == "ByteLevel":
        return step.get("use_regex", True)
    if step["type"] != "Split" or step["behavior"] != "Isolated" or step["invert"]:
        return False
    return step["pattern"].get("Regex") in _KNOWN_SPLITS


def _begins_with_space(definition: dict[str, Any], vocab_size: int) -> np.ndarray:
    begins = np.zeros(vocab_size, dtype=bool)
    begins[[number for piece, number in definition["model"]["vocab"].items() if piece.startswith(_BYTE_SPACE)]] = True
    begins[[token["id"] for token in definition.get("added_tokens", [])]] = False
    return begins
