"""Tokenizers: exact round trips, fingerprints, saving, flags, training, and clear errors."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer

from megabts.errors import UsageError, UserError
from megabts.tokenizers.build import build_tokenizer, build_tokenizer_from_flags, find_tokenizer
from megabts.tokenizers.protocol import Tokenizer, save_tokenizer
from megabts.tokenizers.train import bytes_per_token, train_tokenizer

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "while", "boxing", "wizards", "judge", "vows"]
TEXTS = [
    f"def {a}_{b}(x):\n    if x > {i * 37}:\n        return {b}(x)  # {a} {b}\n\n\n"
    f"{a.title()} {b} {i}. {b[:2]}{a[-3:]}{b[1:]} {a[1:]}{b[:3]}ing"
    for i, a in enumerate(WORDS)
    for b in WORDS
]
NASTY = [
    "",
    " ",
    "\n",
    "\n\n\n a",
    "  two  spaces   three ",
    "def f():\n    return 1\n\n\n        deep\n",
    "\ttab\t\ttabs\r\nwindows\r",
    "null \x00 byte \x01\x7f",
    "\u2581 meta \u2581\u2581space",
    "\u2581",
    "e\u0301 \u00e9 \u4e2d\u6587 \U0001f500\u200d\U0001f680",
    "</s> <s> <unk> <0x0A> [CLS]",
    "\ufeffmark \ufffd \u2047",
    "a\u3000b\u00a0c\u2028d",
    "1234567 3.14 1e-5",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[str, Tokenizer]:
    return {
        "sentencepiece-bpe": train_tokenizer(TEXTS, 400, folder / "sp", "sentencepiece-bpe"),
        "hf-bpe": train_tokenizer(TEXTS, 400, folder / "hf", "hf-bpe"),
        "bytes": build_tokenizer("bytes"),
    }


KINDS = ("sentencepiece-bpe", "hf-bpe", "bytes")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [*NASTY, TEXTS[0]])
def test_nasty_texts_come_back_exactly(trained: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = trained[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.eod_id for i in ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=5))
def test_any_text_comes_back_and_batches_equal_singles(
    trained: dict[str, Tokenizer], kind: str, texts: list[str]
) -> None:
    tokenizer = trained[kind]
    ids = tokenizer.encode_batch(texts)
    assert ids == [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(part) for part in ids] == texts


def test_ids_are_those_of_the_libraries(trained: dict[str, Tokenizer], folder: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sp" / "tokenizer.model"))
    rust = RustTokenizer.from_file(str(folder / "hf" / "tokenizer.json"))
    for text in TEXTS[:30]:
        assert trained["sentencepiece-bpe"].encode(text) == processor.encode(text)
        assert trained["hf-bpe"].encode(text) == rust.encode(text).ids


@pytest.mark.parametrize("kind", KINDS)
def test_saving_and_copying_keep_the_tokenizer(trained: dict[str, Tokenizer], kind: str, tmp_path: Path) -> None:
    tokenizer = trained[kind]
    save_tokenizer(tokenizer, tmp_path / "saved")
    for again in (build_tokenizer(tmp_path / "saved"), copy.copy(tokenizer)):
        assert isinstance(again, Tokenizer)
        assert again.fingerprint == tokenizer.fingerprint
        assert len(again.fingerprint) == 64
        assert (again.vocab_size, again.eod_id, again.pad_id) == (
            tokenizer.vocab_size,
            tokenizer.eod_id,
            tokenizer.pad_id,
        )
        assert again.encode(TEXTS[3]) == tokenizer.encode(TEXTS[3])


def test_fingerprints_differ(trained: dict[str, Tokenizer]) -> None:
    others = [build_tokenizer("null:100"), build_tokenizer("null:101")]
    assert len({tokenizer.fingerprint for tokenizer in [*trained.values(), *others]}) == 5


@pytest.mark.parametrize("kind", KINDS[:2])
def test_training_is_deterministic_and_digits_stand_alone(
    trained: dict[str, Tokenizer], kind: str, tmp_path: Path
) -> None:
    again = train_tokenizer(TEXTS, 400, tmp_path, kind)
    assert again.fingerprint == trained[kind].fingerprint
    assert again.vocab_size == 400
    assert len(again.encode("1234567")) == 7
    assert len(again.encode("the the the")) < 6
    assert 1.5 < bytes_per_token(again, TEXTS) < 20


def test_runs_of_spaces_are_one_piece(trained: dict[str, Tokenizer]) -> None:
    assert len(trained["sentencepiece-bpe"].encode("        ")) == 1


@pytest.mark.parametrize("kind", KINDS[:2])
def test_vocabulary_sizes_that_cannot_be(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="50000 is too large for this text: at most"):
        train_tokenizer(["hello world"] * 3, 50000, tmp_path / "t", kind)
    with pytest.raises(UserError, match="100 is too small"):
        train_tokenizer(TEXTS, 100, tmp_path / "t", kind)
    with pytest.raises(UserError):
        train_tokenizer([], 300, tmp_path / "t", kind)
    assert not (tmp_path / "t").exists()


def test_long_texts_without_breaks_are_learned(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["ab" * 50_000 + "\n\nxyz" * 1000], 270, tmp_path / "long.model")
    assert len(tokenizer.encode("abababab")) < 8
    assert build_tokenizer(tmp_path / "long.model").fingerprint == tokenizer.fingerprint


def test_null_tokenizer_reads_integers() -> None:
    tokenizer = build_tokenizer("null:100")
    assert tokenizer.vocab_size == 100
    assert tokenizer.eod_id == 99
    assert tokenizer.encode(" 1 2\n98 ") == [1, 2, 98]
    assert tokenizer.decode([1, 2, 98]) == "1 2 98"
    for text in ("100", "-1", "x", "1.0", "9" * 5000, "\u0661"):
        with pytest.raises(UserError, match="is not a token id"):
            tokenizer.encode(text)


def test_hugging_face_side_files_name_eod_and_pad(trained: dict[str, Tokenizer], tmp_path: Path) -> None:
    definition = RustTokenizer.from_str(json.dumps(json.loads(_definition(trained))))
    definition.add_special_tokens(["<fin>", "<pad>"])
    definition.enable_truncation(3)
    definition.enable_padding(length=3, pad_token="<pad>")
    definition.save(str(tmp_path / "tokenizer.json"))
    assert build_tokenizer(tmp_path).eod_id == 0  # the common name <|endoftext|>
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<fin>"}}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>", "eos_token": None}))
    for spec in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = build_tokenizer(spec)
        assert (tokenizer.eod_id, tokenizer.pad_id, tokenizer.vocab_size) == (400, 401, 402)
        assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]  # neither cut nor padded
        assert tokenizer.encode("") == []
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"tokenizer_config\.json .* is not a JSON object"):
        build_tokenizer(tmp_path)


def test_a_chat_template_in_a_file_goes_along(trained: dict[str, Tokenizer], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(_definition(trained))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    tokenizer = build_tokenizer(tmp_path)
    assert tokenizer.files().keys() == {"tokenizer.json", "chat_template.jinja"}
    assert copy.deepcopy(tokenizer).files() == tokenizer.files()


def _definition(trained: dict[str, Tokenizer]) -> bytes:
    return trained["hf-bpe"].definition  # type: ignore[attr-defined]


def test_template_tokens_are_added_only_when_asked(trained: dict[str, Tokenizer], tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    rust = RustTokenizer.from_str(_definition(trained).decode())
    rust.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    rust.save(str(tmp_path / "tokenizer.json"))
    plain = build_tokenizer(tmp_path).encode("the fox")
    assert 0 not in plain
    flags = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(tmp_path)}
    assert build_tokenizer_from_flags(**flags).encode("the fox") == [0, *plain]  # type: ignore[arg-type]
    assert build_tokenizer_from_flags(**flags, include_special_tokens=False).encode("the fox") == plain  # type: ignore[arg-type]


def test_gpt2_files_give_the_same_ids(trained: dict[str, Tokenizer], tmp_path: Path) -> None:
    model = json.loads(_definition(trained))["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    gpt2 = build_tokenizer_from_flags(
        "GPT2BPETokenizer", vocab_file=str(tmp_path / "vocab.json"), merge_file=str(tmp_path / "merges.txt")
    )
    text = "the quick  brown\n\n    fox"  # no digits: those are split by the other tokenizer only
    assert gpt2.encode(text) == trained["hf-bpe"].encode(text)
    assert gpt2.eod_id == 0
    save_tokenizer(gpt2, tmp_path / "saved")
    assert build_tokenizer(tmp_path / "saved").fingerprint == gpt2.fingerprint


def test_an_end_of_document_is_only_missed_when_it_is_needed(tmp_path: Path) -> None:
    vocab = {chr(97 + i): i for i in range(26)}
    definition = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": vocab, "merges": []}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    tokenizer = build_tokenizer(tmp_path)
    assert tokenizer.encode("abc") == [0, 1, 2]
    assert tokenizer.eod_id is None


def test_ids_of_another_tokenizer_are_refused(trained: dict[str, Tokenizer]) -> None:
    for kind in KINDS[:2]:
        with pytest.raises(UserError, match="outside the 400"):
            trained[kind].decode([5, 400])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("t.model", b"", "is empty"),
        ("t.model", b"garbage", "not a SentencePiece model"),
        ("t.json", b"{}", "not a tokenizer.json"),
        ("t.json", b"\xff\xfe", "not a tokenizer.json"),
        ("tokenizer_spec.json", b"{}", "is damaged"),
        ("tokenizer_spec.json", b'{"tokenizer": "null:x"}', "write null:VOCAB"),
        ("t.txt", b"x", "unknown kind"),
    ],
)
def test_damaged_files_are_named(file: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        build_tokenizer(tmp_path / file)
    assert "\n" not in str(raised.value)


def test_a_cut_model_is_refused(folder: Path, trained: dict[str, Tokenizer], tmp_path: Path) -> None:
    for name in ("sp/tokenizer.model", "hf/tokenizer.json"):
        content = (folder / name).read_bytes()
        path = tmp_path / Path(name).name
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match=path.name):
            build_tokenizer(path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [("nowhere", "does not exist"), ("null:", "write null:VOCAB"), ("null:1", "at least 2"), ("null:-5", "null:VOCAB")],
)
def test_wrong_specs(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_tokenizer(spec)


def test_an_empty_folder_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has none of"):
        build_tokenizer(tmp_path)


def test_the_tokenizer_of_a_model_folder(folder: Path, trained: dict[str, Tokenizer], tmp_path: Path) -> None:
    """A Llama 2 folder has a tokenizer.model alone; a checkpoint has the folder `tokenizer`."""
    assert find_tokenizer(tmp_path) == ""
    for name in ("sp", "hf"):
        assert find_tokenizer(folder / name) == str(folder / name)
    shutil.copytree(folder / "hf", tmp_path / "tokenizer")
    assert find_tokenizer(tmp_path) == str(tmp_path / "tokenizer")
    assert find_tokenizer(tmp_path / "nowhere") == ""


def test_megatron_types(folder: Path, trained: dict[str, Tokenizer]) -> None:
    for kind in ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"):
        built = build_tokenizer_from_flags(kind, str(folder / "sp" / "tokenizer.model"))
        assert built.fingerprint == trained["sentencepiece-bpe"].fingerprint
    assert build_tokenizer_from_flags("NullTokenizer", vocab_size=100).eod_id == 99
    for kind in ("TikTokenizer", "SFTTokenizer", "BertWordPieceCase", "MultimodalTokenizer"):
        with pytest.raises(UsageError, match=f"{kind} is not supported: "):
            build_tokenizer_from_flags(kind)
    for kind in ("Nonsense", "NullTokenizer", "GPT2BPETokenizer", "HuggingFaceTokenizer"):
        with pytest.raises(UsageError, match=kind):
            build_tokenizer_from_flags(kind)
    with pytest.raises(UserError, match="nothing is downloaded"):
        build_tokenizer_from_flags("HuggingFaceTokenizer", "gpt2")
