"""Plan a run's layout on GPUs: which tensor, pipeline, expert and data parallelism fits, and which is fastest.

python tools/plan.py --config examples/configs/paper/stitch.yaml --gpus 64 --gpu h200
python tools/plan.py --config examples/configs/paper/btx.yaml --gpus 64 --moe.attention_experts true
python tools/plan.py --gpus 8 --model.preset 1b --precision.dtype bfloat16 --data.seq_length 8192 --parallel.tensor 2

Needs no GPU and no data. Settings of section parallel, train.recompute and train.micro_batch are for the planner to
choose, unless the command line gives one: then it is kept. Files may give them, without effect.
"""

import json
import sys
from pathlib import Path

from megabts.config.tool_parser import ToolParser, check_output
from megabts.errors import UsageError, UserError, run_tool


def main() -> None:
    """Parse, call megabts.planner, print."""
    parser = ToolParser(description=__doc__, usage="plan.py --gpus N [flags] [--config F] [--section.key VALUE ...]")
    parser.add_argument("--config", action="append", default=[], metavar="F", help="YAML of the run (several)")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs in all")
    parser.add_argument("--gpu", default="h100", metavar="KIND", help="a100-80g, h100 (default), h200 or b200")
    parser.add_argument("--nodes", type=int, metavar="K", help="nodes they are in (default: of eight GPUs each)")
    parser.add_argument("--top", type=int, default=10, metavar="T", help="meshes to rank (default 10)")
    parser.add_argument(
        "--as",
        dest="method",
        default="",
        metavar="METHOD",
        help="plan a bts run's members as btx-soft, btx-top2, btx-sample or bam",
    )
    parser.add_argument("--json", type=Path, metavar="F", help="also write all figures to F")
    args, overrides = parser.parse_known_args()
    if args.top < 1:
        raise UsageError(f"--top is {args.top}; it must be at least 1")
    if args.json:
        check_output("--json", args.json)
    unknown = [word for word in overrides if word.startswith("--") and "." not in word]
    if unknown:
        parser.error(f"unrecognized arguments: {unknown[0]}")

    from megabts.config.load import explicit_keys, load_config
    from megabts.planner.gpus import Cluster
    from megabts.planner.moe import moe_of_members
    from megabts.planner.report import plan_json, plan_text
    from megabts.planner.search import plan

    files = [word for file in args.config for word in ("--config", file)]
    config = load_config([*files, *overrides])
    if args.method:
        config = moe_of_members(config, args.method)
    cluster = Cluster.of(args.gpu, args.gpus, args.nodes)
    pinned = frozenset(explicit_keys(overrides))
    found = plan(config, cluster, top=args.top, pinned=pinned)
    print(plan_text(config, found))
    if args.json:
        try:
            args.json.write_text(json.dumps(plan_json(config, found), indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--json {args.json} cannot be written: {error.strerror}") from error
    sys.exit(0 if found.best else 1)


if __name__ == "__main__":
    run_tool(main)
