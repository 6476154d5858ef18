"""Combine dense models without training.

soup: one dense model, the (weighted) average of all members' weights. btm: an ensemble that mixes the members'
next-token probabilities. routing: members and a router at its start, to be trained with tools/train.py
--checkpoint.init_from. Of the last two the checkpoint holds no member's weights, it names their folders.

python tools/merge.py soup --member runs/seed --member runs/code --member 0.5=runs/math --out runs/soup
python tools/merge.py btm --member seed=runs/seed --member code=runs/code --out runs/btm
"""

from pathlib import Path

from megabts.config.tool_parser import ToolParser
from megabts.errors import UsageError, run_tool


def main() -> None:
    """Parse, call megabts.assemble."""
    parser = ToolParser(description=__doc__)
    parser.add_argument("method", choices=("soup", "btm", "routing"))
    parser.add_argument(
        "--member",
        action="append",
        required=True,
        metavar="[WEIGHT|NAME=]DIR",
        help="a dense model (several); in a soup with its weight (1), else with a name (the folder's)",
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="btm: mix the K likeliest members (0: all)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="checkpoint folder to write")
    args = parser.parse_args()

    from megabts import assemble

    if args.top_k and args.method != "btm":
        raise UsageError(f"--top-k is of btm, not of {args.method}; leave it out")
    if args.method == "soup":
        if len(args.member) < 2:
            raise UsageError("a soup needs at least two --member")
        assemble.soup({f"member {number}": weighted(item) for number, item in enumerate(args.member, 1)}, args.out)
    else:
        assemble.combine(args.method, named(args.member), args.out, top_k=args.top_k)
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


def named(items: list[str]) -> dict[str, str]:
    """{"code": "DIR"} from ["code=DIR"]; a bare folder is named by its last part."""
    members = {}
    for item in items:
        name, equals, path = item.partition("=")
        members[name if equals else Path(item).name] = path if equals else item
    if len(members) < len(items):
        raise UsageError("two --member have one name; name them NAME=DIR")
    return members


if __name__ == "__main__":
    run_tool(main)
