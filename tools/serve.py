"""Serve a model over HTTP with an OpenAI-compatible interface: a checkpoint of any method, or a Hugging Face folder.

python tools/serve.py --checkpoint runs/stitch
python -m megabts.runtime.torchrun --nproc-per-node 2 tools/serve.py --checkpoint runs/stitch --parallel.tensor 2

Requests share one batch, which they join and leave at any token. SIGTERM lets those in progress finish for 3 seconds
and ends with exit code 0. docs/serving.md describes the interface and its limits.
"""

import argparse
import os
import signal
import socket
from functools import partial
from pathlib import Path

from megabts.config.tool_parser import ToolParser
from megabts.errors import UsageError, UserError, run_tool

MAX_PORT = 65535


def parse_args() -> argparse.Namespace:
    """The flags. Raises UsageError."""
    parser = ToolParser(description=__doc__, epilog="example: python tools/serve.py --checkpoint runs/stitch")
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="DIR", help="run, checkpoint or Hugging Face folder")
    add("--name", help="what clients call the model (default: the folder's name)")
    add("--host", default="127.0.0.1", help="address to serve at (default: 127.0.0.1, this machine alone)")
    add("--port", type=int, default=8000, help="0: any free one (default: 8000)")
    keys = parser.add_mutually_exclusive_group()
    keys.add_argument("--api-key", default="", metavar="KEY", help="clients must send it; other users can see it here")
    keys.add_argument("--api-key-file", type=Path, metavar="FILE", help="its first line is the key")
    add("--tokenizer", default="", metavar="SPEC", help="path, bytes or null:VOCAB (default: the checkpoint's)")
    add("--special-tokens", action="store_true", help="let a tokenizer.json's template add its tokens to prompts")
    add("--dtype", choices=["float32", "bfloat16"], help="number format (default: the run's)")
    add("--without", action="append", default=[], metavar="NAME", help="leave out this expert, for all requests")
    add("--no-cuda-graphs", action="store_true", help="launch a GPU's kernels one by one (slow for small models)")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-rows", type=int, default=16, metavar="N", help="completions at one time (default: 16)")
    limits.add_argument("--max-tokens", type=int, metavar="N", help="tokens in the caches (default: up to 2048 a row)")
    limits.add_argument("--queue", type=int, default=64, metavar="N", help="completions that may wait (default: 64)")
    limits.add_argument("--max-prompt-tokens", type=int, metavar="N", help="of one prompt (default: what fits)")
    limits.add_argument("--max-new-tokens", type=int, metavar="N", help="of one completion (default: what fits)")
    parallel = parser.add_argument_group("several ranks (torchrun) that hold the model together")
    parallel.add_argument("--parallel.tensor", dest="tensor", type=int, default=1, metavar="N", help="default: 1")
    parallel.add_argument("--parallel.expert", dest="expert", type=int, default=1, metavar="N", help="default: 1")
    parallel.add_argument(
        "--parallel.timeout", dest="timeout", type=int, default=300, metavar="N", help="seconds without progress"
    )
    args = parser.parse_args()
    least = {"queue": 0, "port": 0}
    for flag in (
        "port",
        "max_rows",
        "max_tokens",
        "queue",
        "max_prompt_tokens",
        "max_new_tokens",
        "tensor",
        "expert",
        "timeout",
    ):
        value = getattr(args, flag)
        if value is not None and value < least.get(flag, 1):
            name = f"parallel.{flag}" if flag in ("tensor", "expert", "timeout") else flag.replace("_", "-")
            raise UsageError(f"--{name} is {value}; it must be at least {least.get(flag, 1)}")
    if args.port > MAX_PORT:
        raise UsageError(f"--port is {args.port}; ports end at {MAX_PORT}")
    return args


def main() -> None:
    """Load the model and serve it, or follow the rank that does."""
    args = parse_args()
    from megabts.runtime.extras import require
    from megabts.runtime.failure import told_once

    require("serve")

    key = read_key(args.api_key, args.api_key_file)
    with told_once():
        run(args, key)
    if "LAUNCH_EXIT_CODE" in os.environ:  # megabts.runtime.torchrun: after a signal torchrun does not know it
        Path(os.environ["LAUNCH_EXIT_CODE"]).write_text("0")


def read_key(key: str, file: Path | None) -> str:
    """The API key; "" for none. Raises UserError."""
    if file is not None:
        try:
            key = next(iter(file.read_text("utf-8").splitlines()), "").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--api-key-file {file} cannot be read: {error}") from error
        if not key:
            raise UserError(f"--api-key-file {file} has no key in its first line; write one")
    if not key.isascii() or any(character.isspace() for character in key):
        raise UserError("the API key has a space or a character outside ASCII; choose another one")
    return key


def run(args: argparse.Namespace, key: str) -> None:
    """On every rank: load its part of the model, then serve or follow."""
    from megabts.config.run import ParallelConfig
    from megabts.inference.launch import join
    from megabts.inference.ranks import follow
    from megabts.runtime.device import stop_communication
    from megabts.runtime.watchdog import watched
    from megabts.serving.load import Source, load_served
    from megabts.serving.server import open_socket, serve

    place = join(ParallelConfig(tensor=args.tensor, expert=args.expert, timeout=args.timeout))
    listener = open_socket(args.host, args.port) if place.mesh.rank == 0 else None
    served, mesh = load_served(
        Source(args.checkpoint, args.name or "", args.tokenizer, args.special_tokens, args.dtype, args.without),
        place,
        max_rows=args.max_rows,
        max_tokens=args.max_tokens,
        queue=args.queue,
        max_prompt_tokens=args.max_prompt_tokens,
        max_new_tokens=args.max_new_tokens,
        cuda_graphs=not args.no_cuda_graphs,
    )
    with watched(place.meeting, place.parallel.timeout) as progress:
        if listener is None:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)  # the first rank ends the others when it is done
            follow(served.model, served.limits.max_tokens, mesh, progress)
        else:
            line = f"serving {served.name} ({', '.join([served.method, *served.experts])}) at {address(listener)}"
            ready = partial(print, line, flush=True)
            serve(served, listener, api_key=key, mesh=mesh, progress=progress, ready=ready)
    stop_communication()


def address(listener: socket.socket) -> str:
    """Where a socket is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


if __name__ == "__main__":
    run_tool(main)
