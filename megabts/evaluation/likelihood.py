"""Log-likelihood of continuations given their contexts, in batches, for every kind of model.

What it is for models that learn about a text while reading it: an ensemble's (or an evidence-reading mixture's)
posterior begins with the context's first token and is carried into the continuation, token by token: the sum is the
mixture's exact log-probability. A router reads the context alone, as it reads a prompt before generating, and the
member it chooses scores the continuation: also exact. A *window*, which has no context of its own, is judged by the
router as every evaluation window is, by its first `routing.max_tokens` tokens, which it is scored on too. Neither
carries anything from one request to the next. A context cut on the left begins where it was cut.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megabts.errors import UserError
from megabts.inference.decoding import document_numbers
from megabts.model.attention import make_context
from megabts.model.decoder import Model


@dataclass(frozen=True)
class Scored:
    """What one continuation got."""

    log_likelihood: float
    """Of all its tokens, nats."""
    is_greedy: bool
    """Whether each of its tokens is the likeliest where it stands."""


@dataclass
class _Row:
    """One forward pass's worth of tokens, and the requests that read their logits there."""

    tokens: tuple[int, ...]
    prompt_length: int | None
    batch: int
    """Only rows with the same number here share a forward pass."""
    wanted: list[tuple[int, Sequence[int]]] = field(default_factory=list)
    """(request's number, its continuation); all end one token after `tokens`."""


@torch.inference_mode()
def continuation_scores(
    model: Model,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    max_length: int,
    batch_size: int,
    eod_id: int | None = None,
    windows: bool = False,
    by_prompt: bool = False,
    on_scored: Callable[[int], object] | None = None,
) -> list[Scored]:
    """Scores of (context, continuation) pairs, both of at least one token, in their order.

    Contexts lose tokens on the left until no more than `max_length` tokens are read. Rows are sorted by length and
    padded on the right, where nothing looks at them; pairs that differ in their last token alone share a row.
    `eod_id` ends documents, for models trained without attention across them. `windows`: the pairs are windows of
    longer texts. `by_prompt`: the model reads where a context ends (`Context.prompt_length`), so only contexts of one
    length share a batch, and only windows of one length. `on_scored` is told of every batch's number of pairs. The
    model must be in evaluation mode. Raises UserError for a continuation that does not fit.
    """
    assert all(context and continuation for context, continuation in pairs)
    scores: list[Scored | None] = [None] * len(pairs)
    for rows in _batches(_rows(pairs, max_length, windows, by_prompt), batch_size):
        for row, logits in zip(rows, _logits(model, rows, eod_id), strict=True):
            longest = max(len(continuation) for _, continuation in row.wanted)
            end = len(row.tokens)
            known = logits[end - longest : end].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            greedy = known.argmax(-1)
            for number, continuation in row.wanted:
                ids = torch.tensor(continuation, device=known.device)
                size = len(continuation)
                total = known[-size:].gather(-1, ids.unsqueeze(-1)).sum().item()
                scores[number] = Scored(total, bool((greedy[-size:] == ids).all()))
        if on_scored is not None:
            on_scored(sum(len(row.wanted) for row in rows))
    return [score for score in scores if score is not None]


def _rows(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], max_length: int, windows: bool, by_prompt: bool
) -> list[_Row]:
    """The forward passes that the pairs need, the longest first among those that may share one."""
    rows: dict[tuple[int | None, tuple[int, ...]], _Row] = {}
    for number, (context, continuation) in enumerate(pairs):
        if len(continuation) > max_length:
            raise UserError(
                f"a text to be scored has {len(continuation)} tokens and the model reads {max_length} at once; leave "
                "the task out, or take a model with a larger model.max_seq_len"
            )
        tokens = tuple([*context, *continuation][-(max_length + 1) : -1])
        prompt_length = len(tokens) + 1 - len(continuation) if by_prompt and not windows else None
        # Padding after a window that is short would be judged as part of it.
        batch = (prompt_length or len(tokens)) if by_prompt else 0
        row = rows.setdefault((prompt_length, tokens), _Row(tokens, prompt_length, batch))
        row.wanted.append((number, continuation))
    return sorted(rows.values(), key=lambda row: (row.batch, len(row.tokens)), reverse=True)


def _batches(rows: Sequence[_Row], batch_size: int) -> Iterator[Sequence[_Row]]:
    """At most `batch_size` neighbours that may share a forward pass."""
    start = 0
    for end in range(1, len(rows) + 1):
        full = end - start == batch_size
        if end == len(rows) or full or rows[end].batch != rows[start].batch:
            yield rows[start:end]
            start = end


def _logits(model: Model, rows: Sequence[_Row], eod_id: int | None) -> Tensor:
    """[rows, s, V] after every token, whatever it is after a row's last."""
    device = next(model.parameters()).device
    width = max(len(row.tokens) for row in rows)
    ids = torch.tensor([[*row.tokens, *[0] * (width - len(row.tokens))] for row in rows], device=device)
    documents = None if eod_id is None else document_numbers(ids == eod_id)
    context = make_context(
        model.config,
        torch.arange(width, device=device),
        model.dtype,
        document_ids=documents,
        tokens=ids,
        prompt_length=rows[0].prompt_length,
    )
    return model.logits(model.run_layers(0, model.config.num_layers, model.embed(ids), context), context)
