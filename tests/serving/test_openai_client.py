"""OpenAI's own Python client against a server in a process of its own; greedy answers against the generator."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch

from megabts.build import Built, load_model
from megabts.inference.generate import complete_uncached
from megabts.inference.rows import Completion, Request
from megabts.inference.settings import GenerationSettings
from megabts.parallel.mesh import ParallelMesh
from megabts.tokenizers.build import build_tokenizer
from tests.serving.process import ServerProcess

PROMPT = "def add(a, b):"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Built:
    return load_model(checkpoint, ParallelMesh(), torch.float32, "cpu").model


def expected(model: Built, prompt: str, new: int, **settings: object) -> Completion:
    """What the model says without a server, cache or batch."""
    tokenizer = build_tokenizer("bytes")
    asked = GenerationSettings(new, stop_ids=(256,), eod_id=256, num_ids=257, **settings)  # type: ignore[arg-type]
    return complete_uncached(model, [Request(tokenizer.encode(prompt), asked)], tokenizer=tokenizer)[0]


def test_completion(client: openai.OpenAI, model: Built) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, temperature=0)
    assert answer.choices[0].text == expected(model, PROMPT, 24).text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (14, 24, 38)
    assert answer.model == "tiny"


def test_prompts_of_every_form(client: openai.OpenAI, model: Built) -> None:
    ids = [list(b"abc"), list(b"xyz")]
    forms = (["abc", "xyz"], ids)
    for form in forms:
        answer = client.completions.create(model="tiny", prompt=form, max_tokens=6, temperature=0)  # type: ignore[arg-type]
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert [choice.text for choice in answer.choices] == [expected(model, text, 6).text for text in ("abc", "xyz")]
    one = client.completions.create(model="tiny", prompt=ids[0], max_tokens=6, temperature=0)
    assert one.choices[0].text == expected(model, "abc", 6).text
    empty = client.completions.create(model="tiny", prompt="", max_tokens=3, temperature=0)
    assert empty.usage is not None
    assert empty.usage.prompt_tokens == 1  # an end of a document


def test_default_length_is_16(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, temperature=0)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_streamed_completion(client: openai.OpenAI, model: Built) -> None:
    stream = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=24, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected(model, PROMPT, 24).text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert len(chunks) > 5
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 38
    assert len({chunk.id for chunk in chunks}) == 1


def test_logprobs(client: openai.OpenAI, model: Built) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, temperature=0, logprobs=3)
    oracle = expected(model, PROMPT, 8, logprobs=3)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.token_logprobs == pytest.approx(oracle.logprobs, abs=1e-4)
    assert found.tokens == [build_tokenizer("bytes").decode([token]) for token in oracle.tokens]
    assert found.top_logprobs is not None
    for token, logprob, top in zip(found.tokens, found.token_logprobs or [], found.top_logprobs, strict=True):
        assert max(top, key=lambda text: top[text]) == token  # greedy
        assert top[token] == logprob
        assert 1 <= len(top) <= 3
    assert found.text_offset is not None
    assert found.text_offset[0] == 0
    assert found.text_offset == sorted(found.text_offset)
    stop = [f"{answer.choices[0].text}, not so"]  # all of the text may become it, and is held back
    held = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=8, temperature=0, logprobs=3, stop=stop
    ).choices[0]
    assert held.text == answer.choices[0].text
    assert held.logprobs is not None
    assert held.logprobs.text_offset == found.text_offset


def test_n_and_seed(client: openai.OpenAI) -> None:
    def texts(**settings: object) -> list[str]:
        answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, n=3, **settings)  # type: ignore[call-overload]
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert answer.usage.prompt_tokens == 14
        return [choice.text for choice in answer.choices]

    first = texts(seed=7)
    assert len(set(first)) == 3
    assert texts(seed=7) == first
    assert texts(seed=8) != first
    assert texts() != texts()
    assert len(set(texts(temperature=0, seed=7))) == 1


def test_sampling_settings_reach_the_model(client: openai.OpenAI, model: Built) -> None:
    extra = {"top_k": 5, "repetition_penalty": 1.3}
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=12, temperature=0.7, top_p=0.9, seed=3, extra_body=extra
    )
    settings = {"temperature": 0.7, "top_p": 0.9, "seed": 3, **extra}
    assert answer.choices[0].text == expected(model, PROMPT, 12, **settings).text


def test_stop(client: openai.OpenAI, model: Built) -> None:
    whole = expected(model, PROMPT, 24).text
    stop = whole[8:10]
    at = whole.index(stop)
    for form in (stop, [stop, "never, ever"]):
        answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, temperature=0, stop=form)
        assert answer.choices[0].text == whole[:at]
        assert answer.choices[0].finish_reason == "stop"
    stream = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=24, temperature=0, stop=stop, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == whole[:at]


def test_chat(client: openai.OpenAI, model: Built) -> None:
    prompt = "System: Be brief.\n\nUser: Hello\n\nAssistant:"
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_completion_tokens=20)  # type: ignore[arg-type]
    oracle = expected(model, prompt, 20)
    assert answer.choices[0].message.content == oracle.text
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)
    stream = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=20,
        stream=True,
        n=2,
        logprobs=True,
        top_logprobs=2,
    )
    texts, logprobs = ["", ""], 0
    for chunk in stream:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        content = choice.logprobs.content if choice.logprobs else None
        logprobs += len(content or [])
        assert all(len(entry.top_logprobs) == 2 for entry in content or [])
    assert texts == [oracle.text] * 2
    assert logprobs == 40


def test_chat_goes_on_as_far_as_it_may(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": parts}],  # type: ignore[list-item]
        temperature=0,
    )
    assert answer.usage is not None
    assert answer.usage.total_tokens == 256 or answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == len("User: Hello\n\nAssistant:")


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, client.models.retrieve("tiny").id) == ("tiny", "tiny")
    assert model.megabts == {  # type: ignore[attr-defined]
        "method": "bts",
        "members": ["hub", "code", "math"],
        "gate_places": [
            {"index": 0, "kind": "hub_into_experts", "layer": 2},
            {"index": 1, "kind": "experts_into_hub", "layer": 4},
        ],
        "max_tokens": 256,
    }


def test_errors_have_their_classes(client: openai.OpenAI, server: ServerProcess) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'; this is 'tiny'"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="max_tokens is -1") as bad:
        client.completions.create(model="tiny", prompt="a", max_tokens=-1)
    assert bad.value.param == "max_tokens"
    with pytest.raises(openai.BadRequestError, match="there is no field 'colour'"):
        client.completions.create(model="tiny", prompt="a", extra_body={"colour": 1})
    with pytest.raises(openai.BadRequestError, match="presence_penalty is not supported here"):
        client.completions.create(model="tiny", prompt="a", presence_penalty=1)
    with pytest.raises(openai.BadRequestError, match="65 completions are asked for at once, the server takes 64"):
        client.completions.create(model="tiny", prompt="a", n=65)
    with pytest.raises(openai.NotFoundError, match="there is nothing at '/v1/embeddings'"):
        client.embeddings.create(model="tiny", input="a")


def test_api_key(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("secret-1\n")
    with ServerProcess(checkpoint, "--api-key-file", str(file), "--max-rows", "1", "--queue", "0") as locked:
        for key, good in (("secret-1", True), ("secret-2", False)):
            client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key=key, max_retries=0)
            if good:
                assert client.completions.create(model="tiny", prompt="a", max_tokens=1).usage
            else:
                with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
                    client.completions.create(model="tiny", prompt="a", max_tokens=1)
            client.close()
        assert locked.ask("/health")[0] == 200
        assert locked.ask("/v1/models")[0] == 401
        # A full server says when to come again, which the client reads as a rate limit.
        client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key="secret-1", max_retries=0)
        stream = client.completions.create(model="tiny", prompt="a", max_tokens=255, temperature=0, stream=True)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="1 completions run or wait") as full:
            client.completions.create(model="tiny", prompt="a", max_tokens=1)
        assert full.value.response.headers["retry-after"] == "1"
        stream.close()
        client.close()
