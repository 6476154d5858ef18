"""How an exporter checks its folder: logits of both sides, or every tensor that was to be stored."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from megabts.config.model import ModelConfig
from megabts.convert.options import Options
from megabts.convert.verify import (
    check_logits,
    check_tensors,
    checkpoint_logits,
    fixed_tokens,
    spread_positions,
    transformers_logits,
)
from megabts.errors import UserError

Tensors = Callable[[], Iterator[tuple[str, Tensor]]]
"""What is to be stored, by Hugging Face name; every call gives it anew."""


def stored_tensors(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """These tensors of a Hugging Face folder, which has no others. Raises UserError."""
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in folder.glob("*.safetensors")]
        source = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - it is no dictionary
        wanted = list(names)
        if odd := sorted(source.keys() ^ set(wanted)):
            raise UserError(f"{folder}: tensor {odd[0]} is missing or not part of the model; export it again")
        for name in wanted:
            yield name, source[name].get_tensor(name)


def check_export(
    checkpoint: Path,
    folder: Path,
    out: Path,
    model: ModelConfig,
    dtype: torch.dtype,
    tensors: Tensors,
    options: Options,
    *,
    remote_code: bool = False,
) -> None:
    """Compare the exported `folder`, which the user will know as `out`, with its checkpoint. Raises UserError.

    `dtype`: what transformers loads the weights in, to which the checkpoint's are rounded for the logits.
    """
    if options.check == "tensors":
        expected = ((name, tensor.to(options.dtype or tensor.dtype)) for name, tensor in tensors())
        check_tensors(expected, stored_tensors(folder, [name for name, _ in tensors()]), out, options.say)
        return
    tokens, places = fixed_tokens(model), spread_positions(model)
    ours = checkpoint_logits(checkpoint, tokens, dtype, places)
    theirs = transformers_logits(folder, tokens, remote_code=remote_code, positions=places)
    check_logits(ours, theirs, out, options.say)
