"""Stitched models of tiny members of every family, with random stitches, and what both sides make of texts."""

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM

from megabts import assemble
from megabts.build import load_model
from megabts.checkpoint.folder import write_checkpoint
from megabts.checkpoint.manifest import MODEL_FILE, read_manifest
from megabts.checkpoint.reader import load_tensors
from megabts.checkpoint.source import CONFIG_FILE
from megabts.config.methods import BTSConfig
from megabts.convert.options import Options
from megabts.inference.generate import generate
from megabts.inference.settings import GenerationSettings
from megabts.model.decoder import Model
from megabts.parallel.mesh import ParallelMesh
from tests.convert.hf_models import make

QUIET = Options(say=lambda line: None)
PROMPTS = [[3, 7, 1, 30], [5], [9, 9, 12, 2, 4, 40, 41], [1, 50]]
NEW = 12
"""Tokens to continue these with."""


def members(root: Path, family: str, *names: str, **options: Any) -> dict[str, str]:
    """Folders of members that transformers saved, by name."""
    for seed, name in enumerate(names):
        make(root / name, family, seed=seed, num_hidden_layers=4, **options)
    return {name: str(root / name) for name in names}


def stitched(root: Path, folders: dict[str, str], out: str = "bts", **settings: Any) -> Path:
    """A checkpoint of a hub and experts whose stitches, and whatever else is the model's own, are random."""
    hub, *experts = folders
    checkpoint = root / out
    assemble.stitch(BTSConfig(folders[hub], {name: folders[name] for name in experts}, **settings), checkpoint)
    generator = torch.Generator().manual_seed(11)
    tensors = {
        name: tensor + 0.2 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_tensors(checkpoint, MODEL_FILE).items()
    }
    rewrite(checkpoint, tensors)
    return checkpoint


def rewrite(checkpoint: Path, tensors: dict[str, Tensor], **model: Any) -> None:
    """Put other weights, or settings of the model, into a checkpoint."""
    raw = yaml.safe_load((checkpoint / CONFIG_FILE).read_text())
    raw["model"] |= model
    records = read_manifest(checkpoint).members
    state = {"step": 0, "tokenizer_fingerprint": ""}
    write_checkpoint(checkpoint, {MODEL_FILE: tensors}, {CONFIG_FILE: yaml.safe_dump(raw).encode()}, state, records)


def load_ours(checkpoint: Path) -> Model:
    """In fp32."""
    return load_model(checkpoint, ParallelMesh(), torch.float32, "cpu").model.eval()


def load_theirs(folder: Path, **options: Any) -> Any:
    """In fp32, by transformers."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).float().eval()


def padded() -> tuple[Tensor, Tensor]:
    """PROMPTS padded on the left, and which tokens are theirs, [b, s] both."""
    width = max(map(len, PROMPTS))
    ids = [[0] * (width - len(prompt)) + prompt for prompt in PROMPTS]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS]
    return torch.tensor(ids), torch.tensor(mask)


def greedy_ours(checkpoint: Path) -> list[list[int]]:
    """PROMPTS' likeliest continuations by the command-line tool's engine."""
    return generate(load_ours(checkpoint), PROMPTS, GenerationSettings(max_new_tokens=NEW))


def greedy_theirs(model: Any, **options: Any) -> list[list[int]]:
    """The same by transformers, all prompts at once."""
    ids, mask = padded()
    settings = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0, **options}
    found: list[list[int]] = model.generate(input_ids=ids, attention_mask=mask, **settings)[:, ids.shape[1] :].tolist()
    return found


def distance(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected|."""
    return ((found - expected).abs().max() / expected.abs().max()).item()
