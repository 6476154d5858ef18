"""Show what an indexed dataset holds, and check it.

python tools/inspect_dataset.py data/corpus_text_document --tokenizer tokenizer.model --documents 3 --verify
"""

from megabts.config.tool_parser import ToolParser
from megabts.errors import run_tool


def main() -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("prefix", help="the dataset: PREFIX of PREFIX.bin and PREFIX.idx")
    parser.add_argument("--documents", type=int, default=0, metavar="N", help="show the first N documents")
    parser.add_argument(
        "--tokenizer", help="show text, not ids: a .model, a tokenizer.json or its folder, bytes, null:VOCAB"
    )
    parser.add_argument("--verify", action="store_true", help="read every token and compare it with the vocabulary")
    parser.add_argument(
        "--vocab-size", type=int, help="vocabulary to verify against (default: the tokenizer's, the sidecar's)"
    )
    args = parser.parse_args()
    from megabts.data.indexed import IndexedDataset
    from megabts.data.inspect import describe_dataset, show_documents, verify_tokens
    from megabts.tokenizers.build import build_tokenizer

    dataset = IndexedDataset(args.prefix)
    tokenizer = build_tokenizer(args.tokenizer) if args.tokenizer else None
    vocab_size = tokenizer.vocab_size if tokenizer and args.vocab_size is None else args.vocab_size
    print(*describe_dataset(dataset), sep="\n")
    if args.verify:
        print(verify_tokens(dataset, vocab_size))
    for line in show_documents(dataset, args.documents, tokenizer):
        print(line)


if __name__ == "__main__":
    run_tool(main)
