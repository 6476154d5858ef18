"""Text of a completion while it grows, in whole characters.

One token may end in the middle of a character (byte-level BPE, byte fallback), and what a token decodes to depends on
those before it (SentencePiece drops a leading space). So each step decodes a short window that begins at a place where
the text was whole, and holds back what ends in U+FFFD, the sign of bytes that do not make a character yet.
"""

from collections.abc import Sequence

from megabts.tokenizers.protocol import Tokenizer

INCOMPLETE = "\ufffd"


class TextStream:
    """The pieces together are decode(prompt + completion) without decode(prompt)."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self._ids = list(prompt)
        self._start = 0
        """Where the window begins."""
        self._shown = len(self._ids)
        """How many ids are text already given out (or the prompt's)."""

    def add(self, token: int) -> str:
        """The new text that this token completes; "" while a character is incomplete."""
        self._ids.append(token)
        return self._new_text(final=False)

    def finish(self) -> str:
        """What was held back: bytes that never became a character, as U+FFFD."""
        return self._new_text(final=True)

    def _new_text(self, final: bool) -> str:
        before = self.tokenizer.decode(self._ids[self._start : self._shown])
        after = self.tokenizer.decode(self._ids[self._start :])
        if len(after) <= len(before) or (after.endswith(INCOMPLETE) and not final):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return after[len(before) :]
