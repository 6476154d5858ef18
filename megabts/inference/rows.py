"""One completion while it grows, and the choice of the next tokens of several: decisions, and no forward pass.

Each row has its own settings, its own generator and its own text; neighbours make no difference to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megabts.errors import UsageError, UserError
from megabts.inference.row_gates import Gates
from megabts.inference.sampling import penalise, sample
from megabts.inference.settings import GenerationSettings
from megabts.inference.text_stream import StopStrings, TextStream
from megabts.parallel.sharding import name_seed
from megabts.tokenizers.protocol import Tokenizer


@dataclass(frozen=True)
class Request:
    """One completion that is asked for."""

    prompt: Sequence[int]
    settings: GenerationSettings = field(default_factory=GenerationSettings)
    row: int = 0
    """Its place in a call of several rows. What is drawn depends on (settings.seed, row) and the logits alone."""
    gates: bool = False
    """Report what members counted, with every event; of BTS models only."""


@dataclass(frozen=True)
class Event:
    """What one step did to one row."""

    id: int
    """The completion's."""
    token: int | None
    """The token chosen; None where the row ended before a stop id."""
    text: str = ""
    """Text that is now certain; only with a tokenizer. Lags behind the tokens, and has it all with the last event."""
    finish: str | None = None
    """Why the row ended: "stop" (a stop id or string), "length"; None: it goes on."""
    logprob: float | None = None
    """The token's log-probability, nats, where asked for."""
    top: tuple[tuple[int, float], ...] = ()
    """(token, log-probability) of the likeliest ones, where asked for."""
    gates: Gates = ()
    """What members counted where the token was chosen, where asked for."""
    prompt_gates: tuple[Gates, ...] = ()
    """The same at every token of the prompt, with the first event."""
    offset: int = 0
    """Where the token's text begins in the completion's, characters, held back or not; only with a tokenizer."""


class Completion:
    """A request's completion so far.

    Raises UsageError for stop strings without a tokenizer.
    """

    def __init__(self, number: int, request: Request, tokenizer: Tokenizer | None = None) -> None:
        settings = request.settings
        if settings.stop_strings and tokenizer is None:
            raise UsageError("stop_strings needs a tokenizer, and there is none; give one, or use stop_ids")
        self.id = number
        self.request = request
        self.tokens: list[int] = []
        """All tokens chosen. Where a stop string ended the row, also those whose text was cut away."""
        self.text = ""
        """Text that is certain; only with a tokenizer."""
        self.logprobs: list[float] = []
        """Of the tokens, where asked for."""
        self.finish: str | None = None
        """As in `Event`, or "cancelled"."""
        self.generator = torch.Generator().manual_seed(name_seed(f"row {request.row}", settings.seed))
        self.seen: Tensor | None = None
        """Ids in prompt or completion, bool [V]; kept where there is a penalty."""
        self._stream = TextStream(tokenizer, request.prompt) if tokenizer else None
        self._stops = StopStrings(settings.stop_strings)
        self._length = 0
        """Characters of the tokens, those held back for stop strings too."""

    def take(self, token: int, logprob: float | None = None, top: tuple[tuple[int, float], ...] = ()) -> Event:
        """The row goes on with this token, or ends."""
        settings = self.request.settings
        if token in settings.stop_ids:
            return self._event(None, "", "stop", None, top)
        offset = self._length
        self.tokens.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if self.seen is not None:
            self.seen[token] = True
        piece = self._stream.add(token) if self._stream else ""
        self._length += len(piece)
        text, stopped = self._stops.add(piece)
        full = len(self.tokens) == settings.max_new_tokens
        finish = "stop" if stopped else "length" if full else None
        return self._event(token, text, finish, logprob, top, stopped, offset)

    def _event(
        self,
        token: int | None,
        text: str,
        finish: str | None,
        logprob: float | None,
        top: tuple[tuple[int, float], ...],
        cut: bool = False,
        offset: int = 0,
    ) -> Event:
        if finish and self._stream and not cut:
            rest, cut = self._stops.add(self._stream.finish())
            text += rest
            finish = "stop" if cut else finish
            text += "" if cut else self._stops.finish()
        self.finish = finish
        self.text += text
        return Event(self.id, token, text, finish, logprob, top, offset=offset)


def choose(logits: Tensor, rows: Sequence[Completion]) -> list[Event]:
    """Take a token for every row from logits [rows, V].

    Raises UserError when logits are not finite.
    """
    groups: dict[tuple[int, float, int, float], list[int]] = {}
    for index, row in enumerate(rows):
        s = row.request.settings
        groups.setdefault((s.num_ids, s.temperature, s.top_k, s.top_p), []).append(index)
    events: dict[int, Event] = {}
    for (num_ids, temperature, top_k, top_p), members in groups.items():
        own = logits if len(members) == len(rows) else logits[members]
        own = own[:, : num_ids or None]
        if not bool(own.amax(-1).isfinite().all()):
            raise UserError("the model's logits are not finite; the checkpoint is damaged or its training diverged")
        chosen = sample(
            _penalised(own, [rows[index] for index in members]),
            temperature,
            top_k,
            top_p,
            [rows[index].generator for index in members],
        )
        for index, token in zip(members, chosen.tolist(), strict=True):
            events[index] = rows[index].take(token, *_logprobs(logits[index], token, rows[index].request.settings))
    return [events[index] for index in range(len(rows))]


def _penalised(logits: Tensor, rows: Sequence[Completion]) -> Tensor:
    penalties = [row.request.settings.repetition_penalty for row in rows]
    if all(penalty == 1 for penalty in penalties):
        return logits
    for row, penalty in zip(rows, penalties, strict=True):
        if penalty != 1 and row.seen is None:
            ids = [token for token in (*row.request.prompt, *row.tokens) if token < logits.shape[1]]
            row.seen = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
            row.seen[ids] = True
    return torch.stack(
        [
            scores if row.seen is None else penalise(scores, row.seen, penalty)
            for scores, row, penalty in zip(logits, rows, penalties, strict=True)
        ]
    )


def _logprobs(
    logits: Tensor, token: int, settings: GenerationSettings
) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    """Log-probability of the token and of the likeliest ones that could be chosen, among all V."""
    if settings.logprobs is None:
        return None, ()
    logprobs = logits.double().log_softmax(-1)[: settings.num_ids or None]
    values, ids = logprobs.topk(min(settings.logprobs, len(logprobs)))
    return float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True))
