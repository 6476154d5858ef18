"""Everything a run needs, built once from its configuration and passed on: mesh, model, data, optimizer."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch.distributed import Store

from megabts.build import Built, StoredModel, load_model, make_backend, method_members, new_model, open_model
from megabts.checkpoint.manifest import MemberRecord
from megabts.checkpoint.source import MODEL_FREE
from megabts.config.methods import BTSConfig, MoEConfig, RoutingConfig
from megabts.config.model import ModelConfig
from megabts.config.run import RunConfig
from megabts.data.build import build_train_dataset, build_valid_datasets, data_hash
from megabts.data.loader import Loader
from megabts.data.validation import ValidationSet
from megabts.errors import UsageError
from megabts.model.decoder import EMBEDDING
from megabts.optimizer.adamw import MasterAdamW, freeze_unscaled
from megabts.parallel.collectives import broadcast_object, gather_objects
from megabts.parallel.layout import check_layout
from megabts.parallel.mesh import ParallelMesh, build_mesh, degrees
from megabts.runtime.device import Launch, check_te, pick_device, resolve_dtype, share_cores, start_communication
from megabts.runtime.fusion import choose_fuse, eager
from megabts.runtime.memory import keep_freed_memory
from megabts.tokenizers.build import build_tokenizer, find_tokenizer
from megabts.tokenizers.protocol import Tokenizer
from megabts.train.stages import Stages

log = logging.getLogger(__name__)

BTS_FREE = {"gate_dropout", "trainable"}
"""Stitch settings that a run may choose anew, as it may `MODEL_FREE`."""
MOE_FREE = {"routing", "top_k", "balance", "freeze_ffn_experts", "first_layer_soft"}
"""The same of MoE layers."""
MEMBERS = {"hub", "experts", "members"}
"""Settings not compared with a checkpoint's, which knows its members by path and content hash itself."""

Section = TypeVar("Section", ModelConfig, BTSConfig, MoEConfig, RoutingConfig)


@dataclass
class Run:
    """One rank's parts of a run."""

    config: RunConfig
    mesh: ParallelMesh
    device: torch.device
    model: Built
    stages: Stages
    members: list[MemberRecord]
    tokenizer: Tokenizer | None
    loader: Loader
    valid: dict[str, ValidationSet]
    optimizer: MasterAdamW
    data_hash: str

    @property
    def eod_id(self) -> int | None:
        """The tokenizer's end-of-document token, if it is known."""
        return self.tokenizer.eod_id if self.tokenizer else None


def start_ranks(config: RunConfig, launch: Launch, store: Store | None = None) -> tuple[ParallelMesh, torch.device]:
    """Join the other ranks, met at `store`.

    Raises UsageError before any communication when the degrees do not fit or the layers' library needs a GPU.
    """
    parallel = config.parallel
    degrees(parallel, launch.world_size)
    share_cores(launch)
    keep_freed_memory()
    device = pick_device(launch)
    if config.precision.layers == "te":
        check_te(device)
    start_communication(launch, device, parallel.backend, parallel.timeout, store)
    return build_mesh(parallel, launch.world_size, launch.rank), device


def open_start(config: RunConfig, mesh: ParallelMesh) -> StoredModel | None:
    """What the run starts from, on every rank, opened and verified by the first one alone; None: from nothing.

    A new model of members starts from them, with the sizes and tokenizer of the first (a BTS model's hub). Raises
    UserError.
    """
    start = None
    if mesh.rank == 0 and config.checkpoint.init_from:
        start = open_model(config.checkpoint.init_from)
    elif mesh.rank == 0 and config.method == "moe":
        raise UsageError(
            "method moe starts from an upcycled checkpoint; make one with tools/upcycle.py and give it as "
            "--checkpoint.init_from"
        )
    elif mesh.rank == 0 and (members := method_members(config)):
        first = next(iter(members.values()))
        start = StoredModel(replace(config, model=first.config), first.folder, members)
    found: StoredModel | None = broadcast_object(start)
    return found


def adopt_sizes(config: RunConfig, explicit: set[str], start: StoredModel | None) -> RunConfig:
    """The configuration with model sizes, method and tokenizer of what the run starts from, where it starts from any.

    `explicit`: keys the user gave. Raises UsageError when one of them contradicts the weights.
    """
    if start is None:
        return config
    found, folder = start.config, start.folder
    if config.checkpoint.init_from:
        if "method" in explicit and found.method != config.method:
            raise UsageError(f"method is {config.method}, but {folder} holds a model of method {found.method}")
        unknown = set(config.bts.experts) - set(found.bts.experts) if "bts.experts" in explicit else set()
        if found.method == "bts" and unknown:
            raise UsageError(f"{folder} has no expert {min(unknown)}; add it with tools/stitch.py add, or leave it out")
        bts = _adopt(config.bts, found.bts, "bts", BTS_FREE, explicit, folder)
        bts.check_trainable()
        moe = _adopt(config.moe, found.moe, "moe", MOE_FREE, explicit, folder)
        routing = _adopt(config.routing, found.routing, "routing", set(), explicit, folder)
        config = replace(config, method=found.method, bts=bts, moe=moe, routing=routing)
    tokenizer = find_tokenizer(folder)
    if "data.tokenizer" not in explicit and tokenizer:
        config = replace(config, data=replace(config.data, tokenizer=tokenizer))
    return replace(config, model=_adopt(config.model, found.model, "model", MODEL_FREE, explicit, folder))


def _adopt(given: Section, found: Section, section: str, free: set[str], explicit: set[str], folder: Path) -> Section:
    """`found` with the given values of the `free` settings that are explicit; the other explicit ones must agree."""
    chosen = {name for name in vars(found) if f"{section}.{name}" in explicit}
    for name in sorted(chosen - free - MEMBERS):
        asked, has = getattr(given, name), getattr(found, name)
        if asked != has:
            raise UsageError(f"{section}.{name} is {asked}, but the weights in {folder} have {has}; leave it out")
    return replace(found, **{name: getattr(given, name) for name in chosen & free})


def build_run(config: RunConfig, mesh: ParallelMesh, device: torch.device, start: StoredModel | None) -> Run:
    """Model at its start, datasets and optimizer. Raises UserError for anything that does not fit together."""
    check_layout(config, mesh.world_size)
    mesh = mesh.routed if config.method == "moe" else mesh
    dtype = resolve_dtype(config.precision.dtype, device)
    tokenizer = build_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
    num_samples = config.train.steps * config.train.global_batch
    if not config.data.train:
        raise UsageError("data.train names no dataset; give data.train '{PREFIX: WEIGHT}'")
    vocab_size = config.model.vocab_size
    dataset = build_train_dataset(config.data, num_samples, tokenizer=tokenizer, vocab_size=vocab_size)
    valid = build_valid_datasets(config.data, config.train.valid_samples, tokenizer=tokenizer, vocab_size=vocab_size)
    loader = Loader(
        dataset,
        micro_batch=config.train.micro_batch,
        global_batch=config.train.global_batch,
        dp_rank=mesh.dp.rank,
        dp_size=mesh.dp.size,
        seq_length=config.data.seq_length,
        eod_id=tokenizer.eod_id if tokenizer else None,
        eod_mask_loss=config.data.eod_mask_loss,
        document_ids=not config.model.cross_document_attention,
        vocab_size=vocab_size,
    )
    model, members = _start(config, mesh, dtype, device, start)
    everywhere = gather_objects([name for name, _ in model.named_parameters()])
    freeze_unscaled(model, config.optimizer, {name for names in everywhere for name in names})
    optimizer = MasterAdamW(
        model.own_parameters(),
        config.optimizer,
        mesh,
        bucket_elements=config.parallel.bucket_mb * 1_000_000 // 4,
        tied=(EMBEDDING,) if config.method in ("dense", "moe") and config.model.tie_embeddings else (),
        device=device,
    )
    if not any(gather_objects(bool(optimizer.names))):
        raise UsageError("nothing would be trained; see bts.trainable and optimizer.lr_scale")
    stages = Stages(model, mesh, config.parallel, device)
    identity = data_hash(config.data, num_samples)
    return Run(config, mesh, device, model, stages, members, tokenizer, loader, valid, optimizer, identity)


def _start(
    config: RunConfig, mesh: ParallelMesh, dtype: torch.dtype, device: torch.device, start: StoredModel | None
) -> tuple[Built, list[MemberRecord]]:
    fuse = choose_fuse(config.train.compile, device, config.train.steps)
    if fuse is not eager:
        log.info("element-wise work is compiled in the first step, which may take minutes (train.compile)")
    if config.precision.fp8 != "none" and device.type == "cpu":
        log.warning("precision.fp8 on a CPU is for tests: a step takes hundreds of times as long as without")
    if start is None or not config.checkpoint.init_from:
        backend = make_backend(config, mesh, dtype, device, fuse)
        return new_model(config, mesh, backend, start.members if start else None)
    loaded = load_model(start, mesh, dtype, device, run=config, fuse=fuse)
    return loaded.model, loaded.members
