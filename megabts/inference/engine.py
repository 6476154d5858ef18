"""Generation: prefill the prompts once, then one token a step over caches, for every kind of model alike.

Prompts of different lengths are padded on the left, so that all rows write the same cache column. A padded row counts
its positions from its own first token and never attends to padding. The *engine* moves the caches on, after all layers
and members have run. `generate_uncached` recomputes everything for one row at a time: slow, without cache, padding or
mask, and therefore what the fast path is tested against. Both give the same tokens for the same seed.
Limit: one rank.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megabts.config.model import ModelConfig
from megabts.errors import UsageError, UserError
from megabts.inference.kv_cache import KVCache
from megabts.inference.sampling import sample
from megabts.model.attention import Context, make_context
from megabts.model.decoder import Model
from megabts.model.rope import rotation
from megabts.parallel.sharding import name_seed

OnToken = Callable[[int, int], None]


@dataclass(frozen=True)
class GenerationSettings:
    """How to choose tokens, and when to stop. Raises UsageError for a value that cannot be meant."""

    max_new_tokens: int = 64
    """Longest completion, tokens."""
    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Sample among the k likeliest tokens only; 0: among all."""
    top_p: float = 1.0
    """Sample among the smallest set of likeliest tokens with this probability; 1: among all."""
    seed: int = 0
    """Row i of a call draws from a generator of (seed, i)."""
    stop_ids: tuple[int, ...] = ()
    """A row ends before any of these; it is not part of the completion."""
    eod_id: int | None = None
    """End-of-document token, for models trained without attention across documents; others do not need it."""
    num_ids: int = 0
    """Choose among the first ids only: the tokenizer's, where the model's vocabulary is larger; 0: among all."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}; ask for at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature is {self.temperature}; give 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise UsageError(f"top_k is {self.top_k}; give a number of tokens, or 0 for all")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}; give a probability above 0, up to 1 (off)")
        if self.num_ids < 0:
            raise UsageError(f"num_ids is {self.num_ids}; give a number of token ids, or 0 for all")


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """Completions (without the prompts) of a batch of prompts; `on_token(row, id)` sees each token as it is chosen.

    An exception from `on_token` ends the generation. Raises UserError when a prompt is empty, too long together with
    the new tokens, or has ids outside the vocabulary.
    """
    check_prompts(model.config, prompts, settings.max_new_tokens)
    output = _Output(settings, len(prompts), on_token)
    if not prompts:
        return output.rows
    with _evaluating(model):
        decoding = Decoding(model, prompts, settings.max_new_tokens, settings.eod_id)
        logits = decoding.extend(decoding.prompts)
        while True:
            chosen = output.choose(logits, range(len(prompts)))
            if not any(output.open):
                return output.rows
            logits = decoding.extend(chosen.unsqueeze(1))


def generate_uncached(
    model: Model,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """The same as `generate`, row after row, running the whole text through the model for every token."""
    check_prompts(model.config, prompts, settings.max_new_tokens)
    output = _Output(settings, len(prompts), on_token)
    with _evaluating(model):
        for row, prompt in enumerate(prompts):
            while output.open[row]:
                text = [*prompt, *output.rows[row]]
                output.choose(score(model, text, settings.eod_id, len(prompt))[-1:], [row])
    return output.rows


def score(model: Model, tokens: Sequence[int], eod_id: int | None = None, prompt_length: int | None = None) -> Tensor:
    """Logits [s, V] of one text in one forward pass without a cache; `eod_id` as in `GenerationSettings`.

    `prompt_length`: its tokens that were there before the first one was chosen; None: all.
    """
    ids = torch.tensor([tokens], device=_device(model))
    positions = torch.arange(len(tokens), device=ids.device)
    documents = None if eod_id is None else document_numbers(ids == eod_id)
    context = make_context(
        model.config,
        positions,
        model.dtype,
        document_ids=documents,
        tokens=ids,
        prompt_length=prompt_length or len(tokens),
    )
    return model.logits(model.run_layers(0, model.config.num_layers, model.embed(ids), context), context)[0]


def check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raises UserError when a prompt cannot be continued by so many tokens."""
    for number, prompt in enumerate(prompts, 1):
        length, limit = len(prompt), config.max_seq_len
        if not prompt:
            raise UserError(f"prompt {number} is empty; begin with at least one token")
        if length + max_new_tokens > limit:
            raise UserError(
                f"prompt {number} has {length} tokens, with {max_new_tokens} new ones {length + max_new_tokens}: "
                f"more than the model's {limit} (model.max_seq_len); shorten it or ask for fewer"
            )
        for token in prompt:
            if not 0 <= token < config.vocab_size:
                raise UserError(
                    f"prompt {number} has token {token}, the model's vocabulary ends at {config.vocab_size - 1}; "
                    "is this the model's tokenizer?"
                )


class Decoding:
    """A batch of texts in progress: one cache per member, how far left padding reaches in each row, the model's memory.

    The first `extend` reads the prompts.
    """

    def __init__(
        self, model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int, eod_id: int | None = None
    ) -> None:
        self.model = model
        self.eod_id = None if model.config.cross_document_attention else eod_id
        self.device = _device(model)
        width = max(map(len, prompts))
        padded = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        self.prompts = torch.tensor(padded, device=self.device)
        """[b, width], padded on the left."""
        self.padding = torch.tensor([width - len(prompt) for prompt in prompts], device=self.device)
        self.ragged = bool(self.padding.any())
        self.ends = torch.zeros(len(prompts), 0, dtype=torch.bool, device=self.device)
        """[b, columns so far]: where a document ends; kept only where attention stops there."""
        # The last token chosen is never read again, so it needs no place.
        capacity = width + max_new_tokens - 1
        self.memory: dict[str, Tensor] = {}
        self.caches = [
            KVCache(model.config, len(prompts), capacity, model.dtype, self.device)
            for _ in range(model.num_local_members)
        ]

    def extend(self, tokens: Tensor) -> Tensor:
        """Run the next tokens [b, s] of every row; returns the logits [b, V] after the last of them."""
        start, length = self.caches[0].position, tokens.shape[1]
        columns = torch.arange(start, start + length, device=self.device)
        if self.eod_id is not None:
            self.ends = torch.cat([self.ends, tokens == self.eod_id], 1)
        positions = (columns.unsqueeze(1) - self.padding).clamp(min=0) if self.ragged else columns
        rope = rotation(self.model.config, positions, self.model.dtype)
        context = Context(
            rope,
            self._mask(columns),
            tokens=tokens,
            starts=self._starts(columns),
            prompt_length=self.prompts.shape[1],
            memory=self.memory,
        )
        hidden = self.model.embed(tokens)
        hidden = self.model.run_layers(0, self.model.config.num_layers, hidden, context, self.caches)
        for cache in self.caches:
            cache.advance(length)
        return self.model.logits(hidden, context, last=True)[:, 0]

    def _starts(self, queries: Tensor) -> Tensor:
        """Where among columns `queries` a text or a document starts, bool [b, s]."""
        first = queries == self.padding.unsqueeze(1)
        if self.eod_id is None:
            return first
        after_end = torch.nn.functional.pad(self.ends[:, :-1], (1, 0))[:, queries]
        return first | (after_end & (queries > self.padding.unsqueeze(1)))

    def _mask(self, queries: Tensor) -> Tensor | None:
        """Where columns `queries` may look: [b or 1, 1, s, t]; None where plain causal (or one query) says the same."""
        end = self.caches[0].position + len(queries)
        if self.eod_id is None and not self.ragged and len(queries) in (1, end):
            return None
        keys = torch.arange(end, device=self.device)
        causal = keys <= queries.unsqueeze(1)
        allowed = causal & (keys >= self.padding.unsqueeze(1)).unsqueeze(1)
        if self.eod_id is not None:
            documents = document_numbers(self.ends)
            allowed &= documents[:, queries].unsqueeze(2) == documents.unsqueeze(1)
        # A padding column looks at itself: a softmax over nothing would be NaN.
        itself = keys == queries.unsqueeze(1)
        return (allowed | itself).unsqueeze(1)


def document_numbers(ends: Tensor) -> Tensor:
    """Which document each place belongs to, from 0, given where documents end [b, s]; the end belongs to its own."""
    return ends.cumsum(1) - ends.long()


class _Output:
    """Completions so far, and which rows are still open."""

    def __init__(self, settings: GenerationSettings, num_rows: int, on_token: OnToken | None) -> None:
        self.settings = settings
        self.on_token = on_token
        self.rows: list[list[int]] = [[] for _ in range(num_rows)]
        self.open = [True] * num_rows
        seeds = [name_seed(f"row {row}", settings.seed) for row in range(num_rows)]
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def choose(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """Take a token for each of `rows` from logits [rows, V]; returns the ids [rows]."""
        settings = self.settings
        logits = logits[:, : settings.num_ids or None]
        if not bool(logits.amax(-1).isfinite().all()):
            raise UserError("the model's logits are not finite; the checkpoint is damaged or its training diverged")
        generators = [self.generators[row] for row in rows]
        chosen = sample(logits, settings.temperature, settings.top_k, settings.top_p, generators)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if self.open[row]:
                self._take(row, token)
        return chosen

    def _take(self, row: int, token: int) -> None:
        if token in self.settings.stop_ids:
            self.open[row] = False
            return
        self.rows[row].append(token)
        self.open[row] = len(self.rows[row]) < self.settings.max_new_tokens
        if self.on_token is not None:
            self.on_token(row, token)


@contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    """No dropout, nothing recorded for a backward pass; the model's mode is as before afterwards."""
    was_training = isinstance(model, nn.Module) and model.training
    model.train(False)
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def _device(model: Model) -> torch.device:
    return next(model.parameters()).device
