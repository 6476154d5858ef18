"""Streamed pieces together are the whole text, and no piece shows half a character."""

from itertools import pairwise

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megabts.inference.text_stream import INCOMPLETE, StopStrings, TextStream
from megabts.tokenizers.build import build_tokenizer
from megabts.tokenizers.protocol import Tokenizer
from megabts.tokenizers.train import train_tokenizer

KINDS = ("llama", "sentencepiece-bpe", "hf-bpe", "bytes", "null:300")
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "while", "boxing", "wizards", "judge", "vows"]
TEXTS = [f"{a} {b} {a[1:]}{b[:3]}ing {b[:2]}{a[-3:]}{b[1:]} {i}\n    {a}" for i, a in enumerate(WORDS) for b in WORDS]

CHARACTERS = st.characters(codec="utf-8", exclude_characters=INCOMPLETE)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    trained = {kind: train_tokenizer(TEXTS, 400, folder / kind, kind) for kind in KINDS[1:3]}
    # As Llama's: a space is put in front of a text and taken away again from the first piece decoded.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(folder / "llama"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        minloglevel=2,
    )
    plain = {kind: build_tokenizer(kind) for kind in KINDS[3:]}
    return {"llama": build_tokenizer(folder / "llama.model"), **trained, **plain}


def pieces(tokenizer: Tokenizer, prompt: list[int], completion: list[int]) -> list[str]:
    stream = TextStream(tokenizer, prompt)
    return [*[stream.add(token) for token in completion], stream.finish()]


@pytest.mark.parametrize("kind", KINDS[:4])
@settings(max_examples=60)
@given(prompt=st.text(CHARACTERS, max_size=8), completion=st.text(CHARACTERS, max_size=12))
def test_whole_characters(kind: str, tokenizers: dict[str, Tokenizer], prompt: str, completion: str) -> None:
    tokenizer = tokenizers[kind]
    first, second = tokenizer.encode(prompt), tokenizer.encode(completion)
    found = pieces(tokenizer, first, second)
    assert "".join(found) == tokenizer.decode(first + second)[len(tokenizer.decode(first)) :]
    assert not any(INCOMPLETE in piece for piece in found)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(data=st.data())
def test_any_ids_at_all(kind: str, tokenizers: dict[str, Tokenizer], data: st.DataObject) -> None:
    """Also what no text encodes to: stray bytes, control tokens."""
    tokenizer = tokenizers[kind]
    ids = st.integers(0, tokenizer.vocab_size - 1)
    prompt, completion = tokenizer.encode("7 12"), data.draw(st.lists(ids, max_size=20))
    whole = tokenizer.decode(prompt + completion)
    assert "".join(pieces(tokenizer, prompt, completion)) == whole[len(tokenizer.decode(prompt)) :]


def test_a_character_comes_with_its_last_byte() -> None:
    tokenizer = build_tokenizer("bytes")
    euro = list("€".encode())
    assert pieces(tokenizer, [65], [*euro, 66, *euro[:2]]) == ["", "", "€", "B", "", "", INCOMPLETE]


def test_spaces_between_words(tokenizers: dict[str, Tokenizer]) -> None:
    """Pieces decoded one by one would lose their spaces."""
    tokenizer, text = tokenizers["llama"], "the fox jumps over the judge"
    ids = tokenizer.encode(text)
    assert "".join(tokenizer.decode([token]) for token in ids) == text.replace(" ", "")
    assert "".join(pieces(tokenizer, ids[:1], ids[1:])) == text.removeprefix(tokenizer.decode(ids[:1]))


def test_integers_as_text() -> None:
    tokenizer = build_tokenizer("null:50")
    assert pieces(tokenizer, [7], [8, 9]) == [" 8", " 9", ""]


def until_stop(text: str, strings: list[str]) -> str:
    """Character by character, from the definition."""
    for end in range(len(text) + 1):
        found = [end - len(string) for string in strings if text[:end].endswith(string)]
        if found:
            return text[: min(found)]
    return text


@settings(max_examples=300)
@given(
    text=st.text("ab", max_size=12),
    cuts=st.lists(st.integers(0, 12), max_size=6),
    strings=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_text_before_a_stop_string_however_it_comes(text: str, cuts: list[int], strings: list[str]) -> None:
    """And nothing is given out that is later taken back, or held back without need."""
    stops, given, places = StopStrings(strings), "", sorted({0, *cuts, len(text)})
    for start, end in pairwise(places):
        piece, found = stops.add(text[start:end])
        given += piece
        assert found == (until_stop(text[:end], strings) != text[:end] or text[:end].endswith(tuple(strings)))
        if found:
            break
        held = text[len(given) : end]
        assert not held or any(string.startswith(held) for string in strings)
    else:
        given += stops.finish()
    assert given == until_stop(text, strings)
