"""Encoding by remembered words: the same ids as the tokenizer's own, or no cutting at all."""

import copy
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from megabts.tokenizers import words
from megabts.tokenizers.build import build_tokenizer
from megabts.tokenizers.hugging_face import HuggingFaceTokenizer
from megabts.tokenizers.protocol import Tokenizer
from megabts.tokenizers.sentence_piece import SentencePieceTokenizer
from megabts.tokenizers.train import train_tokenizer
from megabts.tokenizers.words import WordEncoder, find_cuts

ROOT = Path(__file__).parents[2]
TEXTS = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))[:6]]
TEXTS += [path.read_text(encoding="utf-8") for path in sorted((ROOT / "megabts" / "data").glob("*.py"))[:6]]
SPLITS = ("", *words._KNOWN_SPLITS)
DTYPE = np.dtype("<u2")


def train_sentencepiece(**settings_: Any) -> SentencePieceTokenizer:
    """A model with the project's settings, but for those given."""
    model = io.BytesIO()
    keeps_text = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(TEXTS).split("\n")),
        model_writer=model,
        vocab_size=700,
        minloglevel=2,
        **(keeps_text | settings_),
    )
    return SentencePieceTokenizer(model.getvalue(), "trained")


def train_hugging_face(split: str) -> HuggingFaceTokenizer:
    """A byte-level BPE over the matches of an expression (empty: GPT-2's, built in), with a special token."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
    cut = tokenizers.pre_tokenizers.Split(tokenizers.Regex(split), "isolated") if split else None
    library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([cut, level]) if cut else level
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<|endoftext|>"], initial_alphabet=sorted(alphabet), show_progress=False
    )
    library.train_from_iterator(TEXTS, trainer)
    return HuggingFaceTokenizer(library.to_str().encode(), "trained")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    found: dict[str, Tokenizer] = {f"split {number}": train_hugging_face(split) for number, split in enumerate(SPLITS)}
    for kind in ("sentencepiece-bpe", "hf-bpe"):
        found[kind] = train_tokenizer(TEXTS, 700, folder / kind, kind)
    return found


KINDS = ("sentencepiece-bpe", "hf-bpe", *(f"split {number}" for number in range(len(SPLITS))))


def tokens(tokenizer: Tokenizer, texts: list[str]) -> list[bytes]:
    return [np.array(ids, DTYPE).tobytes() for ids in tokenizer.encode_batch(texts)]


@pytest.mark.parametrize("kind", KINDS)
def test_real_text_gives_the_tokenizers_ids(trained: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = trained[kind]
    assert find_cuts(tokenizer) is not None
    encoder = WordEncoder(tokenizer, DTYPE)
    for _ in range(2):  # unknown words, then known ones
        assert encoder.encode_batch(TEXTS) == tokens(tokenizer, TEXTS)
    assert copy.copy(encoder).encode_batch(TEXTS[:1]) == tokens(tokenizer, TEXTS[:1])


ODD = [
    *"  \n\t\r\u00a0\u2028\u3000\u0085\x1c\u2581.,'!\"(",
    "'s",
    "'LL",
    "a",
    "the",
    "B",
    "1",
    "23",
    "\u0301",
    "é",
    "中",
    "🚀",
    "_",
    "\x00",
]
odd_text = st.lists(st.sampled_from([*ODD, "<|endoftext|>", "  ", "\n\n"]), max_size=12).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150)
@given(texts=st.lists(odd_text, max_size=4))
def test_odd_text_gives_the_tokenizers_ids(trained: dict[str, Tokenizer], kind: str, texts: list[str]) -> None:
    encoder = WordEncoder(trained[kind], DTYPE)
    for _ in range(2):
        assert encoder.encode_batch(texts) == tokens(trained[kind], texts)


def test_a_known_word_is_not_encoded_again(trained: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    tokenizer = trained["sentencepiece-bpe"]
    encode_batch = tokenizer.encode_batch
    monkeypatch.setattr(tokenizer, "encode_batch", lambda texts: given.extend(texts) or encode_batch(texts))  # type: ignore[func-returns-value]
    monkeypatch.setattr(words, "MAX_WORDS", 3)
    encoder = WordEncoder(tokenizer, DTYPE)
    long = "x" * 65
    encoder.encode_batch(["a b b c"])
    assert sorted(given) == [" b", " c", "a"]
    given.clear()
    encoder.encode_batch(["c b a", f"c {long}"])
    assert sorted(given) == sorted(["c", "c", " a", f" {long}"])
    given.clear()
    encoder.encode_batch([f"c {long} d"])  # long words are not kept; with d they are more than three
    assert sorted(given) == sorted(["c", f" {long}", " d"])
    given.clear()
    encoder.encode_batch(["c e", "c b"])  # more than three are forgotten
    assert sorted(given) == sorted(["c", "c", " e", " b"])


@pytest.mark.parametrize(
    "setting",
    [
        {"model_type": "unigram"},
        {"add_dummy_prefix": True},
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nmt_nfkc"},
        {"byte_fallback": False},
        {"user_defined_symbols": ["of the"]},
        {"treat_whitespace_as_suffix": True},
        {"split_by_whitespace": False},
    ],
    ids=str,
)
def test_models_that_may_not_be_cut(setting: dict[str, Any]) -> None:
    assert find_cuts(train_sentencepiece()) is not None
    assert find_cuts(train_sentencepiece(**setting)) is None


def changed(definition: bytes, path: str, value: Any) -> HuggingFaceTokenizer:
    """A tokenizer.json with one value changed; numbers in the path are places in a list."""
    content = json.loads(definition)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    node = content
    for part in parents:
        node = node[part]
    node[last] = value
    return HuggingFaceTokenizer(json.dumps(content).encode(), "changed")


@pytest.mark.parametrize(
    "path, value",
    [
        ("normalizer", {"type": "Lowercase"}),
        ("model.dropout", 0.1),
        ("model.end_of_word_suffix", "</w>"),
        ("added_tokens.0.lstrip", True),
        ("added_tokens.0.rstrip", True),
        ("added_tokens.0.content", "two words"),
        ("pre_tokenizer.pretokenizers.1.add_prefix_space", True),
        ("pre_tokenizer.pretokenizers.0.invert", True),
        ("pre_tokenizer.pretokenizers.0.behavior", "Removed"),
        ("pre_tokenizer.pretokenizers.0.pattern.Regex", r"\S+\s*"),
        ("pre_tokenizer.pretokenizers.0.pattern", {"String": " "}),
        ("pre_tokenizer.pretokenizers.0", {"type": "Digits", "individual_digits": True}),
        ("pre_tokenizer", None),
    ],
)
def test_definitions_that_may_not_be_cut(trained: dict[str, Tokenizer], path: str, value: Any) -> None:
    tokenizer = trained["split 2"]
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert find_cuts(changed(tokenizer.definition, "normalizer", {"type": "NFC"})) is not None
    assert find_cuts(changed(tokenizer.definition, path, value)) is None
    assert find_cuts(HuggingFaceTokenizer(tokenizer.definition, "with bos", include_special_tokens=True)) is None


def test_tokenizers_of_bytes_and_integers_are_used_as_they_are() -> None:
    for spec, text in (("bytes", "a b  c"), ("null:100", "1 2  99")):
        tokenizer = build_tokenizer(spec)
        assert find_cuts(tokenizer) is None
        assert WordEncoder(tokenizer, DTYPE).encode_batch([text, "", text]) == tokens(tokenizer, [text, "", text])


def test_shuffled_words_keep_their_tokens(trained: dict[str, Tokenizer]) -> None:
    """Words met in one order are right in any other."""
    tokenizer = trained["sentencepiece-bpe"]
    encoder = WordEncoder(tokenizer, DTYPE)
    found = " ".join(TEXTS).split(" ")
    random.Random(0).shuffle(found)
    shuffled = [" ".join(found[start : start + 500]) for start in range(0, len(found), 500)]
    assert encoder.encode_batch(shuffled) == tokens(tokenizer, shuffled)
