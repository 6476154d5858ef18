"""Tokenize JSON lines into the indexed format that training reads (Megatron-LM's .bin and .idx).

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus --tokenizer tokenizer.model \\
        --append-eod --workers 8

writes data/corpus_text_document.{bin,idx,json}. Megatron-LM's flags are understood; docs/formats.md lists the
differences.
"""

import argparse
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from megabts.config.tool_parser import ToolParser
from megabts.errors import UsageError, run_tool

if TYPE_CHECKING:
    from megabts.tokenizers.protocol import Tokenizer

REFUSED_FLAGS = {
    "--split-sentences": "documents are kept whole; to store several sequences, give a list of strings as the text",
    "--keep-newlines": "it belongs to --split-sentences; line ends are always kept",
    "--lang": "it belongs to --split-sentences",
    "--find-optimal-num-workers": "--workers is the number of cores by default",
    "--workers-to-check": "--workers is the number of cores by default",
    "--max-documents": "it belongs to --find-optimal-num-workers; use head to cut a file",
    "--performance-dir": "it belongs to --find-optimal-num-workers",
    "--trust-remote-code": "no code of a model folder is ever run",
    "--tokenizer-hf-no-use-fast": "only tokenizer.json files are read",
    "--tokenizer-metadata": "the tokenizer's own files say what it is",
    "--tokenizer-special-tokens": "add them to the tokenizer's own files",
    "--tokenizer-sentencepiece-legacy": "add special tokens to the tokenizer's own files",
    "--tiktoken-pattern": "tiktoken files are not read; convert to a tokenizer.json",
    "--tiktoken-num-special-tokens": "tiktoken files are not read; convert to a tokenizer.json",
}


class Refuse(argparse.Action):
    """A flag that Megatron-LM knows and this tool does not: refused by name, with the reason."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        raise UsageError(f"{option_string} is not supported: {REFUSED_FLAGS[str(option_string)]}")


def build_parser() -> argparse.ArgumentParser:
    parser = ToolParser(description=__doc__)
    data = parser.add_argument_group("input and output")
    data.add_argument(
        "--input", nargs="+", required=True, help="JSON lines: files (.gz too), folders, patterns, or - for stdin"
    )
    data.add_argument("--json-keys", nargs="+", default=["text"], help="keys whose text is tokenized (default: text)")
    data.add_argument("--output-prefix", required=True, help="writes PREFIX_KEY_document.bin, .idx and .json")
    data.add_argument("--append-eod", action="store_true", help="end every document with the end-of-document token")
    data.add_argument(
        "--on-bad-line",
        choices=("stop", "skip"),
        default="stop",
        help="skip: leave out and list in PREFIX_rejects.jsonl",
    )
    data.add_argument("--max-line-bytes", type=int, default=16 << 20, help="longer lines are bad (default: 16 MiB)")

    work = parser.add_argument_group("work")
    work.add_argument("--workers", type=int, help="processes (default: the cores)")
    work.add_argument("--log-interval", type=int, default=1000, help="documents between two progress lines")
    work.add_argument("--partitions", type=int, default=1, help="accepted, without effect: the order is the input's")
    work.add_argument("--keep-sequential-samples", action="store_true", help="accepted: this is always so")

    tokenizer = parser.add_argument_group("tokenizer: --tokenizer, or Megatron-LM's flags")
    tokenizer.add_argument("--tokenizer", help="a .model file, a tokenizer.json or its folder, bytes, or null:VOCAB")
    tokenizer.add_argument("--tokenizer-type", help="HuggingFaceTokenizer, SentencePieceTokenizer, NullTokenizer, ...")
    tokenizer.add_argument("--tokenizer-model", help="file or folder of the tokenizer")
    tokenizer.add_argument("--vocab-file", help="vocab.json of GPT2BPETokenizer")
    tokenizer.add_argument("--merge-file", help="merges.txt of GPT2BPETokenizer")
    tokenizer.add_argument("--vocab-size", type=int, help="number of ids of NullTokenizer (the last one is eod)")
    tokenizer.add_argument(
        "--tokenizer-hf-no-include-special-tokens",
        action="store_true",
        help="do not let a tokenizer.json add its bos and such to every document (with --tokenizer it never does)",
    )
    for flag in REFUSED_FLAGS:
        parser.add_argument(flag, action=Refuse, nargs="*", help=argparse.SUPPRESS)
    return parser


def choose_tokenizer(args: argparse.Namespace) -> "Tokenizer":
    from megabts.tokenizers.build import build_tokenizer, build_tokenizer_from_flags

    if (args.tokenizer is None) == (args.tokenizer_type is None):
        raise UsageError("give either --tokenizer or --tokenizer-type")
    if args.tokenizer is not None:
        return build_tokenizer(args.tokenizer)
    return build_tokenizer_from_flags(
        args.tokenizer_type,
        args.tokenizer_model,
        args.vocab_file,
        args.merge_file,
        args.vocab_size,
        include_special_tokens=not args.tokenizer_hf_no_include_special_tokens,
    )


def main() -> None:
    args = build_parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a job manager's stop cleans up as Ctrl-C does
    # The processes are the parallelism; one that starts no threads can be forked, which takes no time (ordered_map).
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    from megabts.data.preprocess import PreprocessOptions, preprocess
    from megabts.runtime.cores import num_cores

    options = PreprocessOptions(
        inputs=tuple(args.input),
        output_prefix=args.output_prefix,
        json_keys=tuple(args.json_keys),
        append_eod=args.append_eod,
        workers=num_cores() if args.workers is None else args.workers,
        log_interval=args.log_interval,
        on_bad_line=args.on_bad_line,
        max_line_bytes=args.max_line_bytes,
    )
    report = preprocess(choose_tokenizer(args), options, log=lambda line: print(line, file=sys.stderr, flush=True))
    print(f"{report.documents} documents, {report.bad_lines} bad lines left out")
    if report.bad_lines:
        print(f"bad lines are listed in {options.rejects_path}")
    for prefix, tokens in report.tokens.items():
        print(f"{prefix}: {tokens} tokens from {report.text_bytes[prefix]} bytes of text")


if __name__ == "__main__":
    run_tool(main)
