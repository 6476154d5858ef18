"""Continue text with a model: a run or checkpoint folder, dense or stitched, or a Hugging Face Llama folder.

One prompt: the completion is streamed to stdout as it comes. Several: they run as one batch and are printed at the
end. The speed goes to stderr. Generation stops at the tokenizer's end-of-document token.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megabts.config.tool_parser import ToolParser
from megabts.errors import UsageError, UserError, run_tool

if TYPE_CHECKING:
    from megabts.bts.model import BTSModel
    from megabts.inference.engine import OnToken
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
    add("--seed", type=int, default=0, help="of the sampling (default: 0)")
    add("--tokenizer", default="", metavar="SPEC", help="path, bytes or null:VOCAB (default: the checkpoint's)")
    add("--dtype", choices=["float32", "bfloat16"], help="number format (default: the run's)")
    add("--without", action="append", default=[], metavar="NAME", help="leave out this expert, for this run")
    add("--gates", action="store_true", help="show how often each member dominates the last stitch layer")
    add("--no-cache", action="store_true", help="recompute everything for every token (slow)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    texts = read_prompts(args.prompt, args.prompt_file)
    from megabts.bts.model import BTSModel
    from megabts.build import load_model
    from megabts.inference.engine import GenerationSettings, generate, generate_uncached
    from megabts.parallel.mesh import ParallelMesh
    from megabts.runtime.device import DTYPES, Launch, pick_device
    from megabts.tokenizers.build import build_tokenizer

    settings = GenerationSettings(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed)
    dtype = DTYPES[args.dtype] if args.dtype else None
    loaded = load_model(args.checkpoint, ParallelMesh(), dtype, pick_device(Launch()), without=args.without)
    model = loaded.model
    if args.gates and not isinstance(model, BTSModel):
        raise UsageError(f"--gates: {args.checkpoint} is a {loaded.config.method} model and has no gates")
    if not (args.tokenizer or loaded.tokenizer):
        raise UserError(f"{args.checkpoint} has no tokenizer; give --tokenizer")
    tokenizer = build_tokenizer(args.tokenizer or loaded.tokenizer)
    stop_ids = () if tokenizer.eod_id is None else (tokenizer.eod_id,)
    settings = replace(settings, stop_ids=stop_ids, eod_id=tokenizer.eod_id, num_ids=tokenizer.vocab_size)
    prompts = [begin(text, tokenizer) for text in texts]
    engine = generate_uncached if args.no_cache else generate
    start = time.perf_counter()
    if len(prompts) == 1:
        completions = stream(lambda on_token: engine(model, prompts, settings, on_token), prompts[0], tokenizer)
    else:
        completions = engine(model, prompts, settings)
    seconds = time.perf_counter() - start
    if len(prompts) > 1:
        print_batch(prompts, completions, tokenizer)
    num_tokens = sum(map(len, completions))
    print(f"{num_tokens} tokens in {seconds:.2f} s: {num_tokens / seconds:.1f} tokens/s", file=sys.stderr)
    if args.gates:
        assert isinstance(model, BTSModel)
        print_gates(model, [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)])


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


def stream(run: Callable[["OnToken"], list[list[int]]], prompt: list[int], tokenizer: "Tokenizer") -> list[list[int]]:
    """Generate for one prompt and print each piece of text when it is whole."""
    from megabts.inference.text_stream import TextStream

    text = TextStream(tokenizer, prompt)
    completions = run(lambda _, token: print(text.add(token), end="", flush=True))
    print(text.finish())
    return completions


def print_batch(prompts: list[list[int]], completions: list[list[int]], tokenizer: "Tokenizer") -> None:
    """Every prompt with its completion, under a numbered line."""
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), 1):
        print(f"[{number}]\n{tokenizer.decode(prompt + completion)}")


def print_gates(model: "BTSModel", texts: list[list[int]]) -> None:
    """Share of the tokens, prompts included, for which each member has the largest mean gate at the last stitch."""
    import torch

    from megabts.bts.gates import record_gates
    from megabts.inference.engine import score

    with torch.inference_mode(), record_gates(model) as record:
        for text in texts:
            score(model, text)
    gates = torch.cat([gate.flatten(1) for gate in record.layers[len(model.plan) - 1]], 1)  # [members, tokens]
    counts = gates.argmax(0).bincount(minlength=len(model.bts.members)).tolist()
    print(f"\nlast stitch layer, {gates.shape[1]} tokens: member, share of tokens it dominates, mean gate")
    for name, count, mean in zip(model.bts.members, counts, gates.mean(1).tolist(), strict=True):
        print(f"{name:<20}{count / gates.shape[1]:>7.1%}{mean:>8.3f}")


if __name__ == "__main__":
    run_tool(main)
