"""The forward passes of a batch whose rows come and go: one cache per member, the model's memory, and no decisions.

Each call of `Decoding.run` carries out one `Step`: rows leave, the others read one token each, and new rows read their
prompts. Whoever decides (`megabts.inference.engine`) sends every rank of the model the same steps.

On a GPU a decode step is recorded as a CUDA graph where it is a `OneToken`'s (see `runtime.graphs`). The step that is
recorded reads which tokens, places and documents from one tensor, and attends to a rounded number of columns under a
mask. Caches and weights stay where they are as long as the `Decoding` that recorded it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megabts.inference.kv_cache import Decode, KVCache, Places, Prefill, bucket
from megabts.inference.one_token import OneToken
from megabts.model.attention import Context
from megabts.model.decoder import Model
from megabts.model.rope import inverse_frequencies, rotation
from megabts.parallel.mesh import ParallelMesh
from megabts.runtime.graphs import Graphs, Record, recorder


@dataclass(frozen=True)
class Admission:
    """A row that begins."""

    start: int
    """Where its stretch of the caches begins."""
    prompt: Sequence[int]
    eod_id: int | None = None
    """See `GenerationSettings`."""


@dataclass(frozen=True)
class Step:
    """What one step does, on every rank."""

    kept: Sequence[int] = ()
    """Rows of the step before that go on; they keep this order."""
    tokens: Sequence[int] = ()
    """The token that each of them reads."""
    admitted: Sequence[Admission] = field(default=())
    """Rows that begin, after those."""
    gates: bool = False
    """Whether gates are looked at, which ranks must do alike."""


@dataclass
class _Row:
    start: int
    length: int
    eod_id: int | None
    document: int
    """Position where the document of its next token starts; 0 where attention crosses documents."""

    def read(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            self.length += 1
            if token == self.eod_id:
                self.document = self.length


class Decoding:
    """Rows in progress. `capacity`: tokens that each member's cache has room for. `cuda_graphs`: see above."""

    def __init__(
        self, model: Model, capacity: int, mesh: ParallelMesh | None = None, *, cuda_graphs: bool = True
    ) -> None:
        self.model = model
        self.capacity = capacity
        self.device = next(model.parameters()).device
        tp = 1 if mesh is None else mesh.tp.size
        self.cache = KVCache.empty(
            model.config, tp, capacity, model.dtype, self.device, members=model.num_local_members
        )
        """Of all members together."""
        self.caches = self.cache.split(model.num_local_members)
        self._one_token = OneToken.of(model)
        self._frequencies = inverse_frequencies(model.config).to(self.device)
        self._graphs: Graphs | None = None
        if cuda_graphs and self._one_token is not None:
            self.record_with(recorder(self.device))
        self.memory: dict[str, Tensor] = {}
        """The model's, of the rows in progress; rows are the first dimension of each tensor."""
        self._rows: list[_Row] = []

    def run(self, step: Step) -> Tensor | None:
        """Logits [rows, V] after the last token of every row, those admitted last; None when no row is left."""
        if list(step.kept) != list(range(len(self._rows))):
            index = torch.tensor(step.kept, dtype=torch.long, device=self.device)
            self._rows = [self._rows[row] for row in step.kept]
            self.memory = {name: part[index] for name, part in self.memory.items()} if self._rows else {}
        logits = [self._decode(step.tokens)] if self._rows else []
        if step.admitted:
            logits.append(self._prefill(step.admitted))
        return torch.cat(logits) if len(logits) > 1 else next(iter(logits), None)

    def record_with(self, record: Record | None) -> None:
        """How decode steps are recorded from now on; None: they are not."""
        self._graphs = None if record is None else Graphs(record)

    def _decode(self, tokens: Sequence[int]) -> Tensor:
        rows = self._rows
        positions, documents = [row.length for row in rows], [row.document for row in rows]
        starts, ends = [row.start for row in rows], [position + 1 for position in positions]
        if self._graphs is not None and self._one_token is not None and self._one_token.recordable:
            told = torch.tensor([tokens, positions, documents, starts], device=self.device)
            logits = self._graphs(self._masked_step, told, *bucket(starts, ends, self.capacity))
        else:
            told = torch.tensor([tokens, positions, documents], device=self.device)
            places = Decode.of(starts, ends, self.capacity, self.device)
            masked = any(documents) or min(ends) < max(ends)
            logits = self._step(told, places, _decode_mask(told, max(ends)) if masked else None)
        for row, token in zip(rows, tokens, strict=True):
            row.read([token])
        return logits

    def _masked_step(self, told: Tensor, width: int, distance: int | None, first: int) -> Tensor:
        """What is recorded: logits [b, V] of tokens, positions, documents and starts, [4, b]. Doing it again changes
        nothing."""
        places = Decode.at(told[3], told[1] + 1, width, distance, first)
        return self._step(told, places, _decode_mask(told, width))

    def _step(self, told: Tensor, places: Places, mask: Tensor | None) -> Tensor:
        """One token of every row; told: tokens, positions and documents, each [b]."""
        starts = (told[1] == told[2]).unsqueeze(1)
        return self._forward(told[0].unsqueeze(1), told[1:2], mask, starts, 1, places, self.memory)

    def _prefill(self, admitted: Sequence[Admission]) -> Tensor:
        width = max(len(new.prompt) for new in admitted)
        crosses = self.model.config.cross_document_attention
        rows = [_Row(new.start, 0, None if crosses else new.eod_id, 0) for new in admitted]
        padded = [[0] * (width - len(new.prompt)) + list(new.prompt) for new in admitted]
        tokens = torch.tensor(padded, device=self.device)
        padding = torch.tensor([width - len(new.prompt) for new in admitted], device=self.device)
        columns = torch.arange(width, device=self.device)
        positions = (columns - padding.unsqueeze(1)).clamp(min=0).T
        ends = torch.tensor([-1 if row.eod_id is None else row.eod_id for row in rows], device=self.device)
        documents = document_numbers((tokens == ends.unsqueeze(1)) & (columns >= padding.unsqueeze(1)))
        starts = (columns == padding.unsqueeze(1)) | (
            (documents.diff(dim=1, prepend=documents[:, :1]) > 0) & (columns > padding.unsqueeze(1))
        )
        for row, new in zip(rows, admitted, strict=True):
            row.read(new.prompt)
        places = Prefill([(row.start, row.length) for row in rows])
        ragged, divided = any(row.length < width for row in rows), any(row.eod_id is not None for row in rows)
        mask = _prefill_mask(padding, documents) if ragged or divided else None
        memory: dict[str, Tensor] = {}
        logits = self._forward(tokens, positions if ragged else columns, mask, starts, width, places, memory)
        if self._rows:
            memory = {name: torch.cat([self.memory[name], part]) for name, part in memory.items()}
        self.memory = memory
        self._rows += rows
        return logits

    def _forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        starts: Tensor,
        prompt_length: int,
        places: Places,
        memory: dict[str, Tensor],
    ) -> Tensor:
        model = self.model
        for cache in (self.cache, *self.caches):
            cache.places = places
        context = Context(
            rotation(model.config, positions, model.dtype, self._frequencies),
            mask,
            tokens=tokens,
            starts=starts,
            prompt_length=prompt_length,
            memory=memory,
        )
        hidden = model.embed(tokens)
        if self._one_token is not None and isinstance(places, Decode):
            hidden = self._one_token.run_layers(hidden, context, self.cache)
            return self._one_token.logits(hidden, context)[:, 0]
        hidden = model.run_layers(0, model.config.num_layers, hidden, context, self.caches)
        return model.logits(hidden, context, last=True)[:, 0]


def _decode_mask(told: Tensor, width: int) -> Tensor:
    """Where the new tokens of rows may look, [b, 1, 1, width]: to their position, from where their document starts."""
    columns = torch.arange(width, device=told.device)
    mask = (columns <= told[1].unsqueeze(1)) & (columns >= told[2].unsqueeze(1))
    return mask[:, None, None]


def document_numbers(ends: Tensor) -> Tensor:
    """Which document each place belongs to, from 0, given where documents end [b, s]; the end belongs to its own."""
    return ends.cumsum(1) - ends.long()


def _prefill_mask(padding: Tensor, documents: Tensor) -> Tensor:
    """Where the columns of prompts padded on the left may look, [b, 1, s, s]: in their document, not to padding."""
    columns = torch.arange(documents.shape[1], device=padding.device)
    causal = columns <= columns.unsqueeze(1)
    allowed = causal & (columns >= padding.unsqueeze(1)).unsqueeze(1)
    allowed &= documents.unsqueeze(2) == documents.unsqueeze(1)
    # A padding column looks at itself: a softmax over nothing would be NaN.
    return (allowed | (columns == columns.unsqueeze(1))).unsqueeze(1)
