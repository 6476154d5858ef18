"""Which exporter writes the Hugging Face folder of a checkpoint: by its method."""

from collections.abc import Callable, Mapping
from pathlib import Path

from megabts.checkpoint.hf_config import is_hf_folder
from megabts.checkpoint.source import CONFIG_FILE
from megabts.checkpoint.storage import resolve
from megabts.config.load import from_yaml
from megabts.convert.bts import export_bts
from megabts.convert.dense import export_dense
from megabts.convert.moe import export_moe
from megabts.convert.options import Options
from megabts.errors import UsageError, UserError

Exporter = Callable[[Path, Path, Options], None]
EXPORTERS: Mapping[str, Exporter] = {"dense": export_dense, "moe": export_moe, "bts": export_bts}
"""By method: (checkpoint, out, options)."""


def export(checkpoint: Path, out: Path, options: Options, reference: Mapping[str, Path] | None = None) -> None:
    """Write the Hugging Face folder `out` of a run or checkpoint folder.

    `reference`: see `export_bts`; of a BTS model only. Raises UserError, for a method that has no such form, too.
    """
    if not checkpoint.is_dir():
        raise UserError(f"there is no folder {checkpoint}; give a run or checkpoint folder")
    if is_hf_folder(checkpoint):
        raise UserError(f"{checkpoint} is a Hugging Face folder already; give a run or checkpoint folder")
    folder = resolve(checkpoint)
    method = from_yaml((folder / CONFIG_FILE).read_text(), str(folder / CONFIG_FILE)).method
    if method not in EXPORTERS:
        raise UserError(
            f"{folder} holds a model of method {method}, which has no Hugging Face form (only {', '.join(EXPORTERS)}); "
            "export its members one by one"
        )
    if reference is None:
        EXPORTERS[method](folder, out, options)
    elif method == "bts":
        export_bts(folder, out, options, reference=reference)
    else:
        raise UsageError(f"{folder} holds a {method} model, which has no members beside it; leave out --reference")
