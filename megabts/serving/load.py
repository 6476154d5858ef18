"""From a folder to what is served, on every rank that holds a part of the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megabts.errors import UsageError, UserError
from megabts.inference.launch import Place, load_part
from megabts.parallel.mesh import ParallelMesh
from megabts.runtime.device import DTYPES
from megabts.serving.served import Limits, Served
from megabts.tokenizers.build import build_tokenizer

TOKENS_A_ROW = 2048
"""Of the caches, for each of the rows, where no number is given and the model may read more."""


@dataclass(frozen=True)
class Source:
    """What to serve, and how it is called."""

    checkpoint: Path
    name: str = ""
    """"": the folder's, or that of the run it is a checkpoint of."""
    tokenizer: str = ""
    """Path, bytes or null:VOCAB; "": the checkpoint's own."""
    special_tokens: bool = False
    """Whether a tokenizer.json's template adds its tokens to prompts."""
    dtype: str | None = None
    without: Sequence[str] = ()
    """Experts left out for all requests."""


def load_served(
    source: Source,
    place: Place,
    *,
    max_rows: int = 16,
    max_tokens: int | None = None,
    queue: int = 64,
    max_prompt_tokens: int | None = None,
    max_new_tokens: int | None = None,
    cuda_graphs: bool = True,
) -> tuple[Served, ParallelMesh]:
    """This rank's part of the model, ready to serve, and the mesh it is served on. Raises UserError, UsageError."""
    dtype = DTYPES[source.dtype] if source.dtype else None
    loaded, mesh = load_part(source.checkpoint, place, dtype, source.without)
    loaded.model.train(False)
    spec = loaded.tokenizer_or(source.tokenizer)
    tokenizer, longest = build_tokenizer(spec), loaded.model.config.max_seq_len
    if tokenizer.vocab_size > loaded.model.config.vocab_size:
        raise UserError(
            f"tokenizer {spec} has {tokenizer.vocab_size} ids and the model a vocabulary of "
            f"{loaded.model.config.vocab_size}; give the tokenizer that the model was trained with"
        )
    room = max_tokens or max(longest, max_rows * min(longest, TOKENS_A_ROW))
    most = min(longest, room) - 1
    limits = Limits(max_rows, room, queue, min(max_prompt_tokens or most, most), min(max_new_tokens or most, most))
    if most < 1:
        raise UsageError(f"--max-tokens is {room}; a prompt and a completion need 2 at least")
    return Served(
        loaded.model,
        loaded.config.method,
        source.name or _name(source.checkpoint),
        tokenizer,
        build_tokenizer(spec, include_special_tokens=True) if source.special_tokens else tokenizer,
        limits,
        alone=mesh.world_size == 1,
        cuda_graphs=cuda_graphs,
    ), mesh


def _name(folder: Path) -> str:
    """A folder's name; a checkpoint's is its run's."""
    whole = folder.resolve()
    return whole.parent.name if whole.name.startswith("step_") else whole.name
