"""Hugging Face folders as files: all or nothing, and with a tokenizer that transformers reads."""

import errno
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from megabts.convert import folder as module
from megabts.convert.folder import write_hf_folder
from megabts.convert.options import Options
from megabts.convert.tokenizer import HFTokenizer, hf_tokenizer
from megabts.errors import UserError
from megabts.tokenizers.build import build_tokenizer
from megabts.tokenizers.protocol import Tokenizer, save_tokenizer
from megabts.tokenizers.train import train_tokenizer

TEXTS = [
    "def add(a, b):\n    return a + b  # 12 + 345\n",
    "The quick brown fox, it's said, jumped over 13 lazy dogs.\n\n",
    "caf\u00e9 na\u00efve \u4f60\u597d \U0001f600",
]


def tensors() -> Iterator[tuple[str, Tensor]]:
    yield "a", torch.arange(4.0)
    yield "b", torch.ones(3, dtype=torch.int64)


def failing() -> Iterator[tuple[str, Tensor]]:
    yield "a", torch.ones(2)
    raise UserError("the source is damaged")


def twice() -> Iterator[tuple[str, Tensor]]:
    yield "a", torch.ones(2)
    yield "a", torch.ones(2)


def refusing(folder: Path) -> None:
    assert (folder / "model.safetensors").exists()
    raise UserError("another result")


def test_nothing_is_left_of_what_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    for made, message in ((failing, "damaged"), (twice, "tensor a comes twice")):
        with pytest.raises(UserError, match=message):
            write_hf_folder(out, {}, made(), Options(max_shard_bytes=1))
    with pytest.raises(UserError, match="another result"):
        write_hf_folder(out, {}, tensors(), Options(), check=refusing)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_file", full)
        with pytest.raises(UserError, match=r"out not written: No space left on device; check"):
            write_hf_folder(out, {}, tensors(), Options())
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="exists already"):  # it came up meanwhile
        write_hf_folder(out, {}, tensors(), Options(), check=lambda _: out.mkdir())
    assert list(tmp_path.iterdir()) == [out]
    with pytest.raises(UserError, match="exists already"):
        write_hf_folder(out, {}, tensors(), Options())


def test_type_files_and_ids(tmp_path: Path) -> None:
    tokenizer = HFTokenizer({"tokenizer.json": b"{}"}, {"eos_token_id": 7})
    files = {"modeling.py": "x = 1\n"}
    write_hf_folder(tmp_path / "o", {"k": 1}, tensors(), Options(torch.bfloat16), tokenizer=tokenizer, files=files)
    assert json.loads((tmp_path / "o/config.json").read_text()) == {"k": 1, "eos_token_id": 7}
    generation = json.loads((tmp_path / "o/generation_config.json").read_text())
    assert generation == {"_from_model_config": True, "eos_token_id": 7}
    assert (tmp_path / "o/modeling.py").read_text() == "x = 1\n"
    from safetensors import safe_open

    with safe_open(tmp_path / "o/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("a").dtype == torch.bfloat16
        assert torch.equal(file.get_tensor("b"), torch.ones(3, dtype=torch.int64)), "whole numbers stay"


def tokenizers(folder: Path) -> Iterator[tuple[str, Tokenizer]]:
    yield "bytes", build_tokenizer("bytes")
    yield "sentencepiece", train_tokenizer(TEXTS * 20, 340, folder / "sp", "sentencepiece-bpe")
    yield "hugging face", train_tokenizer(TEXTS * 20, 290, folder / "hf", "hf-bpe")


def test_tokenizers_give_the_same_ids_in_transformers(tmp_path: Path) -> None:
    for number, (kind, ours) in enumerate(tokenizers(tmp_path)):
        save_tokenizer(ours, tmp_path / f"{number}")
        found = hf_tokenizer(str(tmp_path / f"{number}"))
        assert found.note == "", kind
        assert found.special_ids["eos_token_id"] == ours.eod_id
        write_hf_folder(tmp_path / f"out{number}", {"model_type": "llama"}, tensors(), Options(), tokenizer=found)
        theirs = AutoTokenizer.from_pretrained(tmp_path / f"out{number}")
        assert theirs.eos_token_id == ours.eod_id, kind
        assert theirs(TEXTS[0]).keys() == {"input_ids", "attention_mask"}, "what a model's generate takes"
        for text in [*TEXTS, "  x  \t\n y", "\n", "unseen \u00df \u0928\u092e\u0938\u094d\u0924\u0947"]:
            ids = theirs(text, add_special_tokens=False).input_ids
            assert ids == ours.encode(text), (kind, text)
            assert theirs.decode(ids) == text, kind
        assert theirs(TEXTS[0]).input_ids == ours.encode(TEXTS[0]), f"{kind}: nothing is added"


def test_tokenizers_without_such_a_form_are_named(tmp_path: Path) -> None:
    assert hf_tokenizer("").note == "the checkpoint has no tokenizer; none goes along"
    save_tokenizer(build_tokenizer("null:50"), tmp_path)
    assert hf_tokenizer(str(tmp_path)).note == "the tokenizer null:50 has no Hugging Face form; none goes along"
    assert hf_tokenizer(str(tmp_path)).special_ids == {"eos_token_id": 49}
