"""Build three small training corpora from this Python installation alone: code, math and prose.

code   sources of the standard library, docstrings removed
math   generated problems with worked steps (seeded)
prose  docstrings, the language reference and other documentation of the same library

and with --math-code-megabytes one that needs both code and math:

math_code  Python functions that work out such problems

Writes OUT/{code,math,prose}/{train,valid}.jsonl.gz, lines {"text": ..., "source": ...}; no network, about 15 seconds.
"""

import argparse
from pathlib import Path

from megabts.config.tool_parser import ToolParser
from megabts.errors import UsageError, run_tool


def parse_args() -> argparse.Namespace:
    parser = ToolParser(
        description=__doc__,
        epilog="example: python tools/build_corpora.py --out corpora --math-megabytes 6",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; existing corpora in it are replaced")
    parser.add_argument("--seed", type=int, default=0, help="of the math problems (default: 0)")
    parser.add_argument("--math-megabytes", type=float, default=6.0, help="size of the math text (default: 6)")
    parser.add_argument(
        "--math-code-megabytes", type=float, default=0.0, help="size of the math_code text (default: 0, none)"
    )
    parser.add_argument(
        "--valid-fraction", type=float, default=0.05, help="share held out, about 200 kB at least (default: 0.05)"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if not 0 < args.math_megabytes < 10_000:
        raise UsageError(f"--math-megabytes {args.math_megabytes}: give a size above 0 and below 10000")
    if not 0 <= args.math_code_megabytes < 10_000:
        raise UsageError(f"--math-code-megabytes {args.math_code_megabytes}: give a size of at least 0, below 10000")
    from megabts.corpora.write import build_corpora

    sizes = build_corpora(
        args.out,
        args.seed,
        round(args.math_megabytes * 1e6),
        args.valid_fraction,
        round(args.math_code_megabytes * 1e6),
    )
    print(f"{'domain':<10}{'split':<8}{'documents':>10}{'bytes':>12}")
    for domain, splits in sizes.items():
        for split, (documents, num_bytes) in splits.items():
            print(f"{domain:<10}{split:<8}{documents:>10,}{num_bytes:>12,}")


if __name__ == "__main__":
    run_tool(main)
