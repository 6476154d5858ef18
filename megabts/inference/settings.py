"""What a request may ask for."""

import math
from dataclasses import dataclass

from megabts.errors import UsageError


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
    repetition_penalty: float = 1.0
    """Positive logits of ids in prompt or completion are divided by it, others multiplied (Keskar et al.,
    arXiv 1909.05858, section 4.1, in the form of transformers); 1: off."""
    stop_strings: tuple[str, ...] = ()
    """A row ends where its completion's text first has one of these; the text is cut before it. Needs a tokenizer."""
    logprobs: int | None = None
    """Report each token's log-probability, and that many likeliest tokens with theirs; None: nothing. They are the
    model's own, before penalty and temperature."""

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
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise UsageError(f"repetition_penalty is {self.repetition_penalty}; give a positive number, 1 for none")
        if "" in self.stop_strings:
            raise UsageError("stop_strings is given an empty string, which every text has; leave it out")
        if self.logprobs is not None and self.logprobs < 0:
            raise UsageError(f"logprobs is {self.logprobs}; give a number of likeliest tokens, 0 for the chosen alone")
