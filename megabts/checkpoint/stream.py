"""A checkpoint written while its tensors are made, in the memory of one of them: each in a file of its own."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megabts.checkpoint.folder import MANIFEST_ALLOWANCE, abandon_folder, begin_folder, finish_folder, write_files
from megabts.checkpoint.manifest import MODEL_FILE, MemberRecord
from megabts.checkpoint.pieces import WHOLE, Placed, TensorRecord


def write_streaming(
    folder: Path,
    names: Sequence[str],
    tensors: Iterable[tuple[str, Tensor]],
    num_bytes: int,
    blobs: Mapping[str, bytes],
    state: Mapping[str, Any],
    members: Sequence[MemberRecord] = (),
) -> None:
    """Write the weights `tensors`, which come by `names`, of `num_bytes` in all, as `write_checkpoint` would.

    Raises CheckpointError (no space, disk failure); nothing is left behind then, nor when making a tensor raises.
    """
    files = {name: f"model/{name}.safetensors" for name in names}
    needed = num_bytes + sum(map(len, blobs.values())) + MANIFEST_ALLOWANCE
    table = {}
    try:
        begin_folder(folder, [*files.values(), *blobs], needed)
        records = write_files(folder, {}, blobs, needed)
        for name, tensor in tensors:
            records |= write_files(folder, {files[name]: {name: tensor}}, {}, needed)
            table[name] = TensorRecord(tuple(tensor.shape), (Placed(files[name], name, WHOLE),))
            del tensor
        assert table.keys() == files.keys(), "every name has a tensor"
        finish_folder(folder, records, {MODEL_FILE: table}, state, members)
    except BaseException:
        abandon_folder(folder)
        raise
