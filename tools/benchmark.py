"""Measure speed against yardsticks, in one run on this machine, and say which lines hold.

python tools/benchmark.py --suite data
python tools/benchmark.py --suite data --only preprocess --data corpus.jsonl --json data.json
python tools/benchmark.py --suite cpu --json cpu.json --plot scaling.png
python tools/benchmark.py --suite gpu --only bts-2.7b --profile profiles

Contestants take turns (on a GPU they run one after the other), after a warm-up; a ratio's median and spread (half the
interquartile range) are of the rounds' own ratios. Other programs make timings void, so their load is looked at before
and after each benchmark; a busy machine is refused. A line is what a number has to reach; docs/benchmarks.md lists
them. The exit code is 1 when a line is missed or the machine became busy.
"""

import argparse
import json
import sys
from pathlib import Path

from megabts.config.tool_parser import ToolParser, check_output, check_picture
from megabts.errors import UsageError, UserError, run_tool

SUITES_OF = {"plot": ("cpu",), "profile": ("cpu", "gpu"), "data": ("data",), "tokenizer": ("data",)}
"""Flags that mean something in these suites only."""


def parse_args() -> argparse.Namespace:
    """The command line. Raises UsageError."""
    from megabts.benchmark.suite import SUITES

    parser = ToolParser(description=__doc__)
    parser.add_argument("--suite", choices=SUITES, required=True, help="which benchmarks")
    parser.add_argument("--only", default="", metavar="NAME", help="one of them; a wrong name lists all")
    parser.add_argument("--json", type=Path, metavar="F", help="also write all numbers to F")
    parser.add_argument("--plot", type=Path, metavar="F", help="cpu suite: draw what `scaling` measures (png, svg)")
    parser.add_argument(
        "--profile", type=Path, metavar="D", help="cpu, gpu suite: also profile a round of each, into D"
    )
    parser.add_argument("--busy", action="store_true", help="measure on a busy machine too; the table says so")
    parser.add_argument("--data", type=Path, metavar="F", help="data suite: JSON lines (default: the built-in corpora)")
    parser.add_argument("--tokenizer", default="", metavar="T", help="data suite: default: one trained on the text")
    parser.add_argument(
        "--scale", type=float, default=1.0, metavar="X", help="X times the data (gpu: the rounds): for a quick look"
    )
    args = parser.parse_args()
    if not 0 < args.scale <= 100:
        raise UsageError(f"--scale {args.scale:g}: give a factor above 0, up to 100")
    for flag, suites in SUITES_OF.items():
        if getattr(args, flag) and args.suite not in suites:
            raise UsageError(
                f"--{flag} means nothing to the {args.suite} suite; it is for --suite {' and '.join(suites)}"
            )
    if args.plot:
        check_picture("--plot", args.plot)
        if args.only not in ("", "scaling"):
            raise UsageError(f"--plot draws what `scaling` measures; leave out --only {args.only}")
    for flag, path in (("--json", args.json), ("--plot", args.plot)):
        if path:
            check_output(flag, path)
    return args


def main() -> int:
    """Run the suite, print the table, write the JSON."""
    args = parse_args()
    from megabts.benchmark.machine import describe_machine
    from megabts.benchmark.suite import Settings, choose_benchmarks, results_json, results_text, run_suite
    from megabts.checkpoint.durable import replace_text

    def progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    benchmarks = choose_benchmarks(args.suite, args.only)
    if args.profile:
        try:
            args.profile.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--profile {args.profile} cannot be made: {error.strerror}; name another folder"
            ) from error
    settings = Settings(args.data, args.tokenizer, args.scale, progress, args.profile)
    results = run_suite(args.suite, benchmarks, settings, args.busy)
    machine = describe_machine()
    print(results_text(results, machine))
    if args.json:
        try:
            replace_text(args.json, json.dumps(results_json(results, machine), indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--json {args.json} cannot be written: {error.strerror}") from error
    if args.plot:
        from megabts.benchmark.training import scaling_panels
        from megabts.viz.scaling import draw_scaling

        draw_scaling(scaling_panels(results.rows), args.plot)
    return 1 if results.missed or (results.busy and not args.busy) else 0


if __name__ == "__main__":
    run_tool(main)
