"""From what the engine tells to OpenAI's JSON: whole answers, and chunks of streamed ones."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megabts.inference.rows import Event
from megabts.inference.text_stream import INCOMPLETE
from megabts.serving.requests import Asked
from megabts.serving.served import Served

Kind = Literal["completion", "chat"]


@dataclass
class _Choice:
    """A completion as told so far."""

    text: str = ""
    num_tokens: int = 0
    finish: str | None = None
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[dict[str, Any]] = field(default_factory=list)
    prompt_tokens: list[dict[str, Any]] | None = None


class Answer:
    """One request's answer, growing."""

    def __init__(self, kind: Kind, asked: Asked, served: Served) -> None:
        self.kind = kind
        self.asked = asked
        self.served = served
        self.choices = [_Choice() for _ in asked.rows]
        self._head = {
            "id": f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": served.name,
        }

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first token: a chat's say who speaks."""
        if self.kind != "chat":
            return []
        role = {"role": "assistant", "content": ""}
        return [self._chunk([self._choice(index, {"delta": role})]) for index in range(len(self.choices))]

    def add(self, index: int, event: Event) -> list[dict[str, Any]]:
        """Take one event; the chunks it makes."""
        choice, chunks = self.choices[index], []
        extra: dict[str, Any] = {}
        if event.token is not None:
            choice.num_tokens += 1
            if self.asked.logprobs is not None:
                entry = self._logprob(event)
                choice.logprobs.append(entry)
                extra["logprobs"] = self._logprobs([entry])
        if self.asked.gates:
            if event.prompt_gates:
                first, *others = self.asked.rows[index].prompt
                texts = [self.served.tokenizer.decode([first]), *map(self._show, others)]
                choice.prompt_tokens = _with_gates(texts, event.prompt_gates)
                begun = {"text": "", "prompt_tokens": choice.prompt_tokens}
                chunks.append(self._chunk([self._choice(index, begun)]))
            extra["gates"] = _rounded(event.gates)
            if event.token is not None:
                choice.tokens += _with_gates([self._show(event.token)], [event.gates])
        choice.text += event.text
        choice.finish = event.finish
        if event.text or extra or event.finish:
            part = {"delta": {"content": event.text}} if self.kind == "chat" else {"text": event.text}
            chunks.append(self._chunk([self._choice(index, {**part, **extra}, event.finish)]))
        return chunks

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk where usage is asked for."""
        return {**self._chunk([]), "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Tokens read and generated; a prompt counts once, however many choices it has."""
        rows = self.asked.rows[:: self.asked.num_choices]
        prompt, new = sum(len(row.prompt) for row in rows), sum(choice.num_tokens for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def whole(self) -> dict[str, Any]:
        """The answer to a request that is not streamed."""
        choices = []
        for index, choice in enumerate(self.choices):
            part: dict[str, Any] = {"text": choice.text}
            if self.kind == "chat":
                part = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
            if self.asked.logprobs is not None:
                part["logprobs"] = self._logprobs(choice.logprobs)
            if self.asked.gates:
                part |= {"prompt_tokens": choice.prompt_tokens, "tokens": choice.tokens}
            choices.append(self._choice(index, part, choice.finish))
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        return {**self._head, "object": name, "choices": choices, "usage": self.usage()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        return {**self._head, "object": name, "choices": choices}

    def _choice(self, index: int, part: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {"index": index, "logprobs": None, **part, "finish_reason": finish}

    def _logprob(self, event: Event) -> dict[str, Any]:
        assert event.token is not None
        chosen = self._token_logprob(event.token, event.logprob)
        return {**chosen, "offset": event.offset, "top": [self._token_logprob(*pair) for pair in event.top]}

    def _token_logprob(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._show(token)
        whole = INCOMPLETE not in text
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}

    def _logprobs(self, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if self.kind == "chat":
            content = [
                {**{name: entry[name] for name in ("token", "logprob", "bytes")}, "top_logprobs": entry["top"]}
                for entry in entries
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            # of tokens with one text (halves of characters) the likeliest counts
            "top_logprobs": [{top["token"]: top["logprob"] for top in reversed(entry["top"])} for entry in entries],
            "text_offset": [entry["offset"] for entry in entries],
        }

    def _show(self, token: int) -> str:
        """A token's text where it continues a text: at its beginning some tokenizers leave out a blank."""
        tokenizer = self.served.tokenizer
        if token >= tokenizer.vocab_size:
            return ""
        return tokenizer.decode([token, token])[len(tokenizer.decode([token])) :]


def _rounded(gates: Sequence[Sequence[float | None]]) -> list[list[float | None]]:
    return [[None if weight is None else round(weight, 4) for weight in layer] for layer in gates]


def _with_gates(texts: Sequence[str], gates: Sequence[Sequence[Sequence[float | None]]]) -> list[dict[str, Any]]:
    return [{"text": text, "gates": _rounded(token)} for text, token in zip(texts, gates, strict=True)]
