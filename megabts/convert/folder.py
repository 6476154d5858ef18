"""A Hugging Face folder, written whole or not at all.

Everything goes into the hidden folder `.NAME.tmp`, synced; a rename gives it its name, after its check. Weights stream
into safetensors files of a bounded size (`model-00001-of-00003.safetensors` and an index, or one `model.safetensors`),
so writing takes the memory of one file's tensors.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megabts.checkpoint.durable import beside, remove_tree, sync_folder, write_file
from megabts.checkpoint.hf import INDEX, SINGLE
from megabts.checkpoint.hf_config import CONFIG
from megabts.checkpoint.safetensors_writer import serialize
from megabts.convert.options import Options
from megabts.convert.tokenizer import HFTokenizer
from megabts.errors import UserError

GENERATION_CONFIG = "generation_config.json"


def check_free(out: Path) -> None:
    """Raise UserError when there is something at `out` already."""
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists already; give another --out or remove it first")


def write_hf_folder(
    out: Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    options: Options,
    *,
    tokenizer: HFTokenizer | None = None,
    files: Mapping[str, str | bytes] | None = None,
    check: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write the Hugging Face folder `out`, which must not exist.

    `config`: of `config.json`; the tokenizer's special ids are added, there and in `generation_config.json`. `tensors`:
    by Hugging Face name, in the order to be stored; cast to `options.dtype`. `files`: more files by name (Python code).
    `check`: called with the hidden folder when all is in it; what it raises stops the export.
    Raises UserError (it exists, no space, disk failure, a name twice); nothing is left behind then.
    """
    check_free(out)
    aside = beside(out, "tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_tree(aside)
        aside.mkdir()
        _write_weights(aside, tensors, options)
        for name, content in _small_files(config, tokenizer, files or {}).items():
            write_file(aside / name, [content.encode() if isinstance(content, str) else content])
        sync_folder(aside)
        check(aside)
        check_free(out)
        os.rename(aside, out)
        sync_folder(out.parent)
    except OSError as error:
        remove_tree(aside)
        raise UserError(f"{out} not written: {error.strerror or error}; check the path and the disk") from error
    except BaseException:
        remove_tree(aside)
        raise


def _write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], options: Options) -> None:
    shards: list[list[str]] = []
    total = 0
    pending: dict[str, Tensor] = {}
    pending_bytes = 0

    def flush() -> None:
        shards.append(list(pending))
        write_file(folder / _part_name(len(shards)), serialize(pending))
        pending.clear()

    seen: set[str] = set()
    for name, tensor in tensors:
        if name in seen:
            raise UserError(f"tensor {name} comes twice; the two sides' names do not fit")
        seen.add(name)
        if options.dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(options.dtype)
        if pending and pending_bytes + tensor.nbytes > options.max_shard_bytes:
            flush()
            pending_bytes = 0
        pending[name] = tensor
        pending_bytes += tensor.nbytes
        total += tensor.nbytes
        del tensor
    flush()
    if len(shards) == 1:
        os.rename(folder / _part_name(1), folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        os.rename(folder / _part_name(number), folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_file(folder / INDEX, [_json(index).encode()])


def _part_name(number: int) -> str:
    """Of a file while it is not known how many there will be."""
    return f"part-{number:05d}.safetensors"


def _small_files(
    config: Mapping[str, Any], tokenizer: HFTokenizer | None, files: Mapping[str, str | bytes]
) -> dict[str, str | bytes]:
    """Every file but the weights, by name."""
    ids = tokenizer.special_ids if tokenizer else {}
    result: dict[str, str | bytes] = {
        CONFIG: _json({**config, **ids}),
        GENERATION_CONFIG: _json({"_from_model_config": True, **ids}),
        **(tokenizer.files if tokenizer else {}),
    }
    clash = sorted(result.keys() & files.keys())
    assert not clash, f"{clash} are this function's own"
    return result | dict(files)


def _json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"
