"""Assemble a BTS model from a hub and experts, or add or remove an expert of one. No training.

python tools/stitch.py --hub runs/seed --expert code=runs/code --expert math=runs/math --out runs/bts-start
python tools/stitch.py add --checkpoint runs/bts --expert law=runs/law --out runs/bts-law
python tools/stitch.py remove --checkpoint runs/bts --expert code --out runs/bts-without-code

Members are megabts checkpoints or Hugging Face folders; they stay where they are. Train the result with
`python tools/train.py --checkpoint.init_from OUT ...`; what `remove` makes runs at once.
"""

from pathlib import Path

from megabts.config.methods import FORMS
from megabts.config.tool_parser import ToolParser
from megabts.errors import UsageError, run_tool


def main() -> None:
    """Parse, call one function of megabts.assemble, print the parameter counts."""
    parser = ToolParser(description=__doc__)
    parser.add_argument("action", nargs="?", choices=("new", "add", "remove"), default="new")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="checkpoint folder to write")
    parser.add_argument(
        "--expert", action="append", default=[], metavar="NAME=DIR", help="an expert (several); for remove: NAME"
    )
    new = parser.add_argument_group("new")
    new.add_argument("--hub", metavar="DIR", help="the member whose output is the model's, usually the seed")
    new.add_argument(
        "--form",
        choices=tuple(FORMS),
        default="bts",
        help="the paper's stitches (bts), or with all members' heads answering (bts-mixture)",
    )
    new.add_argument("--num-stitch-layers", type=int, default=4, metavar="K")
    new.add_argument(
        "--placement",
        type=int,
        nargs="+",
        default=[],
        metavar="LAYER",
        help="layers that the K stitch layers follow, the last one's included (default: spaced evenly)",
    )
    new.add_argument("--experts-into-hub-only", action="store_true", help="all stitches Experts-into-Hub")
    new.add_argument("--expert-stream", choices=("projected", "unchanged"), help="default: the form's")
    new.add_argument("--start", choices=("uniform", "hub_leaning", "hub_preserving"), default="uniform")
    new.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    change = parser.add_argument_group("add, remove")
    change.add_argument("--checkpoint", type=Path, metavar="DIR", help="the BTS model to change")
    change.add_argument(
        "--train", choices=("new", "all"), default="new", help="slices to train later (default: the new ones)"
    )
    args = parser.parse_args()

    from megabts import assemble
    from megabts.bts.parameters import parameter_report
    from megabts.config.methods import BTSConfig

    if args.action != "new" and not (args.checkpoint and len(args.expert) == 1):
        raise UsageError(f"{args.action} needs --checkpoint DIR and one --expert")
    if args.action == "new" and not (args.hub and args.expert):
        raise UsageError("give --hub DIR and at least one --expert NAME=DIR")
    if args.action == "remove":
        config = assemble.remove(args.checkpoint, args.expert[0], args.out)
    elif args.action == "add":
        ((name, path),) = named_paths(args.expert).items()
        config = assemble.add(args.checkpoint, name, path, args.out, train_all=args.train == "all")
    else:
        stream = {"expert_stream": args.expert_stream} if args.expert_stream else {}
        bts = BTSConfig(
            args.hub or "",
            named_paths(args.expert),
            args.num_stitch_layers,
            args.placement,
            not args.experts_into_hub_only,
            start=args.start,
            **{**FORMS[args.form], **stream},
        )
        config = assemble.stitch(bts, args.out, dtype=args.dtype)
    print(f"wrote {args.out}")
    print(parameter_report(config.model, config.bts))


def named_paths(items: list[str]) -> dict[str, str]:
    """{"code": "DIR"} from ["code=DIR"]."""
    pairs = [item.partition("=") for item in items]
    for item, (name, _, path) in zip(items, pairs, strict=True):
        if not name or not path:
            raise UsageError(f"--expert {item} is not of the form NAME=DIR")
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise UsageError(f"an expert is named twice: {' '.join(items)}")
    return {name: path for name, _, path in pairs}


if __name__ == "__main__":
    run_tool(main)
