"""Continuous batching: requests come and go while the batch runs, and no row knows of the others.

    engine = Engine(model, max_rows=16, max_tokens=16 * 1024, tokenizer=tokenizer)
    completion = engine.submit(Request(prompt, GenerationSettings(max_new_tokens=100)))
    while engine.busy:
        for event in engine.step():
            ...

A step reads one token of every running row, and the prompts of waiting requests that there is room for: a row of the
batch, and tokens in the caches for prompt and completion together, taken when the row begins. So memory is known before
the first token, and a row that began can finish. Requests begin in the order in which they came.

The engine has no threads and does no input or output. It is used from one thread, on the first rank; other ranks of
the model are in `ranks.follow` meanwhile, with the same `max_tokens`.
"""

from collections import deque
from dataclasses import replace
from types import TracebackType

import torch

from megabts.bts.model import BTSModel
from megabts.config.model import ModelConfig
from megabts.errors import UsageError, UserError
from megabts.inference.decoding import Admission, Decoding, Step
from megabts.inference.kv_cache import Stretches, cache_bytes
from megabts.inference.ranks import check_mesh, send
from megabts.inference.row_gates import observe_gates, row_gates
from megabts.inference.rows import Completion, Event, Request, choose
from megabts.model.decoder import Model
from megabts.parallel.mesh import ParallelMesh
from megabts.runtime.progress import Progress
from megabts.tokenizers.protocol import Tokenizer


class Engine:
    """A model that completes requests. It is put into evaluation mode.

    `max_rows`: completions that run at one time. `max_tokens`: tokens of theirs, prompts included, that the caches have
    room for. `tokenizer`: for text in events, and stop strings. `prefill_tokens`: of prompts that begin in one step,
    padding included; a longer one begins alone. `progress` is told of every step. `cuda_graphs`: see `Decoding`.
    """

    def __init__(
        self,
        model: Model,
        max_rows: int,
        max_tokens: int,
        *,
        tokenizer: Tokenizer | None = None,
        mesh: ParallelMesh | None = None,
        prefill_tokens: int = 4096,
        progress: Progress | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        self.mesh = mesh or ParallelMesh()
        check_mesh(self.mesh)
        assert self.mesh.rank == 0, "the other ranks follow"
        model.train(False)
        self.model = model
        self.tokenizer = tokenizer
        self.max_rows = max_rows
        self.max_tokens = max_tokens
        self.prefill_tokens = prefill_tokens
        self._progress = progress or Progress()
        with torch.inference_mode():
            self._decoding = Decoding(model, max_tokens, mesh, cuda_graphs=cuda_graphs)
        self._stretches = Stretches(max_tokens)
        self._waiting: deque[Completion] = deque()
        self._rows: list[Completion] = []
        """Those of the last forward pass, in its order."""
        self._taken: dict[int, tuple[int, int]] = {}
        """Stretch of the caches of each completion that runs, by its number."""
        self._submitted = 0
        self._steps = 0

    @property
    def cache_bytes(self) -> int:
        """Memory of all caches on this rank, bytes; it does not change."""
        model = self.model
        return model.num_local_members * cache_bytes(model.config, self.mesh.tp.size, self.max_tokens, model.dtype)

    @property
    def num_running(self) -> int:
        """Completions that have begun and not ended."""
        return len(self._taken)

    @property
    def num_waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._taken or self._waiting)

    def submit(self, request: Request) -> Completion:
        """Queue a request; what it becomes is in the completion returned, and in events with its `id`.

        Raises UserError for a prompt that this model or engine cannot continue, UsageError for stop strings without
        a tokenizer.
        """
        check_request(self.model.config, request)
        if request.gates and not isinstance(self.model, BTSModel):
            raise UsageError("gates are asked for, and the model has none; ask a BTS model, or leave them out")
        if cache_size(request) > self.max_tokens:
            raise UserError(
                f"the prompt has {len(request.prompt)} tokens, with {request.settings.max_new_tokens} new ones more "
                f"than the {self.max_tokens} that the caches have room for; shorten it or ask for fewer"
            )
        completion = Completion(self._submitted, request, self.tokenizer)
        self._submitted += 1
        self._waiting.append(completion)
        return completion

    def cancel(self, completion: Completion) -> None:
        """End a completion, if it has not ended: it takes no further part in any step, and has no further event."""
        if completion.finish is None:
            completion.finish = "cancelled"
            self._release(completion)
            if completion in self._waiting:
                self._waiting.remove(completion)

    def step(self) -> list[Event]:
        """One token for every running row, the rows that begin now included; what happened, row by row.

        Without anything to do it tells other ranks so: where there are some, call it now and then, or they take
        silence for a hang. Raises UserError when logits are not finite.
        """
        kept = [index for index, row in enumerate(self._rows) if row.finish is None]
        tokens = [self._rows[index].tokens[-1] for index in kept]
        rows = [self._rows[index] for index in kept]
        new = self._begin(self.max_rows - len(rows))
        admitted = [Admission(self._taken[c.id][0], c.request.prompt, c.request.settings.eod_id) for c in new]
        self._rows = rows + new
        self._steps += 1
        self._progress.enter("decoding", self._steps, timed=False)
        with_gates = any(row.request.gates for row in self._rows)
        step = Step(kept, tokens, admitted, with_gates)
        if self.mesh.world_size > 1:
            send(step, self._decoding.device)
        with torch.inference_mode(), observe_gates(self.model, with_gates) as seen:
            logits = self._decoding.run(step)
            events = [] if logits is None else choose(logits, self._rows)
        if with_gates:
            found = row_gates(self.model, seen, len(kept), [len(completion.request.prompt) for completion in new])
            events = [
                replace(event, gates=gates.last, prompt_gates=gates.prompt) if row.request.gates else event
                for event, gates, row in zip(events, found, self._rows, strict=True)
            ]
        for completion in self._rows:
            if completion.finish is not None:
                self._release(completion)
        return events

    def close(self) -> None:
        """Send the other ranks home. Call it once, after the last step; not after an error, which ends them too."""
        if self.mesh.world_size > 1:
            send(None, self._decoding.device)

    def __enter__(self) -> "Engine":
        """Inside a `with` block, which closes the engine unless it ends with an error."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """See `__enter__`."""
        if kind is None:
            self.close()

    def _begin(self, num_rows: int) -> list[Completion]:
        """The first of those waiting, as far as there is room; they have taken it then."""
        new: list[Completion] = []
        width = 0
        while self._waiting and len(new) < num_rows:
            request = self._waiting[0].request
            width = max(width, len(request.prompt))
            if new and width * (len(new) + 1) > self.prefill_tokens:
                break
            size = cache_size(request)
            start = self._stretches.take(size)
            if start is None:
                break
            completion = self._waiting.popleft()
            self._taken[completion.id] = (start, size)
            new.append(completion)
        return new

    def _release(self, completion: Completion) -> None:
        stretch = self._taken.pop(completion.id, None)
        if stretch is not None:
            self._stretches.give(*stretch)


def cache_size(request: Request) -> int:
    """Tokens of a cache that a request takes: the last token chosen is never read, so it needs none."""
    return len(request.prompt) + request.settings.max_new_tokens - 1


def check_request(config: ModelConfig, request: Request, name: str = "the prompt") -> None:
    """Raises UserError when a prompt cannot be continued by so many tokens."""
    prompt, new, limit = request.prompt, request.settings.max_new_tokens, config.max_seq_len
    if not prompt:
        raise UserError(f"{name} is empty; begin with at least one token")
    if len(prompt) + new > limit:
        raise UserError(
            f"{name} has {len(prompt)} tokens, with {new} new ones {len(prompt) + new}: "
            f"more than the model's {limit} (model.max_seq_len); shorten it or ask for fewer"
        )
    for token in prompt:
        if not 0 <= token < config.vocab_size:
            raise UserError(
                f"{name} has token {token}, the model's vocabulary ends at {config.vocab_size - 1}; "
                "is this the model's tokenizer?"
            )
