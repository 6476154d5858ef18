"""From a request's JSON to what the engine is asked: both kinds of completions.

Every field is one of OpenAI's, except `top_k`, `repetition_penalty`, and, of plain completions, `gates` and `without`.
Fields that do nothing here are accepted where they ask for nothing (NEUTRAL); every other field is refused by name.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megabts.config.methods import HUB
from megabts.errors import UserError
from megabts.inference.engine import cache_size, check_request
from megabts.inference.rows import Request
from megabts.inference.settings import GenerationSettings
from megabts.serving.chat import ChatTemplate
from megabts.serving.errors import ApiError, refuse
from megabts.serving.fields import Fields, check_text
from megabts.serving.served import Served

_SAMPLING = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "n",
    "stop",
    "seed",
    "stream",
    "stream_options",
    "logprobs",
    "model",
)
COMPLETION_FIELDS = (*_SAMPLING, "prompt", "gates", "without")
CHAT_FIELDS = (*_SAMPLING, "messages", "max_completion_tokens", "top_logprobs")
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "user": (),
    "metadata": (),
    "service_tier": (),
    "safety_identifier": (),
    "prompt_cache_key": (),
    "store": (False,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
}
"""Fields that are accepted with these values and do nothing; (): with any value."""
COMPLETION_NEUTRAL = {**NEUTRAL, "best_of": (1,), "echo": (False,), "suffix": ("",)}
CHAT_NEUTRAL = {
    **NEUTRAL,
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "modalities": (["text"],),
}
DEFAULT_MAX_TOKENS = 16
"""Of a plain completion, as OpenAI has it; a chat goes on as far as it may."""
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
MAX_CHOICES = 128


@dataclass(frozen=True)
class Asked:
    """A request, checked."""

    rows: Sequence[Request]
    """One of every choice: the first prompt's `n`, then the second's."""
    stream: bool
    include_usage: bool
    logprobs: int | None
    """Likeliest tokens to report with each token; None: no log-probabilities."""
    gates: bool
    without: frozenset[str]
    num_choices: int
    """Of each prompt."""


def read_completion(content: dict[str, Any], served: Served) -> Asked:
    """A body of /v1/completions. Raises ApiError."""
    fields = Fields(content, COMPLETION_FIELDS, COMPLETION_NEUTRAL)
    prompts = [_encode(prompt, served) for prompt in _prompts(fields.get("prompt"))]
    logprobs = fields.integer("logprobs", None, 0, MAX_TOP_LOGPROBS)
    most = fields.integer("max_tokens", DEFAULT_MAX_TOKENS, 1, served.limits.max_new_tokens)
    gates = fields.flag("gates")
    if gates and not served.stitched:
        raise refuse(f"{served.name} is a {served.method} model and has no gates; leave gates out", "gates")
    settings = _settings(fields, served, logprobs)
    without = _without(fields, served)
    return _asked(fields, served, prompts, settings, most, gates=gates, without=without)


def read_chat(content: dict[str, Any], served: Served, template: ChatTemplate) -> Asked:
    """A body of /v1/chat/completions. Raises ApiError."""
    fields = Fields(content, CHAT_FIELDS, CHAT_NEUTRAL)
    prompt = served.encode(template.render(_messages(fields.get("messages"))), whole=template.own)
    wanted, top = fields.flag("logprobs"), fields.integer("top_logprobs", None, 0, MAX_TOP_LOGPROBS)
    if top is not None and not wanted:
        raise refuse("top_logprobs needs logprobs true; set it, or leave top_logprobs out", "top_logprobs")
    limit = served.limits.max_new_tokens
    given = [name for name in ("max_completion_tokens", "max_tokens") if fields.get(name) is not None]
    if len(given) > 1:
        raise refuse("max_completion_tokens and max_tokens are one; leave max_tokens out", "max_tokens")
    most = fields.integer(given[0], None, 1, limit) if given else None
    settings = _settings(fields, served, (top or 0) if wanted else None, template.stops)
    return _asked(fields, served, [prompt], settings, most)


def _asked(
    fields: Fields,
    served: Served,
    prompts: Sequence[list[int]],
    settings: GenerationSettings,
    most: int | None,
    *,
    gates: bool = False,
    without: frozenset[str] = frozenset(),
) -> Asked:
    """`most` None: as many new tokens as there is room for."""
    n = fields.integer("n", 1, 1, MAX_CHOICES) or 1
    num_rows, room = n * len(prompts), served.limits.max_rows + served.limits.queue
    if num_rows > room:
        raise refuse(f"{num_rows} completions are asked for at once, the server takes {room}; ask for fewer", "n")
    rows = []
    for prompt in prompts:
        new = most or _room(len(prompt), served, bool(without))
        for choice in range(n):
            request = Request(prompt, replace(settings, max_new_tokens=new), choice, gates=gates)
            _check(request, served, bool(without))
            rows.append(request)
    stream = fields.flag("stream")
    usage = _include_usage(fields.get("stream_options"), stream)
    return Asked(rows, stream, usage, settings.logprobs, gates, without, n)


def _check(request: Request, served: Served, variant: bool) -> None:
    """Raises ApiError with both numbers where a prompt, or prompt and new tokens, are too long."""
    num_prompt, limits = len(request.prompt), served.limits
    if num_prompt > limits.max_prompt_tokens:
        raise _too_long(f"the prompt has {num_prompt} tokens, the server takes {limits.max_prompt_tokens}; shorten it")
    try:
        check_request(served.model_config, request)
    except UserError as error:
        raise _too_long(str(error)) from None
    room = served.room(variant)
    if cache_size(request) > room:
        raise _too_long(
            f"the prompt has {num_prompt} tokens, with {request.settings.max_new_tokens} new ones more than the {room} "
            "that the server has room for; shorten it or ask for fewer"
        )


def _too_long(message: str) -> ApiError:
    return refuse(message, "prompt", "context_length_exceeded")


def _room(num_prompt: int, served: Served, variant: bool) -> int:
    room = min(served.model_config.max_seq_len, served.room(variant)) - num_prompt
    return max(1, min(room, served.limits.max_new_tokens))


def _settings(fields: Fields, served: Served, logprobs: int | None, stops: tuple[str, ...] = ()) -> GenerationSettings:
    name = fields.get("model")
    if name is not None and name != served.name:
        shown = name[:80] if isinstance(name, str) else "given"
        raise ApiError(404, f"there is no model {shown!r}; this is {served.name!r}", "model", "model_not_found")
    seed = fields.integer("seed", None, -(2**63), 2**63 - 1)
    eod = served.tokenizer.eod_id
    return GenerationSettings(
        temperature=fields.number("temperature", 1.0, 0.0, 2.0),
        top_p=fields.number("top_p", 1.0, 1e-6, 1.0),
        top_k=fields.integer("top_k", 0, 0, 2**31) or 0,
        repetition_penalty=fields.number("repetition_penalty", 1.0, 0.01, 100.0),
        seed=secrets.randbits(63) if seed is None else seed,
        stop_ids=() if eod is None else (eod,),
        eod_id=eod,
        num_ids=served.tokenizer.vocab_size,
        stop_strings=(*fields.texts("stop", MAX_STOPS), *stops),
        logprobs=logprobs,
    )


def _include_usage(options: object, stream: bool) -> bool:
    if options is None:
        return False
    if not stream:
        raise refuse("stream_options needs stream true; set it, or leave stream_options out", "stream_options")
    if not isinstance(options, dict):
        raise refuse("stream_options is no object; send {'include_usage': true}", "stream_options")
    return Fields(options, ("include_usage",), {"include_obfuscation": ()}).flag("include_usage")


def _without(fields: Fields, served: Served) -> frozenset[str]:
    names = fields.texts("without", 64)
    if names and not served.experts:
        raise refuse(f"{served.name} is a {served.method} model and has no experts to leave out", "without")
    for name in names:
        if name not in served.experts:
            known = ", ".join(served.experts)
            raise refuse(f"there is no expert {name[:80]!r} to leave out; the experts are {known}", "without")
    if names and len(set(names)) == len(served.experts):
        raise refuse(f"without all its experts the model is its {HUB}; leave at least one in", "without")
    if names and not served.alone:
        raise refuse("without needs a server on one rank; leave it out", "without")
    return frozenset(names)


def _prompts(prompt: object) -> list[str | list[int]]:
    """Text, ids, or a list of either."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise refuse("prompt is missing or empty; send a text, a list of texts, or token ids", "prompt")
    if all(isinstance(item, int) and not isinstance(item, bool) for item in prompt):
        return [prompt]
    for item in prompt:
        ids = isinstance(item, list) and item and all(isinstance(i, int) and not isinstance(i, bool) for i in item)
        if not (isinstance(item, str) or ids):
            raise refuse("prompt is a list of neither texts nor token ids; send one or the other", "prompt")
    return prompt


def _encode(prompt: str | list[int], served: Served) -> list[int]:
    if isinstance(prompt, str):
        return served.encode(check_text(prompt, "prompt"))
    size = served.tokenizer.vocab_size
    wrong = next((token for token in prompt if not 0 <= token < size), None)
    if wrong is not None:
        raise refuse(f"prompt has a token id outside the tokenizer's 0..{size - 1}", "prompt")
    return prompt


def _messages(messages: object) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise refuse("messages is missing or empty; send a list of {'role', 'content'}", "messages")
    return [_message(message, f"messages[{number}]") for number, message in enumerate(messages)]


def _message(message: object, place: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise refuse(f"{place} is no object; send {{'role', 'content'}}", "messages")
    unknown = next((name for name in message if name not in ("role", "content", "name")), None)
    if unknown is not None:
        raise refuse(f"{place} has a field {unknown[:80]!r}; known are role, content, name", "messages")
    role = message.get("role")
    if role not in ("system", "developer", "user", "assistant"):
        raise refuse(f"{place}.role must be system, developer, user or assistant", "messages")
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    if not parts or not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        raise refuse(f"{place}.content must be a string or a list of text parts", "messages")
    text = "".join(check_text(part.get("text"), f"{place}.content") for part in parts)
    return {"role": "system" if role == "developer" else role, "content": text}


Reader = Callable[[dict[str, Any]], Asked]
"""Reads one kind of request."""
