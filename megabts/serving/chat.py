"""From messages to a prompt: the tokenizer's own chat template, or a plain one.

The plain template, for models that were never taught one, writes every message as a paragraph

    System: TEXT
    User: TEXT
    Assistant: TEXT

with an empty line between two, ends with "Assistant:", and stops where the completion begins a new "User:" paragraph.

A tokenizer's own template is a Jinja program out of the checkpoint. It runs in Jinja's sandbox, without access to
Python's objects, files or modules.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from megabts.errors import UserError
from megabts.serving.errors import refuse
from megabts.tokenizers.protocol import Tokenizer

CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"


class ChatTemplate:
    """Makes prompts of messages. `stops`: strings that end an answer.

    Raises UserError where the tokenizer's own template cannot be read.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        files = tokenizer.files()
        config = json.loads(files.get(CONFIG_FILE, b"{}"))
        source = files[TEMPLATE_FILE].decode() if TEMPLATE_FILE in files else config.get("chat_template")
        if isinstance(source, list):  # several, by name
            named = {entry["name"]: entry["template"] for entry in source}
            source = named.get("default")
        self.own = source is not None
        self.stops: tuple[str, ...] = () if self.own else ("\n\nUser:",)
        self._tokens = {name: _content(config.get(name)) for name in ("bos_token", "eos_token", "pad_token")}
        if source is not None:
            self._template = _compile(source, tokenizer.name)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt of a conversation, which the answer continues. Raises ApiError where the template refuses it."""
        if not self.own:
            parts = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
            return "\n\n".join([*parts, "Assistant:"])
        from jinja2.exceptions import TemplateError

        try:
            return self._template.render(messages=list(messages), add_generation_prompt=True, **self._tokens)
        except (TemplateError, TypeError, ValueError) as error:
            raise refuse(f"the model's chat template refuses these messages: {error}", "messages") from None


def _content(token: object) -> str:
    """A special token's text, from either form that tokenizer_config.json has it in."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _compile(source: str, name: str) -> Any:
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise UserError(f"tokenizer {name} has a chat template that cannot be read ({error}); mend it") from error


def _raise(message: str) -> NoReturn:
    from jinja2.exceptions import TemplateError

    raise TemplateError(message)
