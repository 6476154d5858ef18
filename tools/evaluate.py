"""Loss, perplexity and bits per byte of a model on each domain's text.

python tools/evaluate.py --checkpoint runs/bts --data code=data/code_valid_text_document math=data/math_valid

The checkpoint may be of any method, or a Hugging Face Llama folder. Without --data the run's own validation sets are
read. Windows follow one another and do not overlap, so every token is predicted once; the run's data.eod_mask_loss
holds here too. With --protocol documents each window is the beginning of a document, and others, "mixed", switch
domains every 32 to 64 tokens; losses are also told by position.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

from megabts.config.tool_parser import ToolParser
from megabts.errors import UsageError, UserError, run_tool


def main() -> None:
    """Load the model and the windows, call domain_losses, print a table."""
    parser = ToolParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="checkpoint, run or Hugging Face folder")
    parser.add_argument("--data", nargs="+", default=[], metavar="[DOMAIN=]PREFIX", help="indexed datasets")
    parser.add_argument("--seq-length", type=int, metavar="N", help="tokens a window (default: the run's)")
    parser.add_argument(
        "--protocol", choices=("stream", "documents"), default="stream", help="which windows (default: stream)"
    )
    parser.add_argument("--samples", type=int, metavar="N", help="windows per domain, spread evenly (default: all)")
    parser.add_argument("--micro-batch", type=int, default=16, metavar="N", help="windows at a time")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the run's")
    parser.add_argument("--without", action="append", default=[], metavar="NAME", help="leave out this expert")
    parser.add_argument("--tokenizer", help="tokenizer the data must have been made with (default: the checkpoint's)")
    parser.add_argument("--json", type=Path, metavar="F", help="also write {domain: {loss, perplexity, ...}} to F")
    args = parser.parse_args()
    for flag in ("seq_length", "samples", "micro_batch"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UsageError(f"--{flag.replace('_', '-')} is {getattr(args, flag)}; it must be at least 1")

    from megabts.build import load_model
    from megabts.data.build import build_valid_datasets
    from megabts.evaluation.perplexity import batch_loss, domain_losses
    from megabts.evaluation.report import losses_json, losses_table
    from megabts.evaluation.windows import document_losses
    from megabts.parallel.mesh import ParallelMesh
    from megabts.runtime.device import DTYPES, Launch, pick_device, share_cores
    from megabts.tokenizers.build import build_tokenizer

    launch = Launch()
    share_cores(launch)
    mesh, device = ParallelMesh(), pick_device(launch)
    loaded = load_model(args.checkpoint, mesh, DTYPES[args.dtype] if args.dtype else None, device, without=args.without)
    spec = args.tokenizer or loaded.tokenizer
    tokenizer = build_tokenizer(spec) if spec else None
    data = replace(
        loaded.config.data,
        train={},
        valid=named_prefixes(args.data) or loaded.config.data.valid,
        seq_length=args.seq_length or loaded.config.data.seq_length,
    )
    sets = build_valid_datasets(data, args.samples, tokenizer=tokenizer, vocab_size=loaded.config.model.vocab_size)
    if not sets:
        raise UsageError("the run has no validation sets; give --data DOMAIN=PREFIX ...")
    loaded.model.train(False)
    if args.protocol == "documents":
        measured = document_losses(loaded.model, sets, args.samples, device, args.micro_batch)
        results = {domain: losses.mean for domain, losses in measured.items()}
        content = losses_json(results)
        for domain, losses in measured.items():
            content[domain]["by_position"] = losses.by_position
    else:
        results = domain_losses(
            partial(batch_loss, loaded.model, device=device),
            sets,
            model=loaded.config.model,
            micro_batch=args.micro_batch,
            dp=mesh.dp,
            device=device,
            eod_id=tokenizer.eod_id if tokenizer else None,
            eod_mask_loss=data.eod_mask_loss,
        )
        content = losses_json(results)
    print(losses_table(results))
    if args.json:
        write_json(args.json, content)


def write_json(path: Path, content: object) -> None:
    """Write JSON, with its folder. Raises UserError."""
    from megabts.checkpoint.durable import replace_text

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--json {path} cannot be written: {error.strerror}") from error


def named_prefixes(items: list[str]) -> dict[str, str]:
    """{"code": "PREFIX"} from ["code=PREFIX"]; a bare prefix is named by its last part."""
    named = {}
    for item in items:
        domain, equals, prefix = item.partition("=")
        named[domain if equals else Path(item).name] = prefix if equals else item
    if len(named) < len(items):
        raise UsageError("two --data have one name; name them DOMAIN=PREFIX")
    return named


if __name__ == "__main__":
    run_tool(main)
