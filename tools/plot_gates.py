"""Draw how much each member counts at every token of a text: gate values of a stitched model, a panel a stitch layer.

Where the output is a mixture (bts.output) it is drawn alone, unless --layer says otherwise. A text of several subjects
is given in parts, which are joined by an empty line; the picture marks where each begins.
"""

import argparse
from pathlib import Path

from megabts.config.tool_parser import ToolParser, check_picture
from megabts.errors import UsageError, UserError, run_tool


def parse_args() -> argparse.Namespace:
    """The flags. Raises UsageError."""
    parser = ToolParser(
        description=__doc__,
        epilog="example: python tools/plot_gates.py --checkpoint runs/stitch --prompt 'def f(x):' --out gates.png",
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="DIR", help="run or checkpoint folder of a stitched model")
    first = parser.add_mutually_exclusive_group(required=True)
    first.add_argument("--prompt", metavar="TEXT", help="the text, or its first part")
    first.add_argument("--prompt-file", type=Path, metavar="FILE", help="the same from a file")
    add("--switch", action="append", default=[], metavar="TEXT", help="the text's next part; may be repeated")
    add("--switch-file", action="append", default=[], type=Path, metavar="FILE", help="the same, after all --switch")
    add(
        "--layer",
        action="append",
        default=[],
        metavar="N",
        help="only the stitch after layer N, or output, or all; repeatable (default: output if it mixes, else all)",
    )
    add("--out", type=Path, required=True, metavar="FILE", help="picture to write (.png, .svg, .pdf)")
    add("--json", type=Path, metavar="FILE", help="write the values, too")
    add("--tokenizer", default="", metavar="SPEC", help="path, bytes or null:VOCAB (default: the checkpoint's)")
    add("--dtype", choices=["float32", "bfloat16"], help="number format (default: the run's)")
    add("--without", action="append", default=[], metavar="NAME", help="leave out this expert, for this run")
    args = parser.parse_args()
    check_picture("--out", args.out)
    return args


def main() -> None:
    """Load the model, run the text through it once, draw."""
    args = parse_args()
    parts = [args.prompt if args.prompt is not None else read_part(args.prompt_file), *args.switch]
    parts += map(read_part, args.switch_file)
    from megabts.bts.model import BTSModel
    from megabts.build import load_model
    from megabts.parallel.mesh import ParallelMesh
    from megabts.runtime.device import DTYPES, Launch, pick_device
    from megabts.tokenizers.build import build_tokenizer
    from megabts.viz.gates import choose_layers, draw_gates, trace_gates, write_trace

    dtype = DTYPES[args.dtype] if args.dtype else None
    loaded = load_model(args.checkpoint, ParallelMesh(), dtype, pick_device(Launch()), without=args.without)
    if not isinstance(loaded.model, BTSModel):
        raise UsageError(f"{args.checkpoint} is a {loaded.config.method} model and has no gates; give a stitched one")
    trace = trace_gates(loaded.model, build_tokenizer(loaded.tokenizer_or(args.tokenizer)), parts)
    trace = choose_layers(trace, args.layer)
    try:
        draw_gates(trace, args.out)
        if args.json:
            write_trace(trace, args.json)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be written: {error.strerror}; give another path") from error
    print(f"wrote {args.out}; tokens: {len(trace.tokens)}, panels: {len(trace.layers)}")


def read_part(file: Path) -> str:
    """A file's text without one final newline. Raises UserError."""
    try:
        return file.read_bytes().decode("utf-8").removesuffix("\n")
    except OSError as error:
        raise UserError(f"prompt file {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"prompt file {file} is not UTF-8 text (byte {error.start}); convert it") from error


if __name__ == "__main__":
    run_tool(main)
