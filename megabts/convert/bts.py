"""Stitched models as a class of their own in transformers: `AutoModelForCausalLM` with `trust_remote_code=True`.

The folder holds the class, a few Python files that need torch and transformers alone (`remote/`), and either all
weights, or the stitches alone and where the members' Hugging Face folders lie, with their content hashes. Tensors are
`members.NAME.` and the name without `model.` that a member's has in its own family, and the stitches' as in a megabts
checkpoint. Every form of the stitches is carried; the dropout of training is not.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megabts.bts.plan import stitch_plan
from megabts.build import StoredModel, open_model
from megabts.checkpoint.hf import hf_content_hash, weights_from_hf, weights_to_hf
from megabts.checkpoint.hf_config import STITCHED, config_from_hf, config_to_hf, is_hf_folder
from megabts.checkpoint.manifest import MODEL_FILE
from megabts.checkpoint.reader import TensorReader
from megabts.checkpoint.source import DenseSource
from megabts.config.methods import HUB
from megabts.convert.folder import check_free, write_hf_folder
from megabts.convert.options import Options
from megabts.convert.tokenizer import hf_tokenizer
from megabts.convert.verify import check_models, check_stored, check_tensors
from megabts.errors import UserError
from megabts.runtime.extras import require
from megabts.tokenizers.build import find_tokenizer

REMOTE = Path(__file__).parent / "remote"
CODE = ("configuration_megabts.py", "modeling_megabts.py", "parts_megabts.py")
"""What goes into the folder as it is."""
ARCHITECTURE = "MegaBTSForCausalLM"
AUTO_MAP = {
    "AutoConfig": "configuration_megabts.MegaBTSConfig",
    "AutoModelForCausalLM": f"modeling_megabts.{ARCHITECTURE}",
}
STORED = ("dtype", "torch_dtype", "architectures", "bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of a member's configuration that the model's own takes the place of."""


def export_bts(checkpoint: Path, out: Path, options: Options, *, reference: Mapping[str, Path] | None = None) -> None:
    """Write the Hugging Face folder `out` of a stitched checkpoint.

    `reference` None: with all members' weights. Else the folder names the members' Hugging Face folders: those given
    here by member name, for the others the ones that the model was stitched of. Weights of members are then stored, and
    stay, as they are in their folders. Raises UserError (it exists, a member has no such folder or family, transformers
    computes something else), before anything has the name `out`.
    """
    check_free(out)
    if options.check == "logits":
        require("hf")
    stored = open_model(checkpoint)
    with TensorReader(stored.folder, MODEL_FILE) as reader:
        dtype = options.dtype or reader.read(next(iter(reader.shapes))).dtype
    config = bts_config(stored, str(dtype).removeprefix("torch."))
    if reference is not None:
        config |= _references(stored, reference)
    tokenizer = hf_tokenizer(find_tokenizer(stored.folder) or stored.members[HUB].tokenizer)
    for note in (tokenizer.note, _document_note(stored)):
        if note:
            options.say(note)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        if reference is None:
            for name, source in stored.members.items():
                yield from member_tensors(stored, name, source)
        with TensorReader(stored.folder, MODEL_FILE) as reader:
            yield from reader.items()

    def check(folder: Path) -> None:
        if options.check == "logits":
            model = stored.config.model
            check_models(stored.folder, folder, model, options, out, dtype=dtype, remote_code=True)
        else:
            check_stored(folder, tensors, options, out)

    files = {name: (REMOTE / name).read_text(encoding="utf-8") for name in CODE}
    write_hf_folder(out, config, tensors(), options, tokenizer=tokenizer, files=files, check=check)
    options.say(f"wrote {out}: {ARCHITECTURE}, {config['dtype']}; load it with trust_remote_code=True")


def bts_config(stored: StoredModel, dtype: str) -> dict[str, Any]:
    """The `config.json` of a stitched model whose weights are loaded as `dtype`. Raises UserError as `family_of`."""
    bts, model = stored.config.bts, stored.config.model
    members = [config_to_hf(source.config, dtype) for source in stored.members.values()]
    plan = stitch_plan(model.num_layers, bts)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": STITCHED,
        "auto_map": AUTO_MAP,
        "member_names": list(stored.members),
        "member_configs": [{key: value for key, value in raw.items() if key not in STORED} for raw in members],
        "stitch_points": [[point.after, point.kind] for point in plan],
        "expert_stream": bts.expert_stream,
        "start": bts.start,
        "gate": bts.gate,
        "gate_input": bts.gate_input,
        "projection_rank": bts.projection_rank,
        "output": bts.output,
        "evidence": bts.evidence,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers * len(bts.members) + (bts.evidence > 0),
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "max_position_embeddings": model.max_seq_len,
        "tie_word_embeddings": False,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def member_tensors(stored: StoredModel, name: str, source: DenseSource) -> Iterator[tuple[str, Tensor]]:
    """A member's weights by their names in the stitched model's folder, those alone that it reads."""
    headless = name != HUB and stored.config.bts.output == "hub"
    for theirs, tensor in weights_to_hf(source.config, source.weights()):
        if not (headless and theirs in ("model.norm.weight", "lm_head.weight")):
            yield f"members.{name}.{theirs.removeprefix('model.')}", tensor


def _references(stored: StoredModel, given: Mapping[str, Path]) -> dict[str, Any]:
    """The keys that name the members' folders. Raises UserError for one that does not hold the member's weights."""
    unknown = sorted(given.keys() - stored.members.keys())
    if unknown:
        raise UserError(f"there is no member {unknown[0]!r} to refer to; the members are {', '.join(stored.members)}")
    folders, hashes = [], []
    for name, source in stored.members.items():
        folder = given.get(name, source.folder).resolve()
        if not is_hf_folder(folder):
            raise UserError(
                f"member {name} at {folder} is no Hugging Face folder; export it to one and name that, or merge the "
                "members into the export"
            )
        if folder != source.folder.resolve():
            order = [key for key, _ in source.weights()]
            theirs = weights_from_hf(folder, order, config_from_hf(folder, source.config.max_seq_len))
            check_tensors(source.weights(order), theirs, folder, lambda line: None)
        folders.append(str(folder))
        hashes.append(hf_content_hash(folder))
    return {"member_folders": folders, "member_hashes": hashes}


def _document_note(stored: StoredModel) -> str:
    if stored.config.model.cross_document_attention:
        return ""
    return "the model reads each document by itself (model.cross_document_attention); give transformers one at a time"
