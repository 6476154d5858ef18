"""Hugging Face folders in and out.

import: a megabts checkpoint of a Hugging Face model (Llama 2 and 3, Mistral, Qwen2, Qwen2.5, Qwen3, OLMo-2), which
training, evaluation, generation and stitching take. They take the folder itself, too; import it to continue training
where the folder may not stay.
export: a Hugging Face folder of a checkpoint, for transformers and what reads its folders: dense models and soups in
their family, BTX and sparse upcycled models as Mixtral, Qwen3-MoE or FlexOlmo, BTS models with their own Python code.

python tools/convert_checkpoint.py import --hf models/qwen --out runs/seed
python tools/convert_checkpoint.py export --checkpoint runs/soup --out hf/soup --dtype bfloat16

Both read again what they wrote and compare: both sides' logits of the same tokens in fp32, or, with --check tensors,
every weight. Nothing has the name OUT before that. Existing folders are never overwritten.
"""

from pathlib import Path

from megabts.config.tool_parser import ToolParser
from megabts.errors import UsageError, run_tool

DTYPES = ("float32", "bfloat16", "float16")


def main() -> None:
    """Parse, call one function of megabts.convert."""
    parser = ToolParser(description=__doc__)
    parser.add_argument("action", choices=("import", "export"))
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--check",
        choices=("logits", "tensors"),
        default="logits",
        help="logits: needs transformers and the memory of the model in fp32 (default); tensors: bit for bit",
    )
    importing = parser.add_argument_group("import")
    importing.add_argument("--hf", type=Path, metavar="DIR", help="folder with config.json and safetensors")
    importing.add_argument("--max-seq-len", type=int, metavar="N", help="longest sequence (default: the folder's)")
    exporting = parser.add_argument_group("export")
    exporting.add_argument("--checkpoint", type=Path, metavar="DIR", help="run or checkpoint folder")
    exporting.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as they are stored)")
    exporting.add_argument(
        "--max-shard-bytes", type=int, default=5 * 10**9, metavar="N", help="of one weight file (default: 5e9)"
    )
    exporting.add_argument(
        "--reference",
        action="store_true",
        default=None,
        help="BTS: name the members' Hugging Face folders, do not copy",
    )
    exporting.add_argument(
        "--member", action="append", metavar="NAME=DIR", help="with --reference: where a member's folder is (several)"
    )
    args = parser.parse_args()
    others = {"import": ("checkpoint", "dtype", "reference", "member"), "export": ("hf", "max_seq_len")}
    for name in others[args.action]:
        if getattr(args, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} is not of {args.action}; leave it out")

    import torch

    from megabts.convert.dense import import_dense
    from megabts.convert.export import export
    from megabts.convert.options import Options

    if args.member and not args.reference:
        raise UsageError("--member goes with --reference; add it")
    if args.max_shard_bytes < 1:
        raise UsageError(f"--max-shard-bytes is {args.max_shard_bytes}; give at least 1")
    dtype = getattr(torch, args.dtype) if args.dtype else None
    options = Options(dtype, args.max_shard_bytes, args.check)
    if args.action == "export":
        if not args.checkpoint:
            raise UsageError("export needs --checkpoint DIR")
        export(args.checkpoint, args.out, options, named_folders(args.member or []) if args.reference else None)
        return
    if not args.hf:
        raise UsageError("import needs --hf DIR")
    if args.max_seq_len is not None and args.max_seq_len < 1:
        raise UsageError(f"--max-seq-len is {args.max_seq_len}; give at least 1")
    config = import_dense(args.hf, args.out, options, args.max_seq_len)
    print(f"wrote {args.out}: {config.model.num_parameters:,} parameters")


def named_folders(items: list[str]) -> dict[str, Path]:
    """{"code": DIR} from ["code=DIR"]."""
    pairs = [item.partition("=") for item in items]
    for item, (name, _, path) in zip(items, pairs, strict=True):
        if not name or not path:
            raise UsageError(f"--member {item} is not of the form NAME=DIR")
    return {name: Path(path) for name, _, path in pairs}


if __name__ == "__main__":
    run_tool(main)
