"""Loss curves of runs in one picture, and how far each is from the first.

python tools/plot_losses.py --run one=runs/a --run "tp 2"=runs/b --out losses.png
"""

from pathlib import Path

from megabts.config.tool_parser import ToolParser, check_picture
from megabts.errors import UsageError, run_tool


def main() -> None:
    """Read the runs' metrics, draw, print the largest differences."""
    parser = ToolParser(description=__doc__)
    parser.add_argument("--run", action="append", required=True, metavar="NAME=DIR", help="a run folder; two or more")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="picture to write (.png, .svg, .pdf)")
    args = parser.parse_args()
    runs = dict(named(item) for item in args.run)
    if len(runs) < 2:
        raise UsageError("--run is needed at least twice, with different names; give --run NAME=DIR")
    check_picture("--out", args.out)

    from megabts.viz.overlay import draw_overlay, largest_difference, read_losses

    losses = read_losses(runs)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw_overlay(losses, args.out)
    for name, distance in largest_difference(losses).items():
        print(f"{name}: at most {distance:.1e} from {next(iter(runs))}")
    print(f"wrote {args.out}")


def named(item: str) -> tuple[str, Path]:
    """("tp 2", Path("runs/b")) from "tp 2=runs/b"."""
    name, equals, folder = item.partition("=")
    if not (name and equals and folder):
        raise UsageError(f"--run {item} has no name; give --run NAME=DIR")
    return name, Path(folder)


if __name__ == "__main__":
    run_tool(main)
