"""Loss, perplexity and bits per byte of a model on each domain's text; or its results on benchmark tasks.

python tools/evaluate.py --checkpoint runs/bts --data code=data/code_valid_text_document math=data/math_valid
python tools/evaluate.py --checkpoint runs/bts --tasks examples/tasks/local/local.yaml

The checkpoint may be of any method, or a Hugging Face folder. Without --data the run's own validation sets are
read. Windows follow one another and do not overlap, so every token is predicted once; the run's data.eod_mask_loss
holds here too. With --protocol documents each window is the beginning of a document, and others, "mixed", switch
domains every 32 to 64 tokens; losses are also told by position. With --tasks, tasks of lm-evaluation-harness run, by
name or task file; under torchrun every rank holds a model and takes a share, or --tensor x --expert ranks hold one.
"""

import argparse
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megabts.config.tool_parser import ToolParser
from megabts.errors import UsageError, UserError, run_tool

TASK_FLAGS = ("include_path", "limit", "shots", "max_length", "confirm_run_unsafe_code", "tensor", "expert")
DATA_FLAGS = ("data", "seq_length", "protocol", "samples")


def main() -> None:
    """Read the flags, then measure losses or run tasks; print a table."""
    args = parse_args()
    content = on_tasks(args) if args.tasks else on_data(args)
    if args.json and content is not None:
        write_json(args.json, content)


def parse_args() -> argparse.Namespace:
    """The flags. Raises UsageError."""
    parser = ToolParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="checkpoint, run or Hugging Face folder")
    parser.add_argument("--micro-batch", type=int, default=16, metavar="N", help="windows or texts at a time")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the run's")
    parser.add_argument("--without", action="append", default=[], metavar="NAME", help="leave out this expert")
    parser.add_argument("--tokenizer", help="tokenizer the data was or is to be made with (default: the checkpoint's)")
    parser.add_argument("--json", type=Path, metavar="F", help="also write the results to F")
    losses = parser.add_argument_group("losses")
    losses.add_argument("--data", nargs="+", metavar="[DOMAIN=]PREFIX", help="indexed datasets")
    losses.add_argument("--seq-length", type=int, metavar="N", help="tokens a window (default: the run's)")
    losses.add_argument("--protocol", choices=("stream", "documents"), help="which windows (default: stream)")
    losses.add_argument("--samples", type=int, metavar="N", help="windows per domain, spread evenly (default: all)")
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("--tasks", type=lambda text: text.split(","), metavar="NAME|FILE,..", help="tasks or groups")
    tasks.add_argument("--include-path", action="append", type=Path, metavar="DIR", help="folder of task files")
    tasks.add_argument("--limit", type=int, metavar="N", help="documents of each task, for trials (default: all)")
    tasks.add_argument("--shots", type=int, metavar="N", help="examples before each question (default: the task's)")
    tasks.add_argument("--max-length", type=int, metavar="N", help="tokens read at once (default: model.max_seq_len)")
    tasks.add_argument(
        "--confirm-run-unsafe-code", action="store_const", const=True, help="let tasks run code the model writes"
    )
    tasks.add_argument("--tensor", type=int, metavar="N", help="tensor-parallel ranks of a model (default: 1)")
    tasks.add_argument("--expert", type=int, metavar="N", help="expert-parallel ranks of a model (default: 1)")
    args = parser.parse_args()
    for flag in ("seq_length", "samples", "micro_batch", "limit", "max_length", "tensor", "expert"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UsageError(f"--{flag.replace('_', '-')} is {getattr(args, flag)}; it must be at least 1")
    if args.shots is not None and args.shots < 0:
        raise UsageError(f"--shots is {args.shots}; it must be at least 0")
    others = DATA_FLAGS if args.tasks else TASK_FLAGS
    useless = next((flag for flag in others if getattr(args, flag) is not None), None)
    if useless:
        which = "without --tasks" if args.tasks else "with --tasks"
        raise UsageError(f"--{useless.replace('_', '-')} means something {which} only; leave it out, or --tasks")
    return args


def on_data(args: argparse.Namespace) -> dict[str, Any]:
    """Load the model and the windows, call domain_losses or document_losses."""
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
        valid=named_prefixes(args.data or []) or loaded.config.data.valid,
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
    return content


def on_tasks(args: argparse.Namespace) -> dict[str, Any] | None:
    """Load the model, run the tasks; None on ranks other than the first."""
    from megabts.runtime.extras import require
    from megabts.runtime.failure import told_once
    from megabts.runtime.log import quiet_bars

    require("eval")
    quiet_bars()
    if args.confirm_run_unsafe_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # what the metric of such tasks asks for
    with told_once():
        from megabts.evaluation.lm_eval_model import MegabtsLM
        from megabts.evaluation.tasks import find_tasks, results_table, run_tasks
        from megabts.runtime.device import stop_communication

        unsafe = bool(args.confirm_run_unsafe_code)
        found = find_tasks(args.tasks, args.include_path or (), unsafe_code=unsafe)
        lm = MegabtsLM(
            args.checkpoint,
            args.dtype,
            args.micro_batch,
            args.without,
            args.tokenizer or "",
            args.tensor or 1,
            args.expert or 1,
            args.max_length,
        )
        results = run_tasks(lm, found, limit=args.limit, shots=args.shots, unsafe_code=unsafe)
        stop_communication()
    if results is not None:
        print(results_table(results))
    return results


def write_json(path: Path, content: object) -> None:
    """Write JSON, with its folder. Raises UserError."""
    from megabts.checkpoint.durable import replace_text

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(content, indent=2, default=str) + "\n")
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
