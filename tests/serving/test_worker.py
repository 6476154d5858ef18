"""The thread that owns the model, without a network: cancelling, variants, failure, templates."""

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from megabts.errors import UserError
from megabts.inference.rows import Request
from megabts.inference.settings import GenerationSettings
from megabts.serving import worker as worker_module
from megabts.serving.chat import ChatTemplate
from megabts.serving.errors import ApiError
from megabts.serving.metrics import Metrics
from megabts.serving.requests import read_chat
from megabts.serving.served import Limits, Served
from megabts.serving.variants import without_experts
from megabts.serving.worker import Job, Told, Update, Worker
from megabts.tokenizers.build import build_tokenizer
from megabts.tokenizers.simple import BytesTokenizer
from tests.inference.models import SIZES, dense, stitched

SETTINGS = GenerationSettings(30)


class Listener:
    """A worker and all that it tells."""

    def __init__(self, on_update: Callable[["Listener", Job, Update], None] = lambda *_: None) -> None:
        tokenizer = build_tokenizer("null:61")
        self.model = stitched(num_stitch_layers=2)
        served = Served(self.model, "bts", "tiny", tokenizer, tokenizer, Limits(4, 160, 4, 40, 40))
        self.updates: list[tuple[Job, Update]] = []
        self.changed = threading.Condition()
        self.metrics = Metrics()
        self.on_update = on_update
        self.worker = Worker(served, self.metrics, self.post, self.failed)
        self.worker.start()

    def post(self, updates: list[tuple[Job, Update]]) -> None:
        for job, update in updates:
            self.on_update(self, job, update)
        with self.changed:
            self.updates += updates
            self.changed.notify_all()

    def failed(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def of(self, job: Job) -> list[Update]:
        return [update for other, update in self.updates if other is job]

    def wait(self, condition: Callable[[], object]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, 30)

    def ended(self, job: Job) -> bool:
        return any(isinstance(update, ApiError) or update.event.finish for update in self.of(job))


def test_a_cancelled_job_is_in_no_further_batch() -> None:
    # The first job is cancelled during its third token's batch; the second goes on.
    def on_update(told: Listener, job: Job, update: Update) -> None:
        if job is first and len(told.of(first)) == 2:
            told.worker.cancel(first)

    first, second = Job([Request([1, 2], SETTINGS)]), Job([Request([3], SETTINGS)])
    told = Listener(on_update)
    told.worker.submit(first)
    told.worker.submit(second)
    told.wait(lambda: told.ended(second))
    assert len(told.of(first)) == 3
    assert len(told.of(second)) == 30
    assert told.metrics.cancelled._value.get() == 1
    assert told.worker.stop(10)


@pytest.mark.parametrize("tied", [False, True])
def test_variants_share_every_parameter(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "tie_embeddings", tied)
    whole = stitched(num_stitch_layers=2)
    small = without_experts(whole, ["code"])
    known = dict(whole.named_parameters())
    names = [name for name, _ in small.named_parameters()]
    assert not any(".code." in name for name in names)
    assert {".math." in name for name in names} == {True, False}
    assert all(parameter.data_ptr() == known[name].data_ptr() for name, parameter in small.named_parameters())
    assert (small.hub.head is small.hub.embedding) == tied
    with pytest.raises(UserError, match="there is no expert 'law'"):
        without_experts(whole, ["law"])


def test_the_unused_variant_gives_way_and_a_busy_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "MAX_VARIANTS", 1)
    code = Job([Request([1, 2], SETTINGS)], frozenset(["code"]))
    refused = Job([Request([1, 2], SETTINGS)], frozenset(["math"]))

    def on_update(told: Listener, job: Job, update: Update) -> None:
        if job is code and len(told.of(code)) == 0:
            told.worker.submit(refused)

    told = Listener(on_update)
    told.worker.submit(code)
    told.wait(lambda: told.ended(code))
    (error,) = told.of(refused)
    assert isinstance(error, ApiError)
    assert (error.status, error.code, error.headers) == (429, "variants_busy", {"Retry-After": "1"})
    again = Job(refused.rows, refused.without)
    told.worker.submit(again)
    told.wait(lambda: told.ended(again))
    assert len(told.of(again)) == 30
    assert told.worker.stop(10)


def test_a_failure_is_kept_and_told() -> None:
    told = Listener()
    parameter = next(told.model.parameters())
    parameter.data.fill_(float("nan"))
    told.worker.submit(Job([Request([1, 2], SETTINGS)]))
    told.wait(lambda: told.worker.failure is not None)
    assert "logits are not finite" in str(told.worker.failure)


def test_metrics_of_tokens() -> None:
    told = Listener()
    job = Job([Request([1, 2, 3], replace(SETTINGS, max_new_tokens=5), row) for row in range(2)])
    told.worker.submit(job)
    told.wait(lambda: len(told.of(job)) == 10)
    assert [update.index for update in told.of(job) if isinstance(update, Told)] == [0, 1] * 5
    assert told.worker.stop(10)
    text = told.metrics.text().decode()
    for line in ("prompt_tokens_total 6.0", "completion_tokens_total 10.0", "first_token_seconds_count 2.0"):
        assert f"megabts_{line}\n" in text
    assert "megabts_token_seconds_count 8.0\n" in text


class Templated(BytesTokenizer):
    """Bytes with a chat template."""

    def __init__(self, template: object) -> None:
        config = {"chat_template": template, "bos_token": {"content": "<s>"}, "eos_token": "</s>", "unk_token": "<unk>"}
        self.config = json.dumps(config).encode()

    def files(self) -> dict[str, bytes]:
        return {"tokenizer_config.json": self.config}


CHATML = """{{ bos_token }}{% for message in messages %}
{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]


@pytest.mark.parametrize("template", [CHATML, [{"name": "default", "template": CHATML}]])
def test_a_tokenizers_own_template(template: object) -> None:
    found = ChatTemplate(Templated(template))
    assert found.render(MESSAGES) == "<s><|user|>Hi</s>\n<|assistant|>Yes?</s>\n<|assistant|>"
    assert found.stops == ()


def test_a_template_in_a_file_of_its_own_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Templated("of the configuration")
    files = {**tokenizer.files(), "chat_template.jinja": b"of the file"}
    monkeypatch.setattr(tokenizer, "files", lambda: files)
    assert ChatTemplate(tokenizer).render(MESSAGES) == "of the file"
    files["chat_template.jinja"] = b"\xff"
    with pytest.raises(UserError, match="has a chat template that cannot be read"):
        ChatTemplate(tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        "{% if tools is not none or documents is not none %}wrong{% endif %}{{ messages[0].content }}",
        "{{ messages | tojson(indent=2) }}{{ messages | tojson }}",
        "{{ eos_token }}{{ unk_token }}{{ strftime_now('%Y') }}",
        "{% for m in messages %}{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}{% endfor %}{{ x }}",
    ],
)
def test_templates_mean_what_they_mean_to_transformers(template: str) -> None:
    special: Any = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    oracle: Any = render_jinja_template([MESSAGES], chat_template=template, add_generation_prompt=True, **special)
    assert ChatTemplate(Templated(template)).render(MESSAGES) == oracle[0][0]


def test_a_template_s_tokens_are_not_added_twice() -> None:
    """Under --special-tokens a plain prompt is begun by the tokenizer, and one of its own chat template is not."""
    plain, begun = BytesTokenizer(), BytesTokenizer()
    begun.encode = lambda text: [256, *plain.encode(text)]  # type: ignore[method-assign]
    served = Served(dense(vocab_size=257), "dense", "tiny", plain, begun, Limits(4, 160, 4, 40, 40))
    content = {"messages": MESSAGES[:1], "max_tokens": 1}
    (row,) = read_chat(content, served, ChatTemplate(Templated("{{ bos_token }}{{ messages[0].content }}"))).rows
    assert row.prompt == plain.encode("<s>Hi")
    (row,) = read_chat(content, served, ChatTemplate(plain)).rows
    assert row.prompt == begun.encode("User: Hi\n\nAssistant:")


def test_a_template_runs_in_a_sandbox() -> None:
    escape = ChatTemplate(Templated("{{ messages.__class__.__mro__[1].__subclasses__() }}"))
    with pytest.raises(ApiError, match="refuses these messages"):
        escape.render(MESSAGES)
    refusal = ChatTemplate(Templated("{{ raise_exception('only users speak') }}"))
    with pytest.raises(ApiError, match="only users speak"):
        refusal.render(MESSAGES)
    with pytest.raises(UserError, match="has a chat template that cannot be read"):
        ChatTemplate(Templated("{% if %}"))


def test_the_plain_template() -> None:
    template = ChatTemplate(BytesTokenizer())
    assert template.render(MESSAGES) == "User: Hi\n\nAssistant: Yes?\n\nAssistant:"
    assert template.stops == ("\n\nUser:",)


@pytest.mark.parametrize("wanted", [True, False])
def test_cuda_graphs_can_be_switched_off(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megabts.inference.decoding.recorder", lambda device: lambda work: work)
    tokenizer = build_tokenizer("null:61")
    served = Served(dense(), "dense", "tiny", tokenizer, tokenizer, Limits(4, 160, 4, 40, 40), cuda_graphs=wanted)
    worker = Worker(served, Metrics(), lambda updates: None, lambda: None)
    (batch,) = worker._batches.values()
    assert (batch.engine._decoding._graphs is not None) is wanted
