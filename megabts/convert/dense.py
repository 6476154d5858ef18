"""Dense models between megabts checkpoints and Hugging Face folders, both ways, tensor by tensor."""

import os
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megabts.assemble import untrained_files
from megabts.build import full_shapes, whole_model
from megabts.checkpoint.durable import beside, remove_tree, sync_folder
from megabts.checkpoint.hf import weights_from_hf, weights_to_hf
from megabts.checkpoint.hf_config import config_from_hf, config_to_hf, dtype_from_hf, family_of, is_hf_folder
from megabts.checkpoint.manifest import MODEL_FILE
from megabts.checkpoint.reader import TensorReader
from megabts.checkpoint.source import DenseSource, open_dense
from megabts.checkpoint.stream import write_streaming
from megabts.config.run import PrecisionConfig, RunConfig
from megabts.convert.folder import check_free, write_hf_folder
from megabts.convert.options import Options
from megabts.convert.tokenizer import hf_tokenizer
from megabts.convert.verify import check_models, check_tensors
from megabts.errors import UserError
from megabts.runtime.extras import require
from megabts.tokenizers.build import find_tokenizer


def import_dense(hf_dir: Path, out: Path, options: Options, max_seq_len: int | None = None) -> RunConfig:
    """Write the checkpoint `out` of a Hugging Face folder, in the memory of one tensor; returns its configuration.

    Weights stay in their stored type (`options.dtype` is an export's). `max_seq_len`: see `config_from_hf`. Raises
    UserError (it exists, a feature that is not supported, a tensor missing or left over, another result), before
    anything has the name `out`.
    """
    check_free(out)
    if not is_hf_folder(hf_dir):
        raise UserError(f"{hf_dir} is not a Hugging Face folder (no config.json); give one")
    if options.check == "logits":
        require("hf")
    model = config_from_hf(hf_dir, max_seq_len)
    exact = "bfloat16" if dtype_from_hf(hf_dir) == "bfloat16" else "float32"
    config = RunConfig(model=model, precision=PrecisionConfig(dtype=exact))  # type: ignore[arg-type]
    shapes = full_shapes(whole_model(config))
    value_bytes = next(weights_from_hf(hf_dir, shapes, model))[1].element_size()
    blobs, state = untrained_files(config, find_tokenizer(hf_dir))
    aside = beside(out, "unchecked")
    try:
        size = sum(map(prod, shapes.values())) * value_bytes
        write_streaming(aside, list(shapes), weights_from_hf(hf_dir, shapes, model), size, blobs, state)
        if options.check == "logits":
            check_models(aside, hf_dir, model, options, out)
        else:
            with TensorReader(aside, MODEL_FILE) as reader:
                check_tensors(weights_from_hf(hf_dir, reader.shapes, model), reader.items(), out, options.say)
        check_free(out)
        os.rename(aside, out)
        sync_folder(out.parent)
    finally:
        remove_tree(aside)
    return config


def export_dense(checkpoint: Path, out: Path, options: Options) -> None:
    """Write the Hugging Face folder `out` of a dense checkpoint or a soup, in the family that fits it.

    Raises UserError (it exists, no family has these options, transformers computes something else), before anything
    has the name `out`.
    """
    check_free(out)
    if options.check == "logits":
        require("hf")
    source = open_dense(checkpoint)
    family_of(source.config)  # raises before any weight is read
    stored = next(source.weights())[1].dtype
    config = config_to_hf(source.config, str(options.dtype or stored).removeprefix("torch."))
    tokenizer = hf_tokenizer(source.tokenizer)
    if tokenizer.note:
        options.say(tokenizer.note)

    def check(folder: Path) -> None:
        if options.check == "logits":
            check_models(source.folder, folder, source.config, options, out, dtype=options.dtype)
        else:
            names = [name for name, _ in source.weights()]
            check_tensors(_cast(source, options.dtype), weights_from_hf(folder, names), out, options.say)

    weights = weights_to_hf(source.config, source.weights())
    write_hf_folder(out, config, weights, options, tokenizer=tokenizer, check=check)
    options.say(f"wrote {out}: {config['architectures'][0]}, {config['dtype']}")


def _cast(source: DenseSource, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in source.weights():
        yield name, tensor.to(dtype or tensor.dtype)
