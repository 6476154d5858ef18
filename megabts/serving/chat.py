"""From messages to a prompt: the tokenizer's own chat template, or a plain one.

The plain template, for models that were never taught one, writes every message as a paragraph

    System: TEXT
    User: TEXT
    Assistant: TEXT

with an empty line between two, ends with "Assistant:", and stops where the completion begins a new "User:" paragraph.

A tokenizer's own template is a Jinja program out of the checkpoint. It runs in Jinja's sandbox, without access to
Python's objects, files or modules, and finds what transformers' `apply_chat_template` gives it: special tokens, `tools`
and `documents` (none), `strftime_now`, `raise_exception`, `tojson`, and blocks `generation`, which mean nothing here.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from megabts.errors import UserError
from megabts.serving.errors import refuse
from megabts.tokenizers.hugging_face import CONFIG_FILE, TEMPLATE_FILE
from megabts.tokenizers.protocol import Tokenizer

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Names of tokens whose text a template may write."""


class ChatTemplate:
    """Makes prompts of messages. `stops`: strings that end an answer.

    Raises UserError where the tokenizer's own template cannot be read.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        files = tokenizer.files()
        config = json.loads(files.get(CONFIG_FILE, b"{}"))
        try:
            source = files[TEMPLATE_FILE].decode() if TEMPLATE_FILE in files else config.get("chat_template")
            if isinstance(source, list):  # several, by name
                source = {entry["name"]: entry["template"] for entry in source}.get("default")
        except (UnicodeDecodeError, KeyError, TypeError) as error:
            raise _unreadable(tokenizer.name, error) from error
        self.own = source is not None
        self.stops: tuple[str, ...] = () if self.own else ("\n\nUser:",)
        self._tokens = {name: _content(config.get(name)) for name in SPECIAL_TOKENS}
        if source is not None:
            self._template = _compile(source, tokenizer.name)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt of a conversation, which the answer continues. Raises ApiError where the template refuses it."""
        if not self.own:
            parts = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
            return "\n\n".join([*parts, "Assistant:"])
        from jinja2.exceptions import TemplateError

        try:
            return self._template.render(
                messages=list(messages), tools=None, documents=None, add_generation_prompt=True, **self._tokens
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise refuse(f"the model's chat template refuses these messages: {error}", "messages") from None


def _content(token: object) -> str:
    """A special token's text, from either form that tokenizer_config.json has it in."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _compile(source: str, name: str) -> Any:
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what a model is trained to say; rendered, it is what is inside."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's own name

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = _to_json
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> UserError:
    return UserError(f"tokenizer {name} has a chat template that cannot be read ({error}); mend it")


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Not Jinja's own filter, which escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    from jinja2.exceptions import TemplateError

    raise TemplateError(message)
