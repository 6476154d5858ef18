"""Hugging Face tokenizers: a `tokenizer.json`, alone or in a model folder, or GPT-2's vocab.json + merges.txt.

Only the `tokenizers` library is used: nothing is downloaded and no Python code of a model folder is run. Truncation
and padding stored in the file are switched off, as they would silently shorten documents. Special tokens written out
in a text ("<|endoftext|>") are read as those tokens, as everywhere in the Hugging Face world.
"""

import json
from pathlib import Path
from typing import Any

from megabts.errors import UserError
from megabts.tokenizers.protocol import read_definition, sha256_hex

DEFINITION_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
_NAMING_FILES = (CONFIG_FILE, "special_tokens_map.json")
"""Beside the definition: those that name special tokens."""
_EOD_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "<eod>")


class HuggingFaceTokenizer:
    """A `tokenizers.Tokenizer`, read from its JSON definition."""

    def __init__(
        self,
        definition: bytes,
        name: str,
        side_files: dict[str, bytes] | None = None,
        include_special_tokens: bool = False,
    ) -> None:
        """`definition`: tokenizer.json; `side_files`: what lies beside it (special tokens' names, a chat template).

        `include_special_tokens`: let the file's template add its tokens (often a bos in front) to every text.
        """
        import tokenizers

        self.name = name
        self.fingerprint = sha256_hex(definition)
        self.definition = definition
        self._side_files = dict(side_files or {})
        self.include_special_tokens = include_special_tokens
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_buffer(definition)
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{name} is not a tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size: int = max(ids, default=-1) + 1  # ids may have gaps: the largest one counts
        self.pad_id: int | None = self.named_token("pad_token")
        self.eod_id = self._find_eod()

    @classmethod
    def from_path(
        cls, path: str | Path, name: str | None = None, include_special_tokens: bool = False
    ) -> "HuggingFaceTokenizer":
        """From a tokenizer.json or the folder that holds one. Raises UserError."""
        file = Path(path) / DEFINITION_FILE if Path(path).is_dir() else Path(path)
        side_files = {
            side: read_definition(file.parent / side)
            for side in (*_NAMING_FILES, TEMPLATE_FILE)
            if (file.parent / side).is_file()
        }
        return cls(read_definition(file), name or str(path), side_files, include_special_tokens)

    @classmethod
    def from_gpt2_files(cls, vocab_file: str | Path, merge_file: str | Path) -> "HuggingFaceTokenizer":
        """Byte-level BPE from GPT-2's two files. Raises UserError."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        for file in (vocab_file, merge_file):
            read_definition(Path(file))
        try:
            tokenizer = Tokenizer(models.BPE.from_file(str(vocab_file), str(merge_file)))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{vocab_file} and {merge_file} are not a byte-level BPE: {error}") from error
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([token for token in _EOD_TOKENS if tokenizer.token_to_id(token) is not None])
        return cls(tokenizer.to_str().encode("utf-8"), str(vocab_file))

    def __reduce__(self) -> tuple[type["HuggingFaceTokenizer"], tuple[bytes, str, dict[str, bytes], bool]]:
        return HuggingFaceTokenizer, (self.definition, self.name, self._side_files, self.include_special_tokens)

    def named_token(self, role: str) -> int | None:
        """The id of the token that the side files call `role` (bos_token, eos_token, pad_token). Raises UserError."""
        for file in _NAMING_FILES:
            try:
                token = json.loads(self._side_files.get(file, b"{}")).get(role)
            except (ValueError, AttributeError) as error:
                raise UserError(f"{file} of tokenizer {self.name} is not a JSON object; copy it again") from error
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str) and self._tokenizer.token_to_id(text) is not None:
                return self._tokenizer.token_to_id(text)
        return None

    def _find_eod(self) -> int | None:
        named = self.named_token("eos_token")
        if named is not None:
            return named
        found = (self._tokenizer.token_to_id(token) for token in _EOD_TOKENS)
        return next((i for i in found if i is not None), None)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=self.include_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: list[int]) -> str:
        """Special tokens are shown, so that nothing of the text is lost. Raises UserError for an unknown id."""
        plain = [int(i) for i in ids]
        if any(not 0 <= i < self.vocab_size for i in plain):
            raise UserError(f"a token is outside the {self.vocab_size} of {self.name}: not made by it")
        return self._tokenizer.decode(plain, skip_special_tokens=False)

    def files(self) -> dict[str, bytes]:
        return {DEFINITION_FILE: self.definition, **self._side_files}
