"""Answers out of events, without a server: texts of single tokens."""

import io
from dataclasses import replace

import sentencepiece

from megabts.inference.rows import Completion, Request
from megabts.inference.settings import GenerationSettings
from megabts.serving.answers import Answer
from megabts.serving.requests import Asked
from megabts.serving.served import Limits, Served
from megabts.tokenizers.sentence_piece import SentencePieceTokenizer
from tests.inference.models import dense

TEXT = "the other then these the thesis is the best of these others"


def test_tokens_have_their_blanks() -> None:
    """Of a tokenizer that drops a text's first blank when it decodes (Llama 2's): tokens together are the text."""
    definition = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 20), model_writer=definition, vocab_size=40, model_type="bpe", minloglevel=9
    )
    tokenizer = SentencePieceTokenizer(definition.getvalue(), "dummy prefix")
    prompt, new = tokenizer.encode("the other then"), tokenizer.encode("these others is the best")
    assert tokenizer.decode([new[0]])[0] != " "
    request = Request(prompt, GenerationSettings(len(new)))
    served = Served(dense(), "bts", "tiny", tokenizer, tokenizer, Limits())
    answer = Answer("chat", Asked([request], False, False, 2, True, frozenset(), 1), served)
    completion, gates = Completion(0, request, tokenizer), (((0.5, 0.5),),)
    for place, token in enumerate(new):
        event = completion.take(token, -1.0, ((token, -1.0), (5, -2.0)))
        answer.add(0, replace(event, gates=gates[0], prompt_gates=gates * len(prompt) if place == 0 else ()))
    (choice,) = answer.whole()["choices"]
    assert choice["message"]["content"] == " these others is the best"
    content = choice["logprobs"]["content"]
    assert bytes(byte for token in content for byte in token["bytes"]).decode() == " these others is the best"
    assert "".join(token["text"] for token in choice["tokens"]) == " these others is the best"
    assert "".join(token["text"] for token in choice["prompt_tokens"]) == "the other then"
