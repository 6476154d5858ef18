"""Several indexed datasets put together to one."""

from collections.abc import Sequence
from pathlib import Path

from megabts.data.indexed import IndexedDataset, IndexedDatasetBuilder
from megabts.data.sidecar import merge_sidecars
from megabts.errors import UserError


def find_datasets(folder: str | Path) -> list[str]:
    """The prefixes of all datasets in a folder, in the order of their names. Raises UserError for half a dataset."""
    if not Path(folder).is_dir():
        raise UserError(f"there is no folder {folder}")
    found = {suffix: {str(path)[:-4] for path in Path(folder).glob(f"*.{suffix}")} for suffix in ("bin", "idx")}
    for prefix in sorted(found["bin"] ^ found["idx"]):
        have, lack = ("bin", "idx") if prefix in found["bin"] else ("idx", "bin")
        raise UserError(f"{prefix}.{have} has no {prefix}.{lack} beside it; add it, or move the file away")
    if not found["idx"]:
        raise UserError(f"folder {folder} holds no datasets (.bin and .idx)")
    return sorted(found["idx"])


def merge_datasets(prefixes: Sequence[str], output_prefix: str) -> IndexedDataset:
    """Write the datasets one after the other to `output_prefix`, and open the result.

    Sidecars are merged: counts add up. Where one of the datasets has none, neither has the result. Raises UserError
    when token types or tokenizers differ, a dataset is damaged, or the output is one of the inputs.
    """
    parts = [IndexedDataset(prefix) for prefix in prefixes]
    for part in parts:
        if Path(part.prefix).resolve() == Path(output_prefix).resolve():
            raise UserError(f"the output {output_prefix} is one of the inputs; move it, or write to another folder")
    sidecar = merge_sidecars([(part.prefix, part.sidecar) for part in parts])
    with IndexedDatasetBuilder(output_prefix, parts[0].dtype) as builder:
        for part in parts:
            builder.add_index(part.prefix)
        builder.finalize(sidecar)
    return IndexedDataset(output_prefix)
