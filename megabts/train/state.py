"""What a run saves besides its weights, and what must not change when it is resumed."""

import logging
from pathlib import Path
from typing import Any

from megabts.checkpoint.folder import load_tensors
from megabts.checkpoint.manifest import MODEL_FILE, read_manifest
from megabts.checkpoint.source import CONFIG_FILE
from megabts.checkpoint.storage import save_step
from megabts.config.load import differing_keys, from_yaml, to_yaml
from megabts.config.run import RunConfig
from megabts.errors import UserError
from megabts.optimizer.stability import SpikeGuard
from megabts.parallel.sharding import load_full
from megabts.tokenizers.protocol import checkpoint_files
from megabts.train.setup import Run

log = logging.getLogger(__name__)

OPTIMIZER_FILE = "optimizer.safetensors"
FIXED = (
    "method",
    "model.",
    "bts.",
    "data.",
    "optimizer.",
    "train.steps",
    "train.global_batch",
    "train.seed",
    "precision.dtype",
)
"""Settings that decide what a run computes: a resumed run must have the same ones."""
FREE = {"data.valid", "data.cache", "data.tokenizer", "model.preset", "bts.hub", "bts.experts", "data.train"}
"""Exceptions: names of places. Contents are compared by hashes (data, tokenizer) and by the manifest (members)."""


def save(run: Run, run_dir: Path, step: int, guard: SpikeGuard) -> Path:
    """Save the run after `step` steps; for the first rank alone. Raises CheckpointError."""
    config = run.config
    state = {
        "consumed_samples": step * config.train.global_batch,
        "data_hash": run.data_hash,
        "tokenizer_fingerprint": run.tokenizer.fingerprint if run.tokenizer else "",
        "guard": guard.state_dict(),
    }
    weights = {name: parameter.detach() for name, parameter, _ in run.model.own_parameters()}
    files = {MODEL_FILE: weights, OPTIMIZER_FILE: run.optimizer.state_dict()}
    blobs = {CONFIG_FILE: to_yaml(config).encode(), **checkpoint_files(run.tokenizer)}
    return save_step(run_dir, step, files, blobs, state, run.members, keep_last=config.checkpoint.keep or None)


def restore(run: Run, folder: Path, guard: SpikeGuard) -> int:
    """Continue from a checkpoint folder of this run: weights, optimizer, guard. Returns the steps done.

    Raises UserError naming every setting that would make it another run, with old and new value, unless the run's
    `checkpoint.force_resume` is set.
    """
    manifest = read_manifest(folder)
    changes = changed_settings(run, folder, manifest.state)
    if changes and not run.config.checkpoint.force_resume:
        raise UserError(
            f"{folder} was saved by a run with other settings: {'; '.join(changes)}; restore them, start a new run "
            "with --checkpoint.init_from, or insist with --checkpoint.force_resume true"
        )
    step = int(manifest.state["step"])
    weights = load_tensors(folder, MODEL_FILE)
    load_full(run.model.own_parameters(), weights.items(), run.mesh, str(folder))
    guard.load_state_dict(manifest.state["guard"])
    updates = step - guard.skipped
    run.optimizer.load_state_dict(load_tensors(folder, OPTIMIZER_FILE), updates)
    return step


def changed_settings(run: Run, folder: Path, state: dict[str, Any]) -> list[str]:
    """`key: old -> new` for each setting that decides what a run computes."""
    old = from_yaml((folder / CONFIG_FILE).read_text(), str(folder / CONFIG_FILE))
    changes = [
        f"{key}: {before} -> {after}"
        for key, before, after in differing_keys(old, run.config)
        if key.startswith(FIXED) and key not in FREE
    ]
    if state["data_hash"] != run.data_hash:
        changes += _changed("data.train", _by_name(old), _by_name(run.config)) or [
            f"data files or their order: {state['data_hash'][:12]} -> {run.data_hash[:12]}"
        ]
    fingerprint = run.tokenizer.fingerprint if run.tokenizer else ""
    before = state["tokenizer_fingerprint"]
    if before != fingerprint:
        changes += [f"data.tokenizer: {_tokenizer(old, before)} -> {_tokenizer(run.config, fingerprint)}"]
    recorded = {member.name: member.content_hash[:12] for member in read_manifest(folder).members}
    present = {member.name: member.content_hash[:12] for member in run.members}
    for name in {**recorded, **present}:
        changes += _changed(f"member {name}", recorded.get(name, "none"), present.get(name, "none"))
    return changes


def _changed(what: str, before: object, after: object) -> list[str]:
    return [] if before == after else [f"{what}: {before} -> {after}"]


def _by_name(config: RunConfig) -> dict[str, float]:
    """The blend by the datasets' names, which is how it may move to another folder."""
    return {Path(prefix).name: weight for prefix, weight in config.data.train.items()}


def _tokenizer(config: RunConfig, fingerprint: str) -> str:
    return f"{config.data.tokenizer} (sha {fingerprint[:8]}..)" if fingerprint else "none"
