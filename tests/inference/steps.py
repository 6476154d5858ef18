"""Forward passes of a batch, one by one, for tests that look at logits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megabts.inference.decoding import Admission, Decoding, Step
from megabts.model.decoder import Model


class Batch:
    """Rows that all begin together and take the tokens they are told."""

    def __init__(
        self, model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int, eod_id: int | None = None
    ) -> None:
        sizes = [len(prompt) + max_new_tokens for prompt in prompts]
        self.decoding = Decoding(model, sum(sizes))
        starts = [sum(sizes[:row]) for row in range(len(prompts))]
        self.admitted = [Admission(start, prompt, eod_id) for start, prompt in zip(starts, prompts, strict=True)]

    def begin(self) -> Tensor:
        """Logits [b, V] after the prompts."""
        return self._run(Step(admitted=self.admitted))

    def extend(self, token: int) -> Tensor:
        """Logits [b, V] after this token, in every row."""
        rows = len(self.admitted)
        return self._run(Step(range(rows), [token] * rows))

    def _run(self, step: Step) -> Tensor:
        with torch.inference_mode():
            logits = self.decoding.run(step)
        assert logits is not None
        return logits
