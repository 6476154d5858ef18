"""What is served: a model, its tokenizer, its name, and the limits of what may be asked of it."""

from dataclasses import dataclass
from typing import Any

from megabts.bts.gates import gate_places
from megabts.bts.model import BTSModel
from megabts.build import Built
from megabts.config.model import ModelConfig
from megabts.serving.errors import refuse
from megabts.tokenizers.protocol import Tokenizer


@dataclass(frozen=True)
class Limits:
    """Of the server, and of one request."""

    max_rows: int = 16
    """Completions that run at one time."""
    max_tokens: int = 0
    """Tokens that the caches have room for, prompts included."""
    queue: int = 64
    """Completions that may wait."""
    max_prompt_tokens: int = 0
    max_new_tokens: int = 0
    body_bytes: int = 4 * 2**20
    read_seconds: float = 10.0
    """From a connection's or request's first byte to its last."""
    drain_seconds: float = 3.5
    """What requests in progress have left when the server is told to stop."""


@dataclass(frozen=True)
class Served:
    """A model behind the interface. It never changes, so every thread may read it."""

    model: Built
    method: str
    name: str
    tokenizer: Tokenizer
    encoder: Tokenizer
    """Makes ids of prompts: the tokenizer, or the same with its template's special tokens."""
    limits: Limits
    alone: bool = True
    """Whether one rank holds the whole model."""
    cuda_graphs: bool = True
    """Whether decode steps are recorded, on a GPU."""

    @property
    def model_config(self) -> ModelConfig:
        """The model's sizes."""
        return self.model.config

    @property
    def stitched(self) -> bool:
        """Whether there are gates to see."""
        return isinstance(self.model, BTSModel)

    @property
    def experts(self) -> tuple[str, ...]:
        """Those that a request may leave out."""
        return tuple(self.model.bts.experts) if isinstance(self.model, BTSModel) else ()

    def room(self, variant: bool) -> int:
        """Tokens of the caches of the whole model, or of a variant without some experts."""
        return min(self.limits.max_tokens, 4 * self.model_config.max_seq_len) if variant else self.limits.max_tokens

    def encode(self, text: str, *, whole: bool = False) -> list[int]:
        """Ids of a prompt; an empty one begins as a document does. Raises ApiError where that is impossible.

        `whole`: the text has its special tokens written out, and none are to be added.
        """
        try:
            ids = (self.tokenizer if whole else self.encoder).encode(text)
        except ValueError as error:  # integers as text have no other words
            raise refuse(str(error), "prompt") from None
        if not ids and self.tokenizer.eod_id is None:
            raise refuse("the prompt is empty and the tokenizer has no end-of-document token; send a text", "prompt")
        return ids or [self.tokenizer.eod_id or 0]

    def describe(self) -> dict[str, Any]:
        """The `megabts` object of /v1/models."""
        members, places = [], []
        if isinstance(self.model, BTSModel):
            members = list(self.model.bts.members)
            places = [
                {"index": index, "kind": place.kind, "layer": place.after}
                for index, place in enumerate(gate_places(self.model))
            ]
        longest = min(self.model_config.max_seq_len, self.limits.max_tokens)
        return {"method": self.method, "members": members, "gate_places": places, "max_tokens": longest}
