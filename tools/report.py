"""Write results.json and report.html of a finished quickstart: `python tools/report.py --run DIR`."""

from pathlib import Path

from megabts.config.tool_parser import ToolParser
from megabts.errors import run_tool


def main() -> None:
    """Gather the run's files, record the gates, write the page."""
    parser = ToolParser(description=__doc__)
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="the quickstart's --out folder")
    args = parser.parse_args()

    from megabts.experiment.quickstart import open_quickstart
    from megabts.experiment.results import make_report, write_results

    quickstart = open_quickstart(args.run)
    print(write_results(quickstart, make_report(quickstart)))


if __name__ == "__main__":
    run_tool(main)
