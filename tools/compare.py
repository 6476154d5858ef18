"""Every method of combining a seed and its experts, trained on the same tokens and measured alike, for several seeds.

Without --data the corpora are made from this Python installation: its sources (code), its documentation (prose) and
generated problems (math). With --data DIR they are DIR/DOMAIN/{train,valid}.jsonl[.gz]; every domain but `general` gets
an expert. Writes comparison.json, comparison.md and comparison.html into the folder. Interrupt it whenever you like and
run it again: finished stages are kept. Seeds and studies may be added later.
"""

import argparse
from pathlib import Path

from megabts.config.tool_parser import ToolParser
from megabts.errors import UsageError, run_tool
from megabts.experiment.methods import METHODS
from megabts.experiment.recipe import find_corpora
from megabts.experiment.scale import check_preset


def main() -> int:
    """Run the stages, write the results, print the table."""
    parser = ToolParser(prog="compare.sh", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/compare[-DATA][-PRESET]")
    parser.add_argument("--data", type=Path, metavar="DIR", help="corpora: DIR/DOMAIN/{train,valid}.jsonl[.gz]")
    parser.add_argument(
        "--minutes", type=float, help="runs are scaled to take about so long a seed (the preset's; tiny: 60 on 2 cores)"
    )
    parser.add_argument("--seeds", default="0", metavar="S,S,...", help="of weights and data order (default: 0)")
    parser.add_argument("--preset", default="tiny", help="folder of examples/configs/compare (default: tiny)")
    parser.add_argument("--methods", default="", metavar="M,M,...", help="only these beside seed and experts (all)")
    parser.add_argument("--ablations", action="store_true", help="also other forms of BTS: K, alternation, start, ...")
    parser.add_argument(
        "--cross-capability", action="store_true", help="also math in code (without --data): a task for two experts"
    )
    parser.add_argument("--changes", action="store_true", help="also experts taken out of a BTS model, and one added")
    parser.add_argument("--vocab-size", type=int, help="smaller for little text (default: the preset's; tiny: 4096)")
    parser.add_argument("--parse-only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.minutes is not None and args.minutes <= 0:
        raise UsageError(f"--minutes is {args.minutes:g}; it must be above 0")
    if args.cross_capability and args.data:
        raise UsageError("--cross-capability needs the built-in corpora; leave out --data")
    if args.ablations and args.methods:
        raise UsageError("--methods leaves out what --ablations adds; give one of them")
    seeds, methods = parse_seeds(args.seeds), parse_methods(args.methods)
    check_preset(args.preset)
    domains = tuple(find_corpora(args.data)) if args.data else ("code", "math", "prose")
    if args.parse_only:
        return 0

    from megabts.experiment.comparison import Comparison
    from megabts.experiment.comparison_results import collect, markdown, write_comparison
    from megabts.experiment.scale import read_scale
    from megabts.experiment.studies import all_stages
    from megabts.runtime.cores import num_cores
    from megabts.runtime.device import gpu_names
    from megabts.runtime.stages import run_stages

    scale = read_scale(args.preset)
    minutes, vocab_size = args.minutes or scale.minutes, args.vocab_size or scale.vocab_size
    out = args.out or default_out(args.data, args.preset)
    flags = {"ablations": args.ablations, "cross-capability": args.cross_capability, "changes": args.changes}
    studies = tuple(name for name, asked in flags.items() if asked)
    comparisons = [
        Comparison(
            *(out / f"seed{seed}", args.data or out / "corpora", domains, minutes, seed, vocab_size),
            preset=args.preset,
            studies=studies,
            methods=methods,
        )
        for seed in seeds
    ]
    for comparison in comparisons:
        comparison.write_settings()
    stages = all_stages(comparisons, built_in=args.data is None)
    run_stages(stages, workers=num_cores(), threads=num_cores(), gpus=gpu_names())
    result = collect(comparisons)
    print(markdown(result))
    for path in write_comparison(result, out):
        print(path)
    return 0


def parse_seeds(text: str) -> list[int]:
    """[0, 1] from "0,1". Raises UsageError."""
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts) or len({int(part) for part in parts}) < len(parts):
        raise UsageError(f"--seeds {text} is not a list of different numbers like 0,1,2")
    return [int(part) for part in parts]


def parse_methods(text: str) -> tuple[str, ...]:
    """("bts", "btm") from "bts,btm"; none from "". Raises UsageError."""
    methods = tuple(filter(None, map(str.strip, text.split(","))))
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise UsageError(f"--methods names {', '.join(unknown)}, which is none of {', '.join(METHODS)}")
    return methods


def default_out(data: Path | None, preset: str) -> Path:
    """A folder of its own for each corpus and preset."""
    name = "compare" + (f"-{data.resolve().name}" if data else "") + (f"-{preset}" if preset != "tiny" else "")
    return Path("runs") / name


if __name__ == "__main__":
    run_tool(main)
