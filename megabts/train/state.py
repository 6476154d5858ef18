"""What a run saves besides its weights, and what must not change when it is resumed."""

import logging
from pathlib import Path
from typing import Any

import torch

from megabts.build import Built, full_shapes, whole_model
from megabts.checkpoint.manifest import MODEL_FILE, read_manifest
from megabts.checkpoint.pieces import Piece
from megabts.checkpoint.reader import TensorReader
from megabts.checkpoint.saver import Saver
from megabts.checkpoint.source import CONFIG_FILE, load_weights
from megabts.config.load import differing_keys, from_yaml, to_yaml
from megabts.config.run import RunConfig
from megabts.errors import UserError
from megabts.model.decoder import EMBEDDING
from megabts.model.te_fp8 import fp8_state, has_module, load_fp8_state
from megabts.optimizer.adamw import KINDS, freeze_unscaled
from megabts.optimizer.stability import SpikeGuard
from megabts.parallel.sharding import ParamMeta, check_fit
from megabts.tokenizers.protocol import checkpoint_files
from megabts.train.setup import Run

log = logging.getLogger(__name__)

OPTIMIZER_FILE = "optimizer.safetensors"
FP8_FILE = "fp8.safetensors"
"""Delayed scaling's state, where there is any: of every module of the model, whatever ranks they were on."""
FIXED = (
    "method",
    "model.",
    "bts.",
    "moe.",
    "routing.",
    "data.",
    "optimizer.",
    "train.steps",
    "train.global_batch",
    "train.seed",
    "precision.dtype",
    "precision.frozen",
    "precision.fp8",
)
"""Settings that decide what a run computes: a resumed run must have the same ones."""
FREE = {"data.valid", "data.cache", "data.tokenizer", "data.train", "model.preset"} | {
    "bts.hub",
    "bts.experts",
    "moe.members",
    "routing.members",
    "optimizer.library",
}
"""Exceptions: names of places, and of a library that computes the same. Contents are compared by hashes (data,
tokenizer) and by the manifest (members)."""


def make_saver(run: Run, run_dir: Path) -> Saver:
    """What saves this rank's share of the run."""
    settings = run.config.checkpoint
    return Saver(run_dir, run.mesh.rank, keep_last=settings.keep or None, asynchronous=settings.asynchronous)


def start_save(saver: Saver, run: Run, step: int, guard: SpikeGuard) -> None:
    """Start saving the run after `step` steps; called by every rank."""
    config = run.config
    state = {
        "consumed_samples": step * config.train.global_batch,
        "data_hash": run.data_hash,
        "tokenizer_fingerprint": run.tokenizer.fingerprint if run.tokenizer else "",
        "guard": guard.state_dict(),
    }
    metas = _own_metas(run.model)
    weights = [
        Piece(name, meta, run.mesh.axis(meta.axis), parameter)
        for name, parameter, meta in run.model.own_parameters()
        if name in metas
    ]
    optimizer = [
        Piece(f"{kind}.{name}", metas[name], run.mesh.axis(metas[name].axis), tensor, flat)
        for kind, name, flat, tensor in run.optimizer.shards()
        if name in metas
    ]
    files = {MODEL_FILE: weights, OPTIMIZER_FILE: optimizer}
    if config.precision.fp8 == "delayed":
        scales = fp8_state(run.model)  # the same on every rank that runs a module
        files[FP8_FILE] = [Piece(name, ParamMeta(tuple(t.shape)), run.mesh.tp, t) for name, t in scales.items()]
    blobs = {CONFIG_FILE: to_yaml(config).encode(), **checkpoint_files(run.tokenizer)} if saver.rank == 0 else {}
    saver.start(step, files, blobs, state, run.members)


def restore(run: Run, folder: Path, guard: SpikeGuard) -> int:
    """Continue from a checkpoint folder of this run, saved by any number of ranks. Returns the steps done.

    Weights, optimizer and guard are set. Raises UserError naming every setting that would make it another run, with old
    and new value, unless the run's `checkpoint.force_resume` is set.
    """
    manifest = read_manifest(folder)
    changes = changed_settings(run, folder, manifest.state)
    if changes and not run.config.checkpoint.force_resume:
        raise UserError(
            f"{folder} was saved by a run with other settings: {'; '.join(changes)}; restore them, start a new run "
            "with --checkpoint.init_from, or insist with --checkpoint.force_resume true"
        )
    step = int(manifest.state["step"])
    whole = whole_model(run.config)
    load_weights(folder, run.model.own_parameters(), full_shapes(whole), run.mesh)
    guard.load_state_dict(manifest.state["guard"])
    _restore_optimizer(run, whole, folder, step - guard.skipped)
    if FP8_FILE in {*manifest.tensors, *manifest.files}:
        with TensorReader(folder, FP8_FILE) as reader:
            mine = {name: reader.read(name) for name in reader.shapes if has_module(run.model, name)}
        load_fp8_state(run.model, mine, str(folder))
    return step


def _restore_optimizer(run: Run, whole: Built, folder: Path, updates: int) -> None:
    """This rank's shards of the optimizer's state, as of `updates` updates."""
    freeze_unscaled(whole, run.config.optimizer, [name for name, _ in whole.named_parameters()])
    trained = {name: meta for name, parameter, meta in whole.own_parameters() if parameter.requires_grad}
    mine = {name: meta for name, _, meta in run.model.own_parameters()}
    with TensorReader(folder, OPTIMIZER_FILE) as reader, torch.no_grad():
        expected = {f"{kind}.{name}": meta.shape for kind in KINDS for name, meta in trained.items()}
        if differing := sorted(expected.keys() ^ reader.shapes.keys()):
            raise UserError(
                f"{folder}: the optimizer state does not fit the trainable parameters: {differing[:3]} on one side only"
            )
        check_fit(reader.shapes, expected, str(folder))
        for kind, name, flat, tensor in run.optimizer.shards():
            meta = mine[name]
            if flat[0] < flat[1]:
                tensor.copy_(reader.read_slice(f"{kind}.{name}", meta, run.mesh.axis(meta.axis), flat))
    run.optimizer.restored(updates)


def _own_metas(model: Built) -> dict[str, ParamMeta]:
    """What this rank saves: all that it holds but the last stage's copy of tied embeddings, which the first saves."""
    metas = {name: meta for name, _, meta in model.own_parameters()}
    if not model.part.embedding:
        metas.pop(EMBEDDING, None)
    return metas


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
