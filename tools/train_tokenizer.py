"""Train a tokenizer on JSON lines or plain text.

    python tools/train_tokenizer.py --input general.jsonl.gz code.jsonl.gz --bytes-per-file 10000000 \\
        --vocab-size 32000 --type sentencepiece-bpe --output tokenizer/
"""

import itertools

from megabts.config.tool_parser import ToolParser
from megabts.errors import run_tool

REPORT_BYTES = 1_000_000


def main() -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument(
        "--input", nargs="+", required=True, help="JSON lines or .txt: files (.gz too), folders, patterns"
    )
    parser.add_argument("--json-key", default="text", help="key of the text (default: text)")
    parser.add_argument(
        "--bytes-per-file", type=int, help="take about so many bytes of each file, evenly (default: all)"
    )
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--type", choices=("sentencepiece-bpe", "hf-bpe"), default="sentencepiece-bpe")
    parser.add_argument("--output", required=True, help="folder, or a .model file for sentencepiece-bpe")
    parser.add_argument("--threads", type=int, help="of SentencePiece (default: the cores)")
    args = parser.parse_args()
    from megabts.data.sampling import sample_texts
    from megabts.runtime.cores import num_cores
    from megabts.tokenizers.train import bytes_per_token, train_tokenizer

    texts = sample_texts(args.input, args.bytes_per_file, args.json_key)
    tokenizer = train_tokenizer(texts, args.vocab_size, args.output, args.type, args.threads or num_cores())
    inputs_sample = itertools.islice(sample_texts(args.input, REPORT_BYTES, args.json_key), 10_000)
    print(
        f"{args.output}: {tokenizer.vocab_size} tokens, {bytes_per_token(tokenizer, inputs_sample):.3f} bytes a token"
    )


if __name__ == "__main__":
    run_tool(main)
