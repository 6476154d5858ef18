"""Put all indexed datasets of a folder together to one, in the order of their names.

python tools/merge_datasets.py --input parts/ --output-prefix data/all
"""

from megabts.config.tool_parser import ToolParser
from megabts.errors import run_tool


def main() -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--input", required=True, help="folder with the datasets (.bin and .idx)")
    parser.add_argument(
        "--output-prefix", required=True, help="writes PREFIX.bin, .idx and, if all parts have one, .json"
    )
    args = parser.parse_args()
    from megabts.data.merge import find_datasets, merge_datasets

    prefixes = find_datasets(args.input)
    merged = merge_datasets(prefixes, args.output_prefix)
    without = "" if merged.sidecar else " (no sidecar: not all parts have one)"
    counts = f"{len(prefixes)} datasets, {merged.num_documents} documents, {merged.num_tokens} tokens"
    print(f"{merged.prefix}: {counts}{without}")


if __name__ == "__main__":
    run_tool(main)
