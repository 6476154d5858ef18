"""SentencePiece models (`tokenizer.model`): Llama 1 and 2, Mistral, Gemma, and the ones `train_tokenizer` makes.

Ids are SentencePiece's own. One thing is added: SentencePiece writes a space as U+2581 inside its pieces, so a text
that holds a real U+2581 comes back with a space in its place. Where the model keeps everything else (identity
normalisation, byte fallback), that character is encoded as its three bytes, and decode(encode(x)) == x for every text.
"""

from pathlib import Path
from typing import Any

from megabts.errors import UserError
from megabts.tokenizers.protocol import read_definition, sha256_hex

MODEL_FILE = "tokenizer.model"
_META_SPACE = "\u2581"
_EOD_PIECES = ("<eod>", "<|endoftext|>", "</s>")
_LOSSLESS_PROBE = "  a  1\n\tb \u00e9\n "


class SentencePieceTokenizer:
    """A SentencePiece model. No bos or eos is added by `encode`."""

    def __init__(self, definition: bytes, name: str) -> None:
        """`definition`: the bytes of the .model file. Raises UserError when it is damaged or something else."""
        import sentencepiece

        self.name = name
        self.fingerprint = sha256_hex(definition)
        self.definition = definition
        self._processor: Any = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(definition)
        except RuntimeError as error:
            raise UserError(f"{name} is not a SentencePiece model: it is damaged or of another kind") from error
        self.vocab_size: int = self._processor.vocab_size()
        pad = self._processor.pad_id()
        self.pad_id: int | None = pad if pad >= 0 else None
        self.eod_id = self._find_eod()
        self._meta_space_ids = self._find_meta_space_ids()

    @classmethod
    def from_file(cls, path: str | Path, name: str | None = None) -> "SentencePieceTokenizer":
        return cls(read_definition(Path(path)), name or str(path))

    def __reduce__(self) -> tuple[type["SentencePieceTokenizer"], tuple[bytes, str]]:
        return SentencePieceTokenizer, (self.definition, self.name)

    def _find_eod(self) -> int | None:
        eos = self._processor.eos_id()
        if eos >= 0:
            return eos
        unknown = self._processor.unk_id()
        found = (self._processor.piece_to_id(piece) for piece in _EOD_PIECES)
        return next((i for i in found if i != unknown and i >= 0), None)

    def _find_meta_space_ids(self) -> list[int] | None:
        """The byte pieces of U+2581, when this model loses nothing but that character."""
        unknown = self._processor.unk_id()
        ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _META_SPACE.encode()]
        lossless = self._processor.decode(self._processor.encode(_LOSSLESS_PROBE)) == _LOSSLESS_PROBE
        return ids if lossless and unknown not in ids else None

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """One thread: processes are what spreads the work over cores."""
        if self._meta_space_ids is None or not any(_META_SPACE in text for text in texts):
            return self._processor.encode(texts, num_threads=1)
        return [self._encode_around_meta_space(text) for text in texts]

    def _encode_around_meta_space(self, text: str) -> list[int]:
        assert self._meta_space_ids is not None
        first, *others = self._processor.encode(text.split(_META_SPACE), num_threads=1)
        return first + [i for part in others for i in (*self._meta_space_ids, *part)]

    def decode(self, ids: list[int]) -> str:
        """Control tokens (bos, eos) have no text. Raises UserError for an id outside the vocabulary."""
        try:
            return self._processor.decode([int(i) for i in ids])
        except IndexError as error:
            raise UserError(f"a token is outside the {self.vocab_size} of {self.name}: not made by it") from error

    def files(self) -> dict[str, bytes]:
        return {MODEL_FILE: self.definition}
