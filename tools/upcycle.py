"""Make a mixture of experts of dense members: Branch-Train-MiX, BAM, or sparse upcycling of the seed. No training.

python tools/upcycle.py --method btx --member seed=runs/seed --member code=runs/code --out runs/btx-start
python tools/upcycle.py --method bam --member seed=runs/seed --member code=runs/code --out runs/bam-start
python tools/upcycle.py --method sparse --member seed=runs/seed --copies 4 --routing switch --out runs/sparse-start

The members' feed-forwards become ffn experts behind new routers, with bam and bam-adapters their attentions attention
experts; everything else is averaged. With bam-adapters only new adapters and the routers train. Train the result with
`python tools/train.py --checkpoint.init_from OUT ...`; routing and balance may be changed there by --moe.routing etc.
"""

from pathlib import Path

from megabts.config.tool_parser import ToolParser
from megabts.errors import UsageError, run_tool

BAM = ("bam", "bam-adapters")


def main() -> None:
    """Parse, call megabts.assemble.upcycle, print the parameter counts."""
    parser = ToolParser(description=__doc__)
    parser.add_argument("--method", choices=("btx", "sparse", "bam", "bam-adapters"), required=True)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="checkpoint folder to write")
    parser.add_argument(
        "--member", action="append", required=True, metavar="NAME=DIR", help="a dense model, the seed first (several)"
    )
    parser.add_argument("--copies", type=int, metavar="N", help="sparse: copies of the seed (default: 4)")
    parser.add_argument(
        "--routing",
        choices=("topk", "switch", "soft", "sample"),
        help="to ffn experts (default: topk; bam, bam-adapters: soft)",
    )
    parser.add_argument("--top-k", type=int, default=2, metavar="K", help="ffn experts of a token (default: 2)")
    parser.add_argument("--balance", type=float, default=0.01, metavar="A", help="weight of the balance loss (0.01)")
    parser.add_argument("--split", type=int, default=1, metavar="C", help="chunks of each feed-forward (default: 1)")
    parser.add_argument("--blend", action="store_true", help="every ffn expert has a chunk of every member")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the routers' start (default: 0)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="what it computes in")
    args = parser.parse_args()

    from rich.progress import Progress

    from megabts import assemble
    from megabts.build import num_parameters, whole_model
    from megabts.config.methods import MoEConfig
    from megabts.config.run import PrecisionConfig, RunConfig

    moe = MoEConfig(
        named_members(args.method, args.member, args.copies),
        routing=args.routing or ("soft" if args.method in BAM else "topk"),
        top_k=args.top_k,
        balance=args.balance,
        split=args.split,
        blend=args.blend,
        attention_experts=args.method in BAM,
        adapters=args.method == "bam-adapters",
    )
    config = RunConfig(method="moe", moe=moe, precision=PrecisionConfig(dtype=args.dtype))
    with Progress() as progress:
        task = progress.add_task("tensors", total=None)
        config = assemble.upcycle(
            config,
            args.out,
            seed=args.seed,
            watch=lambda done, total: progress.update(task, completed=done, total=total),
        )
    print(f"wrote {args.out}")
    trained, total = num_parameters(whole_model(config))
    attentions = f", {len(moe.members)} attention experts" if moe.attention_experts else ""
    print(f"{moe.num_ffn_experts} ffn experts a layer{attentions}; {total:,} parameters, {trained:,} of them train")


def named_members(method: str, items: list[str], copies: int | None) -> dict[str, str]:
    """{"code": "DIR"} from ["code=DIR"]; for sparse upcycling the seed and its copies, all with its folder."""
    pairs = [item.partition("=") for item in items]
    for item, (name, _, path) in zip(items, pairs, strict=True):
        if not name or not path:
            raise UsageError(f"--member {item} is not of the form NAME=DIR")
    members = {name: path for name, _, path in pairs}
    if len(members) < len(pairs):
        raise UsageError(f"a member is named twice: {' '.join(items)}")
    if method == "sparse":
        if len(members) > 1:
            raise UsageError("sparse upcycling copies one model; give one --member and --copies")
        number = 4 if copies is None else copies
        if number < 2:
            raise UsageError(f"--copies is {number}; give at least 2")
        ((name, path),) = members.items()
        return {name: path} | {f"{name}-{copy}": path for copy in range(2, number + 1)}
    if copies is not None:
        raise UsageError("--copies is for --method sparse; leave it out")
    if len(members) < 2:
        raise UsageError(f"--method {method} needs at least two --member")
    return members


if __name__ == "__main__":
    run_tool(main)
