"""Merge dense models into one without training: a model soup, the (weighted) average of their weights.

python tools/merge.py soup --member runs/seed --member runs/code --member 0.5=runs/math --out runs/soup
"""

from pathlib import Path

from megabts.config.tool_parser import ToolParser
from megabts.errors import UsageError, run_tool


def main() -> None:
    """Parse, call megabts.assemble.soup."""
    parser = ToolParser(description=__doc__)
    parser.add_argument("method", choices=("soup",))
    parser.add_argument(
        "--member", action="append", required=True, metavar="[WEIGHT=]DIR", help="a dense model (several); weight 1"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="checkpoint folder to write")
    args = parser.parse_args()

    from megabts import assemble

    if len(args.member) < 2:
        raise UsageError("a soup needs at least two --member")
    members = {f"member {number}": weighted(item) for number, item in enumerate(args.member, 1)}
    assemble.soup(members, args.out)
    print(f"wrote {args.out}")


def weighted(item: str) -> tuple[str, float]:
    """("DIR", 0.5) from "0.5=DIR"; weight 1 without one."""
    weight, equals, path = item.partition("=")
    if not equals:
        return item, 1.0
    try:
        return path, float(weight)
    except ValueError:
        return item, 1.0


if __name__ == "__main__":
    run_tool(main)
