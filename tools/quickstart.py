"""The whole of Branch-Train-Stitch on one machine: corpora, tokenizer, seed, experts, stitches, evaluation, report.

Without --data the corpora are made from this Python installation: its sources (code), its documentation (prose) and
generated problems (math). With --data DIR they are DIR/DOMAIN/{train,valid}.jsonl[.gz]; every domain but `general` gets
an expert. Interrupt it whenever you like and run it again: finished stages are kept.
"""

import argparse
import json
from pathlib import Path

from megabts.config.tool_parser import ToolParser
from megabts.errors import UsageError, run_tool
from megabts.experiment.recipe import find_corpora


def main() -> int:
    """Run the stages, print the table."""
    parser = ToolParser(prog="quickstart.sh", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/quickstart[-DATA][-seedN]")
    parser.add_argument("--data", type=Path, metavar="DIR", help="corpora: DIR/DOMAIN/{train,valid}.jsonl[.gz]")
    parser.add_argument(
        "--minutes", type=float, default=12.0, help="training is scaled to take about so long on 2 cores (default: 12)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order and generated text (default: 0)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="smaller for little text (default: 4096)")
    parser.add_argument("--parse-only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.minutes <= 0:
        raise UsageError(f"--minutes is {args.minutes:g}; it must be above 0")
    if args.seed < 0:
        raise UsageError(f"--seed is {args.seed}; it must be at least 0")
    domains = tuple(find_corpora(args.data)) if args.data else ("code", "math", "prose")
    if args.parse_only:
        return 0

    from rich.console import Console

    from megabts.experiment.quickstart import Quickstart
    from megabts.runtime.cores import num_cores
    from megabts.runtime.device import gpu_names
    from megabts.runtime.stages import run_stages
    from megabts.viz.records import Report
    from megabts.viz.report import results_table

    out = args.out or default_out(args.data, args.seed)
    quickstart = Quickstart(out, args.data or out / "corpora", domains, args.minutes, args.seed, args.vocab_size)
    quickstart.write_settings()
    stages = quickstart.stages(built_in=args.data is None)
    run_stages(stages, workers=num_cores(), threads=num_cores(), gpus=gpu_names())
    report = Report.from_dict(json.loads((out / "report.json").read_text()))
    Console().print(results_table(report))
    for claim, holds, numbers in report.checks:
        print(f"{'yes' if holds else 'NO '}  {claim}: {numbers}")
    print(f"\nresults: {out / 'results.json'}\nreport:  {out / 'report.html'}")
    return 0


def default_out(data: Path | None, seed: int) -> Path:
    """A folder of its own for each corpus and seed."""
    name = "quickstart" + (f"-{data.resolve().name}" if data else "") + (f"-seed{seed}" if seed else "")
    return Path("runs") / name


if __name__ == "__main__":
    run_tool(main)
