"""A call that completes prompts, by the engine; the slow way without caches, which it is tested against; and `score`.

Both ways give the same tokens for the same seed. `generate_uncached` recomputes everything for one row at a time: no
cache, no padding, no mask, no neighbours.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megabts.inference.decoding import document_numbers
from megabts.inference.engine import Engine, cache_size, check_request
from megabts.inference.ranks import follow
from megabts.inference.rows import Completion, Event, Request, choose
from megabts.inference.settings import GenerationSettings
from megabts.model.attention import make_context
from megabts.model.decoder import Model
from megabts.parallel.mesh import ParallelMesh
from megabts.runtime.progress import Progress
from megabts.tokenizers.protocol import Tokenizer

OnToken = Callable[[int, int], None]
OnEvent = Callable[[Event], None]
"""Told of every event as it happens; its `id` is the request's place in the call."""

MAX_ROWS = 64
"""Completions of one call that run at one time; the others wait."""


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """Completions (without the prompts) of a batch of prompts; `on_token(row, id)` sees each token as it is chosen.

    Raises what `complete` raises.
    """
    return [row.tokens for row in complete(model, requests(prompts, settings), _tokens_alone(on_token))]


def generate_uncached(
    model: Model,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """The same as `generate`, row after row, running the whole text through the model for every token."""
    return [row.tokens for row in complete_uncached(model, requests(prompts, settings), _tokens_alone(on_token))]


def requests(prompts: Sequence[Sequence[int]], settings: GenerationSettings) -> list[Request]:
    """A call's requests, each drawing by its own place."""
    return [Request(prompt, settings, row) for row, prompt in enumerate(prompts)]


def complete(
    model: Model,
    asked: Sequence[Request],
    on_event: OnEvent | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    mesh: ParallelMesh | None = None,
    progress: Progress | None = None,
    cuda_graphs: bool = True,
) -> list[Completion]:
    """The completions of requests, all begun at once as far as MAX_ROWS allows. `tokenizer`: for their texts;
    `cuda_graphs`: see `Decoding`.

    Every rank of `mesh` makes the same call; the first has the result and the events, on others the result is empty.
    An exception from `on_event` ends the generation. Raises UserError when a prompt is empty, too long together with
    the new tokens, or has ids outside the vocabulary, and when logits are not finite.
    """
    _check(model, asked)
    sizes = sorted(map(cache_size, asked), reverse=True)
    max_tokens = sum(sizes[:MAX_ROWS])
    with evaluating(model):
        if not asked:
            return []
        if mesh is not None and mesh.rank > 0:
            follow(model, max_tokens, mesh, progress)
            return []
        with Engine(
            model,
            MAX_ROWS,
            max_tokens,
            tokenizer=tokenizer,
            mesh=mesh,
            prefill_tokens=max_tokens,
            progress=progress,
            cuda_graphs=cuda_graphs,
        ) as engine:
            rows = [engine.submit(request) for request in asked]
            while engine.busy:
                for event in engine.step():
                    if on_event is not None:
                        on_event(event)
        return rows


def complete_uncached(
    model: Model, asked: Sequence[Request], on_event: OnEvent | None = None, *, tokenizer: Tokenizer | None = None
) -> list[Completion]:
    """The same as `complete`, row after row, running the whole text through the model for every token."""
    _check(model, asked)
    rows = [Completion(number, request, tokenizer) for number, request in enumerate(asked)]
    with evaluating(model), torch.inference_mode():
        for row in rows:
            prompt, eod_id = row.request.prompt, row.request.settings.eod_id
            while row.finish is None:
                logits = score(model, [*prompt, *row.tokens], eod_id, len(prompt))
                for event in choose(logits[-1:], [row]):
                    if on_event is not None:
                        on_event(event)
    return rows


def score(model: Model, tokens: Sequence[int], eod_id: int | None = None, prompt_length: int | None = None) -> Tensor:
    """Logits [s, V] of one text in one forward pass without a cache; `eod_id` as in `GenerationSettings`.

    `prompt_length`: its tokens that were there before the first one was chosen; None: all.
    """
    ids = torch.tensor([tokens], device=next(model.parameters()).device)
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


def _check(model: Model, asked: Sequence[Request]) -> None:
    for number, request in enumerate(asked, 1):
        check_request(model.config, request, f"prompt {number}")


def _tokens_alone(on_token: OnToken | None) -> OnEvent | None:
    def on_event(event: Event) -> None:
        if on_token is not None and event.token is not None:
            on_token(event.id, event.token)

    return on_event


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """Inside the block there is no dropout; afterwards the model's mode is as before."""
    was_training = isinstance(model, nn.Module) and model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(was_training)
