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


class StopStrings:
    """Holds back what may become a stop string, and ends the text before the first one that is complete.

    Of two that are complete with the same character the one that begins first counts, so it does not matter in what
    pieces the text comes.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = strings
        self._held = ""

    def add(self, piece: str) -> tuple[str, bool]:
        """Text that is now certain, and whether a stop string was found: then it is the last."""
        text = self._held + piece
        places = [(text.find(string), string) for string in self.strings]
        ends = [(place + len(string), place) for place, string in places if place >= 0]
        if ends:
            self._held = ""
            return text[: min(ends)[1]], True
        longest = max((_overlap(text, string) for string in self.strings), default=0)
        self._held = text[len(text) - longest :]
        return text[: len(text) - longest], False

    def finish(self) -> str:
        """What was held back and became no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of the text that `string` begins with."""
    longest = min(len(text), len(string) - 1)
    return next(length for length in range(longest, -1, -1) if text.endswith(string[:length]))
