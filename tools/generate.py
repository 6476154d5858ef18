"""Continue text with a model: a run or checkpoint folder of any method, or a Hugging Face folder.

One prompt: the completion is streamed to stdout as it comes. Several: they run as one batch and are printed at the
end. The speed goes to stderr. Generation stops at the tokenizer's end-of-document token, or before a --stop text.
Under torchrun a model may lie on --parallel.tensor x --parallel.expert ranks; the first one prints.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megabts.config.tool_parser import ToolParser
from megabts.errors import UsageError, UserError, run_tool
from megabts.runtime.failure import told_once

if TYPE_CHECKING:
    from megabts.bts.model import BTSModel
    from megabts.inference.launch import Place
    from megabts.inference.rows import Completion, Event
    from megabts.moe.model import MoEModel
    from megabts.moe.router import Routes
    from megabts.moe.routes import LayerRoutes
    from megabts.runtime.progress import Progress
    from megabts.tokenizers.protocol import Tokenizer


def parse_args() -> argparse.Namespace:
    parser = ToolParser(
        description=__doc__,
        epilog="example: python tools/generate.py --checkpoint runs/stitch --prompt 'def add(a, b):' --gates",
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="run, checkpoint or Hugging Face folder")
    add("--prompt", action="append", default=[], metavar="TEXT", help="text to continue; may be repeated")
    add("--prompt-file", action="append", default=[], type=Path, metavar="FILE", help="its text is one prompt")
    add("--max-new-tokens", type=int, default=64, help="longest completion (default: 64)")
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    add("--top-k", type=int, default=0, help="sample among the K likeliest tokens (default: 0, all)")
    add("--top-p", type=float, default=1.0, help="sample among the likeliest with probability P (default: 1, all)")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: against what was said (default: 1, none)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    add("--seed", type=int, default=0, help="of the sampling (default: 0)")
    add("--tokenizer", default="", metavar="SPEC", help="path, bytes or null:VOCAB (default: the checkpoint's)")
    add("--dtype", choices=["float32", "bfloat16"], help="number format (default: the run's)")
    add("--without", action="append", default=[], metavar="NAME", help="leave out this expert, for this run")
    add(
        "--gates",
        action="store_true",
        help="show the weight of each member (last stitch layer, or output's mixture), or of each layer's ffn experts",
    )
    add("--parallel.tensor", dest="tensor", type=int, default=1, metavar="N", help="ranks (default: 1)")
    add("--parallel.expert", dest="expert", type=int, default=1, metavar="N", help="ranks (default: 1)")
    add("--parallel.timeout", dest="timeout", type=int, default=300, metavar="N", help="seconds without progress")
    add("--no-cuda-graphs", action="store_true", help="launch a GPU's kernels one by one (slow for small models)")
    add("--no-cache", action="store_true", help="recompute everything for every token (slow)")
    return parser.parse_args()


def main() -> None:
    """Ranks, model, prompts; completions."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # below it: pages of C++ frames when a rank is gone
    with told_once():
        args = parse_args()
        texts = read_prompts(args.prompt, args.prompt_file)
        from megabts.config.run import ParallelConfig
        from megabts.inference.launch import join
        from megabts.runtime.device import stop_communication
        from megabts.runtime.watchdog import watched

        place = join(ParallelConfig(tensor=args.tensor, expert=args.expert, timeout=args.timeout))
        with watched(place.meeting, place.parallel.timeout) as progress:
            first = place.mesh.rank == 0
            with redirect_stdout(sys.stdout if first else None):
                run(args, texts, place, progress)
            stop_communication()


def run(args: argparse.Namespace, texts: list[str], place: "Place", progress: "Progress") -> None:
    """On every rank: load its part of the model and generate. The first has the result; others print nothing."""
    from megabts.bts.model import BTSModel
    from megabts.inference.generate import complete, complete_uncached, requests
    from megabts.inference.launch import load_part
    from megabts.inference.settings import GenerationSettings
    from megabts.moe.model import MoEModel
    from megabts.parallel.collectives import broadcast_object
    from megabts.runtime.device import DTYPES
    from megabts.tokenizers.build import build_tokenizer

    settings = GenerationSettings(
        args.max_new_tokens,
        args.temperature,
        args.top_k,
        args.top_p,
        args.seed,
        repetition_penalty=args.repetition_penalty,
        stop_strings=tuple(args.stop),
    )
    loaded, mesh = load_part(args.checkpoint, place, DTYPES[args.dtype] if args.dtype else None, args.without)
    model = loaded.model
    if args.gates and not isinstance(model, BTSModel | MoEModel):
        raise UsageError(f"--gates: {args.checkpoint} is a {loaded.config.method} model and has no gates")
    tokenizer = build_tokenizer(loaded.tokenizer_or(args.tokenizer))
    stop_ids = () if tokenizer.eod_id is None else (tokenizer.eod_id,)
    settings = replace(settings, stop_ids=stop_ids, eod_id=tokenizer.eod_id, num_ids=tokenizer.vocab_size)
    prompts = [begin(text, tokenizer) for text in texts]
    asked, on_event = requests(prompts, settings), show_text if len(prompts) == 1 else None
    start = time.perf_counter()
    if args.no_cache:
        rows = complete_uncached(model, asked, on_event, tokenizer=tokenizer)
    else:
        graphs = not args.no_cuda_graphs
        rows = complete(model, asked, on_event, tokenizer=tokenizer, mesh=mesh, progress=progress, cuda_graphs=graphs)
    seconds = time.perf_counter() - start
    if len(prompts) > 1:
        print_batch(rows, tokenizer)
    elif rows:
        print()
    num_tokens = sum(len(row.tokens) for row in rows)
    if mesh.rank == 0:
        print(f"{num_tokens} tokens in {seconds:.2f} s: {num_tokens / seconds:.1f} tokens/s", file=sys.stderr)
    ids: list[list[int]] = broadcast_object([[*row.request.prompt, *row.tokens] for row in rows])
    if args.gates and isinstance(model, BTSModel):
        print_gates(model, ids, tokenizer.eod_id)
    elif args.gates and isinstance(model, MoEModel):
        print_routes(model, ids, tokenizer)


def read_prompts(texts: Sequence[str], files: Sequence[Path]) -> list[str]:
    """All prompts: those given as text, then the files', each without one final newline."""
    prompts = list(texts)
    for prompt in prompts:
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise UsageError("--prompt is not UTF-8 text; convert it, or set the terminal to UTF-8")
    for file in files:
        try:
            prompts.append(file.read_bytes().decode("utf-8").removesuffix("\n"))
        except OSError as error:
            raise UserError(f"prompt file {file} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"prompt file {file} is not UTF-8 text (byte {error.start}); convert it") from error
    if not prompts:
        raise UsageError("there is nothing to continue; give --prompt TEXT or --prompt-file FILE")
    return prompts


def begin(text: str, tokenizer: "Tokenizer") -> list[int]:
    """Ids of a prompt; an empty one begins as a new document does, after an end-of-document token."""
    ids = tokenizer.encode(text)
    if ids:
        return ids
    if tokenizer.eod_id is None:
        raise UserError(f"the prompt is empty and tokenizer {tokenizer.name} has no end-of-document token; give a text")
    return [tokenizer.eod_id]


def show_text(event: "Event") -> None:
    """Print text as it comes."""
    print(event.text, end="", flush=True)


def print_batch(rows: Sequence["Completion"], tokenizer: "Tokenizer") -> None:
    """Every prompt with its completion, under a numbered line."""
    for number, row in enumerate(rows, 1):
        print(f"[{number}]\n{tokenizer.decode(list(row.request.prompt))}{row.text}")


def print_gates(model: "BTSModel", texts: list[list[int]], eod_id: int | None) -> None:
    """Share of the tokens, prompts included, for which each member has the largest gate where the answer is mixed.

    That is the mixture of the outputs, or the last stitch layer, by its mean gates.
    """
    import torch

    from megabts.bts.gates import gate_places, record_gates
    from megabts.inference.generate import score

    with torch.inference_mode(), record_gates(model) as record:
        for text in texts:
            score(model, text, eod_id)
    place = len(gate_places(model)) - 1
    gates = torch.cat([gate.flatten(1) for gate in record.places[place]], 1)  # [members, tokens]
    counts = gates.argmax(0).bincount(minlength=len(model.bts.members)).tolist()
    title = "output mixture" if model.mixes else "last stitch layer"
    print(f"\n{title}, {gates.shape[1]} tokens: member, share of tokens it dominates, mean gate")
    for name, count, mean in zip(model.bts.members, counts, gates.mean(1).tolist(), strict=True):
        print(f"{name:<20}{count / gates.shape[1]:>7.1%}{mean:>8.3f}")


def print_layers(names: list[str], layers: dict[int, "LayerRoutes"]) -> None:
    """A line for every layer: each expert's mean weight and share, and the router's entropy."""
    print(f"{'layer':<8}" + "".join(f"{name:>18}" for name in names) + f"{'entropy':>10}")
    for layer, found in sorted(layers.items()):
        cells = zip(found.mean_gate.tolist(), found.share.tolist(), strict=True)
        print(f"{layer:<8}" + "".join(f"{gate:>10.3f}{share:>8.1%}" for gate, share in cells), end="")
        print(f"{found.mean_entropy:>10.3f}")


def print_routes(model: "MoEModel", texts: list[list[int]], tokenizer: "Tokenizer") -> None:
    """Mean weight and share of the choices of every layer's ffn experts, and of attention experts, over all tokens,
    prompts included; then each token's ffn experts in the last layer, the weightiest first."""
    import torch

    from megabts.inference.generate import score
    from megabts.moe.routes import record_routes

    last: list[tuple[list[int], list[float]]] = []

    def observe(layer: int, routes: "Routes") -> None:
        if layer == model.config.num_layers - 1:
            last.extend(zip(routes.chosen.tolist(), routes.weights.tolist(), strict=True))

    with torch.inference_mode(), record_routes(model) as record, model.observe_routes(observe):
        for text in texts:
            score(model, text)
    names = model.moe.ffn_expert_names
    tokens = [token for text in texts for token in text]
    print(f"\nffn experts, {len(tokens)} tokens: mean weight, share of the choices; entropy of the router, nats")
    print_layers(names, record.layers)
    if record.attention:
        print("\nattention experts: mean weight, share of tokens with most weight there; entropy of the router, nats")
        print_layers(list(model.moe.members), record.attention)
    print("\nlast layer: token, its ffn experts and their weights")
    for token, (chosen, weights) in zip(tokens, last, strict=True):
        order = sorted(zip(weights, chosen, strict=True), reverse=True)
        print(
            f"{tokenizer.decode([token])!r:<20}" + "  ".join(f"{names[index]} {weight:.3f}" for weight, index in order)
        )


if __name__ == "__main__":
    run_tool(main)
