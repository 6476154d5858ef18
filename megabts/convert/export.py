"""Which exporter writes the Hugging Face folder of a checkpoint: by its method."""

from collections.abc import Callable, Mapping
from pathlib import Path

from megabts.checkpoint.hf_config import is_hf_folder
from megabts.checkpoint.source import CONFIG_FILE
from megabts.checkpoint.storage import resolve
from megabts.config.load import from_yaml
from megabts.convert.dense import export_dense
from megabts.convert.options import Options
from megabts.errors import UserError

Exporter = Callable[[Path, Path, Options], None]
EXPORTERS: Mapping[str, Exporter] = {"dense": export_dense}
"""By method: (checkpoint, out, options)."""


def export(checkpoint: Path, out: Path, options: Options) -> None:
    """Write the Hugging Face folder `out` of a run or checkpoint folder. Raises UserError, for its method too."""
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
    EXPORTERS[method](folder, out, options)
