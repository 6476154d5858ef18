"""A checkpoint's tokenizer in the form that transformers' `AutoTokenizer` reads: `tokenizer.json` and its settings.

Hugging Face tokenizers go along as they are. Bytes become a byte-level BPE without merges. A SentencePiece BPE is
written out as one with the same pieces, its merges in the order of their scores; it is kept only where it gives
SentencePiece's own ids on texts of many kinds. Limit: unigram models, and normalisations other than none, do not.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from megabts.errors import UserError
from megabts.tokenizers.build import build_tokenizer
from megabts.tokenizers.hugging_face import CONFIG_FILE, DEFINITION_FILE, HuggingFaceTokenizer
from megabts.tokenizers.protocol import Tokenizer
from megabts.tokenizers.sentence_piece import MODEL_FILE, SentencePieceTokenizer
from megabts.tokenizers.simple import BytesTokenizer

_EOD = "<|endoftext|>"
_PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(12, 3456))\t# tab",
    "  two spaces  before, between and after  ",
    "caf\u00e9 \u4f60\u597d \U0001f600 \u0928\u092e\u0938\u094d\u0924\u0947 x\u00b2 \ufb01",
    "\n\n",
    "a",
    "$\\int_0^1 x^2 dx = 1/3$; 3.14159 != 1,000,000",
)


@dataclass(frozen=True)
class HFTokenizer:
    """What of a tokenizer a Hugging Face folder gets."""

    files: dict[str, bytes] = field(default_factory=dict)
    special_ids: dict[str, int] = field(default_factory=dict)
    """`eos_token_id`, `pad_token_id` where there is one, for `config.json` and `generation_config.json`."""
    note: str = ""
    """Why no tokenizer that transformers reads goes along; "" when one does."""


def hf_tokenizer(folder: str) -> HFTokenizer:
    """The tokenizer of a checkpoint, whose folder `find_tokenizer` gave ("" for none). Raises UserError."""
    if not folder:
        return HFTokenizer(note="the checkpoint has no tokenizer; none goes along")
    tokenizer = build_tokenizer(folder)
    ids = {"eos_token_id": tokenizer.eod_id, "pad_token_id": tokenizer.pad_id}
    special = {key: value for key, value in ids.items() if value is not None}
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return HFTokenizer(_with_config(tokenizer.files(), tokenizer), special)
    if isinstance(tokenizer, BytesTokenizer):
        return HFTokenizer(_with_config({DEFINITION_FILE: _bytes_definition()}, tokenizer), special)
    if isinstance(tokenizer, SentencePieceTokenizer):
        definition = _sentence_piece_definition(tokenizer)
        if _same_ids(definition, tokenizer):
            return HFTokenizer(_with_config({DEFINITION_FILE: definition, **tokenizer.files()}, tokenizer), special)
        note = f"the SentencePiece model has no exact {DEFINITION_FILE}; {MODEL_FILE} goes along for other programs"
        return HFTokenizer(tokenizer.files(), special, note)
    return HFTokenizer({}, special, f"the tokenizer {tokenizer.name} has no Hugging Face form; none goes along")


def _with_config(files: dict[str, bytes], tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files with a `tokenizer_config.json` that names the class and the end of document, as far as it did not."""
    library = _library(files[DEFINITION_FILE])
    try:
        given = json.loads(files.get(CONFIG_FILE, b"{}"))
    except ValueError as error:
        raise UserError(f"{CONFIG_FILE} of tokenizer {tokenizer.name} is not JSON; copy it again") from error
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # or generate(**tokenizer(text)) is refused
    }
    for role, token_id in (("eos_token", tokenizer.eod_id), ("pad_token", tokenizer.pad_id)):
        if token_id is not None:
            config[role] = library.id_to_token(token_id)
    return {**files, CONFIG_FILE: (json.dumps({**config, **given}, indent=2, ensure_ascii=False) + "\n").encode()}


def _library(definition: bytes) -> Any:
    import tokenizers

    return tokenizers.Tokenizer.from_buffer(definition)


def _bytes_definition() -> bytes:
    """Byte-level BPE without merges: the ids of `BytesTokenizer`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(_EOD, special=True)])
    return tokenizer.to_str().encode()


def _sentence_piece_definition(tokenizer: SentencePieceTokenizer) -> bytes:
    """A byte-fallback BPE of the model's pieces; a merge is any cut of a piece in two pieces, best score first."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    model: Any = sentencepiece.SentencePieceProcessor()
    model.LoadFromSerializedProto(tokenizer.definition)
    pieces = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    plain = {
        piece: i
        for piece, i in pieces.items()
        if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i) or model.is_unused(i))
    }
    merges = []
    for piece, i in plain.items():
        cuts = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        found = [(left, right) for left, right in cuts if left in plain and right in plain]
        merges += [(-model.get_score(i), i, plain[left], plain[right], left, right) for left, right in found]
    unknown = model.id_to_piece(model.unk_id())
    tokens = Tokenizer(
        models.BPE(
            vocab=pieces,
            merges=[(left, right) for *_, left, right in sorted(merges)],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=any(model.is_byte(i) for i in pieces.values()),
        )
    )
    prefix = model.encode("a", out_type=str)[0].startswith("\u2581")
    spaces: list[Any] = [normalizers.Prepend("\u2581")] if prefix else []
    tokens.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "\u2581")])
    last = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokens.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    special = [piece for piece, i in pieces.items() if model.is_control(i) or model.is_unknown(i)]
    tokens.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    return tokens.to_str().encode()


def _same_ids(definition: bytes, tokenizer: Tokenizer) -> bool:
    library = _library(definition)
    return all(library.encode(text, add_special_tokens=False).ids == tokenizer.encode(text) for text in _PROBES)
