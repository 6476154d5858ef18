"""Looking at an indexed dataset: counts, lengths, first documents, and a full check of its tokens."""

import numpy as np

from megabts.data.indexed import IndexedDataset
from megabts.data.sidecar import require_same_tokenizer
from megabts.errors import UserError
from megabts.tokenizers.protocol import Tokenizer

_SHOWN_CHARACTERS = 400
_SHOWN_TOKENS = 32
_PERCENTILES = (0, 5, 50, 95, 100)


def describe_dataset(dataset: IndexedDataset) -> list[str]:
    """Lines with counts, token type, lengths and sidecar."""
    lengths = dataset.lengths
    counts = f"{dataset.num_documents} documents, {len(dataset)} sequences, {dataset.num_tokens} tokens"
    lines = [f"dataset    {dataset.prefix}", f"content    {counts}", f"token type {dataset.dtype}"]
    if len(lengths):
        values = np.percentile(lengths, _PERCENTILES)
        shown = ", ".join(f"{p} %: {value:.0f}" for p, value in zip(_PERCENTILES, values, strict=True))
        lines.append(f"lengths    {shown}, mean: {lengths.mean():.1f} tokens a sequence")
    if not dataset.sidecar:
        lines.append("sidecar    none (nothing is known about the tokenizer)")
    return lines + [f"sidecar    {name}: {value}" for name, value in dataset.sidecar.items()]


def show_documents(dataset: IndexedDataset, count: int, tokenizer: Tokenizer | None) -> list[str]:
    """Lines with the first `count` documents: text with a tokenizer, else token ids.

    Raises UserError when the data was made with another tokenizer.
    """
    if tokenizer is not None:
        require_same_tokenizer(dataset.prefix, dataset.sidecar, tokenizer, "--tokenizer")
    lines = []
    for document in range(min(count, dataset.num_documents)):
        first, end = (int(mark) for mark in dataset.document_indices[document : document + 2])
        size = int(dataset.lengths[first:end].sum(dtype=np.int64))
        lines.append(f"document {document}: {end - first} sequences, {size} tokens")
        lines.extend(f"  {_show(dataset.get(sequence), tokenizer)}" for sequence in range(first, end))
    return lines


def _show(tokens: np.ndarray, tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        more = " ..." if len(tokens) > _SHOWN_TOKENS else ""
        return " ".join(str(token) for token in tokens[:_SHOWN_TOKENS]) + more
    text = tokenizer.decode(tokens[:_SHOWN_CHARACTERS].tolist())
    return repr(text[:_SHOWN_CHARACTERS]) + (" ..." if len(text) > _SHOWN_CHARACTERS else "")


def verify_tokens(dataset: IndexedDataset, vocab_size: int | None) -> str:
    """Read every token. Raises UserError when one lies outside the vocabulary (the sidecar's, if None is given)."""
    limit = dataset.sidecar.get("vocab_size") if vocab_size is None else vocab_size
    low, high = dataset.token_range()
    if low < 0 or (isinstance(limit, int) and high >= limit):
        raise UserError(
            f"{dataset.prefix}.bin: tokens from {low} to {high}, outside the vocabulary of {limit}: the file is "
            "damaged or was made with another tokenizer"
        )
    if limit is None:
        return f"verified   all tokens read, {low} to {high}; vocabulary not known (give --tokenizer or --vocab-size)"
    return f"verified   all tokens read, {low} to {high}, inside the vocabulary of {limit}"
