"""What was written is read again and must compute what it was made from.

Both sides see the same random tokens, in fp32, one model after the other. The bar is relative to the largest logit:
two correct programs differ by rounding (below 1e-5 on models of a few layers), a wrong name, rotation or norm by far
more.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megabts.build import load_model
from megabts.config.model import ModelConfig
from megabts.convert.options import Options
from megabts.errors import UserError
from megabts.model.attention import make_context
from megabts.model.decoder import Model
from megabts.parallel.mesh import ParallelMesh
from megabts.runtime.extras import require

THRESHOLD = 1e-4
"""Largest difference of two logits, as a part of the largest logit."""
BATCH = (2, 48)
"""Sequences and tokens of the check."""


def fixed_tokens(config: ModelConfig) -> Tensor:
    """The check's tokens [b, s]: always the same for a vocabulary and a longest sequence."""
    batch, length = BATCH
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (batch, min(length, config.max_seq_len)), generator=generator)


def spread_positions(config: ModelConfig) -> Tensor:
    """Where the check's tokens stand [s]: half of them at the beginning, half spread up to the longest sequence.

    A wrong rotary scaling shows there.
    """
    length = min(BATCH[1], config.max_seq_len)
    first = length // 2
    return torch.cat([torch.arange(first), torch.linspace(first, config.max_seq_len - 1, length - first).long()])


@torch.no_grad()
def model_logits(model: Model, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
    """Logits [b, s, V] of a megabts model on one rank, fp32; `positions` [s] of the tokens, None: 0, 1, ..."""
    positions = torch.arange(tokens.shape[1]) if positions is None else positions
    context = make_context(model.config, positions, model.dtype, tokens=tokens)
    hidden = model.run_layers(0, model.config.num_layers, model.embed(tokens), context)
    return model.logits(hidden, context).float()


def checkpoint_logits(
    checkpoint: Path, tokens: Tensor, dtype: torch.dtype | None = None, positions: Tensor | None = None
) -> Tensor:
    """Logits [b, s, V] of a megabts checkpoint of any method, fp32; `dtype`: its weights rounded to that first."""
    model = load_model(checkpoint, ParallelMesh(), torch.float32, "cpu").model.eval()
    if dtype is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(dtype))
    return model_logits(model, tokens, positions)


@torch.no_grad()
def transformers_logits(
    folder: Path, tokens: Tensor, *, remote_code: bool = False, positions: Tensor | None = None
) -> Tensor:
    """Logits [b, s, V] of a Hugging Face folder in transformers, fp32, without a cache.

    `positions` [s] of the tokens, None: 0, 1, ... `remote_code`: run the Python files in the folder. Raises UserError
    when the library does not load the folder, or names tensors that are missing or left over.
    """
    require("hf")
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with TemporaryDirectory() as temporary:  # older versions import the code as a module of the folder's name
            plain = Path(temporary, "exported")
            plain.symlink_to(folder.resolve(), target_is_directory=True)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                plain, trust_remote_code=remote_code, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # the library raises everything
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"transformers does not load {folder}: {type(error).__name__}: {reason}") from error
    model, report = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            first = sorted(report[kind], key=str)[0]
            raise UserError(f"{folder}: transformers reports {kind}: {first} ({len(report[kind])} such)")
    placed = {}
    if positions is not None:  # with a mask, or gaps between positions would be taken for ends of packed documents
        placed = {"position_ids": positions.expand_as(tokens), "attention_mask": torch.ones_like(tokens)}
    logits: Tensor = model.float().eval()(input_ids=tokens, use_cache=False, **placed).logits
    return logits


def check_logits(ours: Tensor, theirs: Tensor, where: Path, say: Callable[[str], object] = print) -> float:
    """The largest difference of two sides' logits, as a part of the largest logit; said in one line.

    Raises UserError when it is above `THRESHOLD` or not a number.
    """
    if ours.shape != theirs.shape:
        raise UserError(f"{where}: logits are {list(theirs.shape)} there and {list(ours.shape)} here; names do not fit")
    difference = ((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-30)).item()
    figures = f"largest relative difference of logits {difference:.1e} (threshold {THRESHOLD:.0e})"
    if not difference <= THRESHOLD:
        raise UserError(f"{where} does not compute the same: {figures}; please report the model's configuration")
    say(f"checked: {figures}, {ours.shape[0]} x {ours.shape[1]} tokens, fp32")
    return difference


def check_models(
    checkpoint: Path,
    hf_dir: Path,
    model: ModelConfig,
    options: Options,
    where: Path,
    *,
    dtype: torch.dtype | None = None,
    remote_code: bool = False,
) -> None:
    """Compare both sides' logits of the check's tokens; `where`: what errors name. Raises UserError.

    `dtype`: the checkpoint's weights are rounded to that first; `remote_code`: run the Python files in `hf_dir`.
    """
    tokens, positions = fixed_tokens(model), spread_positions(model)
    ours = checkpoint_logits(checkpoint, tokens, dtype, positions)
    theirs = transformers_logits(hf_dir, tokens, remote_code=remote_code, positions=positions)
    check_logits(ours, theirs, where, options.say)


Tensors = Iterable[tuple[str, Tensor]]


def stored_tensors(hf_dir: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """These tensors of a Hugging Face folder, which has no others. Raises UserError."""
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in hf_dir.glob("*.safetensors")]
        source = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - it is no dictionary
        wanted = list(names)
        if odd := sorted(source.keys() ^ set(wanted)):
            raise UserError(f"{hf_dir}: tensor {odd[0]} is missing or not part of the model; export it again")
        for name in wanted:
            yield name, source[name].get_tensor(name)


def check_tensors(ours: Tensors, theirs: Tensors, where: Path, say: Callable[[str], object] = print) -> int:
    """Compare two iterators of (name, tensor) bit for bit; their number. Raises UserError naming the first difference.

    Both must come in one order.
    """
    count = 0
    for (name, mine), (other, its) in zip(ours, theirs, strict=True):
        if name != other or mine.dtype != its.dtype or mine.shape != its.shape:
            raise UserError(f"{where}: {other} ({its.dtype}) stands for {name} ({mine.dtype}); is it that model's?")
        if not torch.equal(mine.contiguous().view(torch.uint8), its.contiguous().view(torch.uint8)):
            raise UserError(f"{where}: the values of {name} differ from the source's; is it that model's?")
        count += 1
    say(f"checked: {count} tensors, bit for bit")
    return count


def check_stored(hf_dir: Path, tensors: Callable[[], Tensors], options: Options, where: Path) -> None:
    """Compare an exported folder's tensors with those that were to be stored, which every call of `tensors` gives anew.

    Raises UserError.
    """
    expected = ((name, tensor.to(options.dtype or tensor.dtype)) for name, tensor in tensors())
    check_tensors(expected, stored_tensors(hf_dir, [name for name, _ in tensors()]), where, options.say)
