"""One word or path, or Megatron-LM's flags, to a tokenizer."""

import json
import re
from pathlib import Path

from megabts.errors import UsageError, UserError
from megabts.tokenizers.hugging_face import DEFINITION_FILE, HuggingFaceTokenizer
from megabts.tokenizers.protocol import SPEC_FILE, TOKENIZER_FOLDER, Tokenizer, read_definition
from megabts.tokenizers.sentence_piece import MODEL_FILE, SentencePieceTokenizer
from megabts.tokenizers.simple import BytesTokenizer, NullTokenizer

_KINDS = "a .model file (SentencePiece), a tokenizer.json or a folder with one, 'bytes', or 'null:VOCAB'"
_DEFINITIONS = (SPEC_FILE, DEFINITION_FILE, MODEL_FILE)
SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
TOKENIZER_TYPES = (*SENTENCEPIECE_TYPES, "HuggingFaceTokenizer", "GPT2BPETokenizer", "NullTokenizer")
_REFUSED_TYPES = {
    "TikTokenizer": "convert the vocabulary to a tokenizer.json and use HuggingFaceTokenizer",
    "SFTTokenizer": "conversations are not tokenized here; use HuggingFaceTokenizer on plain text",
    "BertWordPieceLowerCase": "this is for BERT; megabts trains left-to-right models",
    "BertWordPieceCase": "this is for BERT; megabts trains left-to-right models",
    "ByteLevelTokenizer": "use --tokenizer bytes (its ids differ)",
    "MultimodalTokenizer": "megabts trains on text only",
    "NullMultimodalTokenizer": "megabts trains on text only",
}


def build_tokenizer(spec: str | Path, include_special_tokens: bool = False) -> Tokenizer:
    """The tokenizer that `spec` names: a path, `bytes` or `null:VOCAB`.

    A folder is searched for tokenizer_spec.json, tokenizer.json and tokenizer.model, in this order.
    `include_special_tokens` lets a tokenizer.json add its template's tokens. Raises UserError.
    """
    name = str(spec)
    if name == BytesTokenizer.name:
        return BytesTokenizer()
    if name.startswith("null:"):
        return _build_null(name)
    path = Path(name)
    if path.is_dir():
        file = _definition_in(path)
        if file is None:
            raise UserError(f"tokenizer folder {path} has none of {', '.join(_DEFINITIONS)}; give {_KINDS}")
        path = file
    if not path.exists():
        raise UserError(f"tokenizer {name} does not exist; give {_KINDS}")
    if path.name == SPEC_FILE:
        return _build_from_spec_file(path)
    if path.suffix == ".json":
        return HuggingFaceTokenizer.from_path(path, name, include_special_tokens)
    if path.suffix == ".model":
        return SentencePieceTokenizer.from_file(path, name)
    raise UserError(f"tokenizer {name} is of an unknown kind; give {_KINDS}")


def find_tokenizer(folder: str | Path) -> str:
    """The folder of a model's tokenizer: a checkpoint's `tokenizer`, or a Hugging Face folder itself; "" for none."""
    places = (Path(folder) / TOKENIZER_FOLDER, Path(folder))
    return next((str(place) for place in places if _definition_in(place)), "")


def _definition_in(folder: Path) -> Path | None:
    return next((folder / file for file in _DEFINITIONS if (folder / file).is_file()), None)


def _build_null(spec: str) -> NullTokenizer:
    vocab_size = spec.removeprefix("null:")
    if not re.fullmatch(r"[0-9]{1,9}", vocab_size):
        raise UserError(f"tokenizer {spec} has no number of ids; write null:VOCAB, such as null:100")
    return NullTokenizer(int(vocab_size))


def _build_from_spec_file(path: Path) -> Tokenizer:
    try:
        spec = json.loads(read_definition(path))["tokenizer"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path} is damaged: it should be {{"tokenizer": "bytes"}} or so') from error
    if spec == BytesTokenizer.name:
        return BytesTokenizer()
    return _build_null(str(spec))


def build_tokenizer_from_flags(
    tokenizer_type: str,
    tokenizer_model: str | None = None,
    vocab_file: str | None = None,
    merge_file: str | None = None,
    vocab_size: int | None = None,
    include_special_tokens: bool = True,
) -> Tokenizer:
    """The tokenizer that Megatron-LM's flags of the same names mean. Raises UsageError for unsupported types.

    `vocab_size` is for NullTokenizer and counts all ids, the end of a document (VOCAB - 1) among them.
    `include_special_tokens` is on by default, as in Megatron-LM: a tokenizer.json may put a bos in front of every text.
    """
    if tokenizer_type in _REFUSED_TYPES:
        raise UsageError(f"--tokenizer-type {tokenizer_type} is not supported: {_REFUSED_TYPES[tokenizer_type]}")
    if tokenizer_type not in TOKENIZER_TYPES:
        raise UsageError(f"--tokenizer-type {tokenizer_type} is unknown; use one of {', '.join(TOKENIZER_TYPES)}")
    if tokenizer_type == "NullTokenizer":
        if vocab_size is None:
            raise UsageError("--tokenizer-type NullTokenizer needs --vocab-size")
        return NullTokenizer(vocab_size)
    if tokenizer_type == "GPT2BPETokenizer":
        if vocab_file is None or merge_file is None:
            raise UsageError("--tokenizer-type GPT2BPETokenizer needs --vocab-file and --merge-file")
        return HuggingFaceTokenizer.from_gpt2_files(vocab_file, merge_file)
    if tokenizer_model is None:
        raise UsageError(f"--tokenizer-type {tokenizer_type} needs --tokenizer-model")
    if not Path(tokenizer_model).exists():
        raise UserError(f"--tokenizer-model {tokenizer_model} does not exist here: nothing is downloaded, give a path")
    if tokenizer_type in SENTENCEPIECE_TYPES:
        path = Path(tokenizer_model)
        return SentencePieceTokenizer.from_file(path / MODEL_FILE if path.is_dir() else path, tokenizer_model)
    return HuggingFaceTokenizer.from_path(tokenizer_model, include_special_tokens=include_special_tokens)
