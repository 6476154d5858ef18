"""Training a tokenizer: SentencePiece BPE, or Hugging Face byte-level BPE.

Both keep every text exactly (spaces, line ends, indentation), split numbers into digits, and fall back to bytes for
what they have not seen. SentencePiece with runs of spaces as pieces is the better one for code; byte-level BPE needs
no library but `tokenizers` where the model is used later. Same texts in the same order (and, for SentencePiece, the
same number of threads) give the same file.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from megabts.errors import UserError
from megabts.tokenizers.hugging_face import CONFIG_FILE, HuggingFaceTokenizer
from megabts.tokenizers.protocol import Tokenizer, save_tokenizer
from megabts.tokenizers.sentence_piece import SentencePieceTokenizer

KINDS = ("sentencepiece-bpe", "hf-bpe")
_CHUNK = 2000  # characters; SentencePiece skips longer "sentences" than its limit of bytes
_END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, output: str | Path, kind: str = "sentencepiece-bpe", num_threads: int = 1
) -> Tokenizer:
    """Train on `texts`, write to the folder `output` (or the file, when it ends in .model), and return the tokenizer.

    Raises UserError when `vocab_size` is too large or too small for the texts, or there is no text.
    """
    if kind not in KINDS:
        raise UserError(f"tokenizer kind {kind} is unknown; use one of {', '.join(KINDS)}")
    if kind == "hf-bpe" and str(output).endswith(".model"):
        raise UserError(f"{output}: hf-bpe makes a folder with a tokenizer.json, not a .model file")
    tokenizer: SentencePieceTokenizer | HuggingFaceTokenizer
    if kind == "sentencepiece-bpe":
        tokenizer = _train_sentencepiece(texts, vocab_size, str(output), num_threads)
    else:
        tokenizer = _train_byte_level(texts, vocab_size, str(output))
    try:
        _write(tokenizer, Path(output))
    except OSError as error:
        raise UserError(f"cannot write the tokenizer to {output}: {error.strerror}") from error
    return tokenizer


def _write(tokenizer: SentencePieceTokenizer | HuggingFaceTokenizer, output: Path) -> None:
    if output.suffix != ".model":
        save_tokenizer(tokenizer, output)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(tokenizer.definition)


def _train_sentencepiece(texts: Iterable[str], vocab_size: int, name: str, num_threads: int) -> SentencePieceTokenizer:
    import sentencepiece

    model = io.BytesIO()
    refused: list[UserError] = []
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_chunks(_noting(texts, refused)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=8 * _CHUNK,
            num_threads=num_threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        if refused:
            raise refused[0] from None
        raise UserError(_explain(str(error), vocab_size)) from error
    return SentencePieceTokenizer(model.getvalue(), name)


def _noting(texts: Iterable[str], refused: list[UserError]) -> Iterator[str]:
    """The texts; an error met while reading them is noted, for SentencePiece gives it back as its own."""
    try:
        yield from texts
    except UserError as error:
        refused.append(error)
        raise


def _explain(message: str, vocab_size: int) -> str:
    """SentencePiece's own message, as advice."""
    too_high = re.search(r"too high.*value <= (\d+)", message)
    if too_high:
        return f"--vocab-size {vocab_size} is too large for this text: at most {too_high[1]}, or give more text"
    too_small = re.search(r"required_chars\. \d+ vs (\d+)", message)
    if too_small:
        return (
            f"--vocab-size {vocab_size} is too small for the bytes and characters of this text: at least {too_small[1]}"
        )
    if "sentences_.empty()" in message:
        return "there is no text to train a tokenizer on"
    return f"SentencePiece could not train with --vocab-size {vocab_size}: {message.strip()}"


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    """Texts in pieces of at most `_CHUNK` characters, cut before a line where that is possible.

    SentencePiece drops line ends at the end of a piece, so a piece starts with them instead.
    """
    for text in texts:
        start = 0
        while start < len(text):
            end = start + _CHUNK
            cut = text.rfind("\n", start + 1, end) if end < len(text) else -1
            while cut > start + 1 and text[cut - 1] == "\n":
                cut -= 1
            end = cut if cut > start else end
            yield text[start:end]
            start = end


def _train_byte_level(texts: Iterable[str], vocab_size: int, name: str) -> HuggingFaceTokenizer:
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 1:
        raise UserError(f"--vocab-size {vocab_size} is too small: at least {len(alphabet) + 1} (256 bytes, one end)")
    tokenizer = RustTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[_END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    reached = tokenizer.get_vocab_size()
    if reached < vocab_size:
        raise UserError(f"--vocab-size {vocab_size} is too large for this text: at most {reached}, or give more text")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END_OF_TEXT, "bos_token": _END_OF_TEXT}
    side_files = {CONFIG_FILE: json.dumps(config, indent=2).encode("utf-8")}
    return HuggingFaceTokenizer(tokenizer.to_str(pretty=True).encode("utf-8"), name, side_files)


def bytes_per_token(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """UTF-8 bytes a token of `texts`: how much the tokenizer compresses."""
    num_bytes = num_tokens = 0
    for text in texts:
        num_bytes += len(text.encode("utf-8"))
        num_tokens += len(tokenizer.encode(text))
    return num_bytes / max(num_tokens, 1)
