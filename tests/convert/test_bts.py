"""Stitched models in transformers: logits, caches, padding and text against megabts; members merged or elsewhere."""

import ast
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache, StaticCache

from megabts.checkpoint.manifest import MODEL_FILE
from megabts.checkpoint.reader import load_tensors
from megabts.convert.bts import CODE, REMOTE, export_bts
from megabts.convert.verify import fixed_tokens, model_logits
from megabts.errors import UserError
from tests.bts.folders import write_members
from tests.convert.stitched import (
    QUIET,
    distance,
    greedy_ours,
    greedy_theirs,
    load_ours,
    load_theirs,
    members,
    padded,
    rewrite,
    stitched,
)

NAMES = ("hub", "code", "math-2")
FORMS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "paper": ("llama", {"num_stitch_layers": 3}, {}),
    "placed": ("llama", {"num_stitch_layers": 3, "placement": [1, 3, 4]}, {}),
    "unchanged": (
        "qwen3",
        {"num_stitch_layers": 4, "alternating": False, "expert_stream": "unchanged", "gate_input": "normalised"},
        {},
    ),
    "preserving": ("olmo2", {"num_stitch_layers": 2, "start": "hub_preserving", "projection_rank": 3}, {}),
    "leaning": (
        "qwen2",
        {"num_stitch_layers": 1, "start": "hub_leaning", "gate": "token"},
        {"tie_word_embeddings": True},
    ),
    "mixture": ("mistral", {"num_stitch_layers": 2, "output": "mixture", "gate": "token"}, {}),
    "evidence": ("llama", {"num_stitch_layers": 2, "output": "mixture", "evidence": 3}, {"tie_word_embeddings": True}),
    "evidence-long": (
        "qwen3",
        {"num_stitch_layers": 1, "output": "mixture", "evidence": 64, "expert_stream": "unchanged"},
        {},
    ),
}


def exported(root: Path, form: str, **how: Any) -> tuple[Path, Path]:
    """(checkpoint, exported folder) of a form."""
    family, settings, sizes = FORMS[form]
    checkpoint = stitched(root, members(root, family, *NAMES, **sizes), **settings)
    export_bts(checkpoint, root / "hf", QUIET, **how)
    return checkpoint, root / "hf"


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_transformers_computes_the_same(tmp_path: Path, form: str) -> None:
    checkpoint, folder = exported(tmp_path, form)
    ours, theirs = load_ours(checkpoint), load_theirs(folder)
    tokens = fixed_tokens(ours.config)
    expected = model_logits(ours, tokens)
    assert distance(theirs(input_ids=tokens, use_cache=False).logits, expected) < 1e-5
    assert distance(theirs(input_ids=tokens, logits_to_keep=3).logits, expected[:, -3:]) < 1e-5
    found, cache = [], DynamicCache()
    for piece in tokens[:, :23].split([7, 1, 13, 2], 1):
        found.append(theirs(input_ids=piece, past_key_values=cache, use_cache=True).logits)
    assert distance(torch.cat(found, 1), expected[:, :23]) < 1e-5
    text = greedy_ours(checkpoint)
    assert greedy_theirs(theirs) == text
    assert greedy_theirs(theirs, use_cache=False) == text


@pytest.mark.parametrize("form", ["paper", "evidence"])
def test_beams_and_lookups_keep_the_states_of_their_rows(tmp_path: Path, form: str) -> None:
    """Beam search reorders the cache; prompt lookup takes tokens out of it again."""
    _, folder = exported(tmp_path, form)
    model = load_theirs(folder)
    assert greedy_theirs(model, num_beams=3) == greedy_theirs(model, num_beams=3, use_cache=False)
    prompt = torch.tensor([[4, 9, 4, 9, 4, 9, 4]])
    settings = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(input_ids=prompt, **settings)
    assert model.generate(input_ids=prompt, prompt_lookup_num_tokens=3, **settings).tolist() == plain.tolist()


@torch.no_grad()
def test_padding_changes_nothing(tmp_path: Path) -> None:
    checkpoint, folder = exported(tmp_path, "evidence")
    model = load_theirs(folder, attn_implementation="eager")
    assert greedy_theirs(model) == greedy_ours(checkpoint)
    ids, mask = padded()
    left = model(input_ids=ids, attention_mask=mask).logits
    right = model(input_ids=torch.stack([row.roll(int(n)) for row, n in zip(ids, mask.sum(1))]),
                  attention_mask=mask.flip(1)).logits  # fmt: skip
    for row, count in enumerate(mask.sum(1).tolist()):
        alone = model(input_ids=ids[row : row + 1, -count:]).logits[0]
        assert distance(left[row, -count:], alone) < 1e-5
        assert distance(right[row, :count], alone) < 1e-5
    labels = fixed_tokens(load_ours(checkpoint).config)
    out = model(input_ids=labels, labels=labels)
    picked = out.logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].unsqueeze(-1))
    torch.testing.assert_close(out.loss, -picked.mean())


@pytest.mark.parametrize("form", ["paper", "evidence-long"])
@torch.no_grad()
def test_members_by_reference(tmp_path: Path, form: str) -> None:
    checkpoint, folder = exported(tmp_path, form, reference={})
    tensors = load_tensors(checkpoint, MODEL_FILE)
    assert (folder / "model.safetensors").stat().st_size < 2 * sum(tensor.nbytes for tensor in tensors.values())
    model = load_theirs(folder)
    tokens = fixed_tokens(load_ours(checkpoint).config)
    expected = model_logits(load_ours(checkpoint), tokens)
    assert distance(model(input_ids=tokens).logits, expected) < 1e-5
    assert greedy_theirs(model) == greedy_ours(checkpoint)
    model.save_pretrained(tmp_path / "saved", max_shard_size="8KB")
    shutil.rmtree(tmp_path / "hub")
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists()
    assert distance(load_theirs(tmp_path / "saved")(input_ids=tokens).logits, expected) < 1e-5
    with pytest.raises(ValueError, match=r"^member hub is not at .*/hub; put it back, or export the model again$"):
        load_theirs(folder)


def test_a_changed_member_is_refused(tmp_path: Path) -> None:
    _, folder = exported(tmp_path, "paper", reference={})
    file = tmp_path / "code" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"^member code at .*/code has changed; restore it, or export the model again$"
    ):
        load_theirs(folder)


def test_members_of_megabts(tmp_path: Path) -> None:
    """Merged as they are; by reference only where a folder of Hugging Face has their weights."""
    folders = write_members(tmp_path, "hub", "code", vocab_size=53)
    checkpoint = stitched(tmp_path, folders, num_stitch_layers=2)
    export_bts(checkpoint, tmp_path / "merged", replace(QUIET, max_shard_bytes=3000))
    assert (tmp_path / "merged" / "model.safetensors.index.json").exists()
    assert greedy_theirs(load_theirs(tmp_path / "merged"), max_new_tokens=4)
    with pytest.raises(UserError, match=r"^member hub at .*/hub is no Hugging Face folder; export it to one and "):
        export_bts(checkpoint, tmp_path / "out", QUIET, reference={})
    with pytest.raises(UserError, match=r"^there is no member 'maths' to refer to; the members are hub, code$"):
        export_bts(checkpoint, tmp_path / "out", QUIET, reference={"maths": tmp_path})
    assert not (tmp_path / "out").exists()


def test_a_named_folder_holds_the_members_weights(tmp_path: Path) -> None:
    from megabts.convert.dense import export_dense

    folders = write_members(tmp_path, "hub", "code", vocab_size=53)
    checkpoint = stitched(tmp_path, folders, num_stitch_layers=2)
    named = {name: tmp_path / f"hf-{name}" for name in folders}
    for name, folder in named.items():
        export_dense(Path(folders[name]), folder, replace(QUIET, check="tensors"))
    export_bts(checkpoint, tmp_path / "out", QUIET, reference=named)
    with pytest.raises(UserError, match=r"hf-code: the values of embedding\.weight differ"):
        export_bts(checkpoint, tmp_path / "other", QUIET, reference={**named, "hub": named["code"]})


def test_types_and_tensors(tmp_path: Path) -> None:
    """Exported in bfloat16, from members in bfloat16, and compared tensor by tensor."""
    lines: list[str] = []
    folders = members(tmp_path, "llama", "hub", "code", dtype=torch.bfloat16)
    checkpoint = stitched(tmp_path, folders, num_stitch_layers=2)
    export_bts(checkpoint, tmp_path / "mixed", replace(QUIET, say=lines.append))
    assert json.loads((tmp_path / "mixed" / "config.json").read_text())["dtype"] == "float32"
    half = replace(QUIET, dtype=torch.bfloat16, say=lines.append)
    export_bts(checkpoint, tmp_path / "half", half)
    export_bts(checkpoint, tmp_path / "bits", replace(half, check="tensors"))
    assert [line.split(":")[0] for line in lines if line.startswith("checked")] == ["checked"] * 3
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    with pytest.raises(UserError, match="exists already"):
        export_bts(checkpoint, tmp_path / "bits", QUIET)


def test_what_the_user_is_told(tmp_path: Path) -> None:
    checkpoint = stitched(tmp_path, members(tmp_path, "llama", "hub", "code"), num_stitch_layers=1)
    rewrite(checkpoint, load_tensors(checkpoint, MODEL_FILE), cross_document_attention=False)
    lines: list[str] = []
    export_bts(checkpoint, tmp_path / "hf", replace(QUIET, say=lines.append))
    assert any(line.startswith("the model reads each document by itself") for line in lines)
    model = load_theirs(tmp_path / "hf")
    tokens = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="a StaticCache cannot hold the members' states; use a DynamicCache"):
        model(input_ids=tokens, past_key_values=StaticCache(config=model.config, max_cache_len=8))
    with pytest.raises(ValueError, match="the members' vocabularies cannot be resized"):
        model.resize_token_embeddings(80)
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, 3\]"):
        model(input_ids=tokens, attention_mask=torch.ones(1, 2))


def test_the_code_stands_alone() -> None:
    """It imports torch, transformers, safetensors, the standard library and itself."""
    allowed = {"torch", "transformers", "safetensors", *sys.stdlib_module_names}
    for name in CODE:
        for node in ast.walk(ast.parse((REMOTE / name).read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom):
                module = (node.module or "").split(".")[0]
                assert module in allowed if node.level == 0 else f"{module}.py" in CODE
