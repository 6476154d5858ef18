"""A plan as text to read and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megabts.config.run import RunConfig
from megabts.planner.gpus import GPUS, LINK_SHARE, MATMUL_SHARE, MEMORY_SHARE, RESERVED
from megabts.planner.methods import METHODS
from megabts.planner.search import Layout, Plan, smallest_cluster
from megabts.planner.step_time import StepTime
from megabts.planner.work import value_bytes

_SLOWEST = {
    "compute": "matrix products",
    "memory": "element-wise work",
    "tp": "tensor-parallel traffic",
    "ep": "expert-parallel traffic",
    "dp": "data-parallel traffic",
    "bubble": "pipeline bubble",
}


def plan_json(config: RunConfig, plan: Plan) -> dict[str, Any]:
    """All figures: bytes, seconds, operations; per-rank where a rank is meant."""
    cluster = plan.cluster
    return {
        "method": config.method,
        "gpu": asdict(cluster.gpu),
        "gpus": cluster.num_gpus,
        "gpus_per_node": cluster.per_node,
        "assumed": {
            "matmul_share": MATMUL_SHARE,
            "memory_share": MEMORY_SHARE,
            "link_share": LINK_SHARE,
            "reserved_bytes": RESERVED,
        },
        "flops_per_step": _flops(config),
        "tokens_per_step": _tokens(config),
        "layouts": plan.num_layouts,
        "fitting": plan.num_fitting,
        "ranked": [{**_layout_json(layout), **_time_json(config, plan, step)} for layout, step in plan.best],
        "closest": _layout_json(plan.closest) if plan.closest and not plan.best else None,
    }


def plan_text(config: RunConfig, plan: Plan) -> str:
    """What was assumed, the ranking, and for the first its memory, traffic and time; or why nothing fits."""
    gpu, cluster = plan.cluster.gpu, plan.cluster
    model, train = config.model, config.train
    lines = [
        f"{config.method}, {model.num_layers} layers x {model.hidden_size}, {_tokens(config):,} tokens a step "
        f"({train.global_batch} x {config.data.seq_length}), {_flops(config):.3g} model FLOPs a step",
        f"{cluster.num_gpus} x {gpu.name} in nodes of {cluster.per_node}: {gpu.memory / 1e9:.0f} GB at "
        f"{gpu.memory_bandwidth / 1e12:.2f} TB/s, NVLink {gpu.nvlink / 1e9:.0f} GB/s, network {gpu.network / 1e9:.0f} "
        f"GB/s a GPU; reached: {MATMUL_SHARE:.0%} of the peak, {MEMORY_SHARE:.0%} of memory, {LINK_SHARE:.0%} of links",
    ]
    if not plan.best:
        return "\n".join([*lines, "", *_nothing_fits(config, plan)])
    lines += [f"{plan.num_fitting} of {plan.num_layouts} layouts fit; the fastest of each mesh:", ""]
    lines += _ranking(config, plan)
    layout, step = plan.best[0]
    return "\n".join([*lines, "", *_details(plan, layout, step)])


def _ranking(config: RunConfig, plan: Plan) -> list[str]:
    rows = [("", "layout", "dp", "recompute", "micro-batches", "GB", "s/step", "tokens/s", "MFU", "bubble", "limit")]
    for number, (layout, step) in enumerate(plan.best, 1):
        train, rates = layout.config.train, _time_json(config, plan, step)
        rows.append(
            (
                str(number),
                layout_name(layout.config),
                str(layout.dp),
                train.recompute,
                f"{train.micro_batch} x {layout.num_microbatches}",
                f"{layout.memory.total / 1e9:.1f}",
                f"{step.seconds:.3f}",
                f"{rates['tokens_per_second']:,.0f}",
                f"{rates['mfu']:.1%}",
                f"{step.bubble:.1%}",
                _SLOWEST[step.slowest],
            )
        )
    return aligned(rows, left=(1, 3, 10))


def _details(plan: Plan, layout: Layout, step: StepTime) -> list[str]:
    memory, cluster = layout.memory, plan.cluster
    split = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in asdict(memory).items())
    parallel = layout.config.parallel
    spans = {
        "tp": parallel.tensor,
        "ep": parallel.tensor * parallel.expert,
        "dp": parallel.tensor * parallel.expert * layout.dp,
        "pp": cluster.num_gpus,
    }
    traffic = [
        f"{axis} {size / 1e9:.2f} over {'NVLink' if cluster.in_node(spans[axis]) else 'network'}"
        for axis, size in asdict(step.traffic).items()
        if size
    ]
    shares = [f"{_SLOWEST[name]} {part / step.seconds:.1%}" for name, part in asdict(step.shares).items() if part > 0]
    lines = [
        f"1, {layout_name(layout.config)}:",
        f"  fullest rank, GB: {split}; total {memory.total / 1e9:.2f} of {cluster.gpu.memory / 1e9:.0f}",
        f"  sent by a rank in a step, GB: {', '.join(traffic) or 'nothing'}",
        f"  the step: {', '.join(shares)}",
    ]
    return [*lines, f"  settings: {settings(layout.config)}"]


def _nothing_fits(config: RunConfig, plan: Plan) -> list[str]:
    cluster, closest = plan.cluster, plan.closest
    if closest is None:
        return [
            f"No layout passes the run's checks on {cluster.num_gpus} GPUs: train.global_batch "
            f"{config.train.global_batch} must be a multiple of micro-batch x data-parallel ranks, and the given "
            "degrees must divide the GPUs."
        ]
    need, largest = closest.memory.total, max(asdict(closest.memory).items(), key=lambda item: item[1])
    larger = [name for name, gpu in GPUS.items() if gpu.memory >= need]
    lines = [
        f"Nothing fits: memory. The closest of {plan.num_layouts} layouts needs {need / 1e9:.1f} of "
        f"{cluster.gpu.memory / 1e9:.0f} GB, most of it {largest[0]} ({largest[1] / 1e9:.1f} GB):",
        f"  {layout_name(closest.config)}, dp {closest.dp}, recompute {closest.config.train.recompute}, "
        f"micro-batch {closest.config.train.micro_batch}",
        f"  {', '.join(f'{name} {size / 1e9:.2f}' for name, size in asdict(closest.memory).items())}",
    ]
    enough = smallest_cluster(config, cluster, plan.pinned)
    if enough:
        lines.append(f"It would fit on {enough} x {cluster.gpu.name}.")
    if larger:
        lines.append(f"It would fit on as many {' or '.join(larger)}.")
    if largest[0] == "activations":
        lines.append("Shorter sequences (data.seq_length) would help as well.")
    return lines


def layout_name(config: RunConfig) -> str:
    """Short: "tp2+sp pp4 x 2 chunks ep4 gather"; "replicas" where every GPU has the whole model."""
    parallel = config.parallel
    words = []
    if parallel.tensor > 1:
        words.append(f"tp{parallel.tensor}{'+sp' if parallel.sequence else ''}")
    if parallel.pipeline > 1:
        words.append(f"pp{parallel.pipeline}{f' x {parallel.chunks} chunks' if parallel.chunks > 1 else ''}")
    if parallel.expert > 1:
        words.append(f"ep{parallel.expert}{f' {parallel.exchange}' if config.method == 'bts' else ''}")
    return " ".join(words) or "replicas"


def settings(config: RunConfig) -> str:
    """The layout as flags of tools/train.py."""
    parallel, train = config.parallel, config.train
    chosen = {
        "parallel.tensor": parallel.tensor,
        "parallel.sequence": str(parallel.sequence).lower(),
        "parallel.pipeline": parallel.pipeline,
        "parallel.schedule": parallel.schedule,
        "parallel.chunks": parallel.chunks,
        "parallel.cuts": str(parallel.cuts).replace(" ", ""),
        "parallel.expert": parallel.expert,
        "parallel.exchange": parallel.exchange,
        "train.recompute": train.recompute,
        "train.micro_batch": train.micro_batch,
    }
    return " ".join(f"--{key} {value}" for key, value in chosen.items())


def aligned(rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """Columns as wide as their widest cell, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            f"{cell:<{width}}" if column in left else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _layout_json(layout: Layout) -> dict[str, Any]:
    parallel, train = layout.config.parallel, layout.config.train
    return {
        "tp": parallel.tensor,
        "sp": parallel.sequence,
        "pp": parallel.pipeline,
        "schedule": parallel.schedule,
        "chunks": parallel.chunks,
        "cuts": parallel.cuts,
        "ep": parallel.expert,
        "exchange": parallel.exchange,
        "dp": layout.dp,
        "recompute": train.recompute,
        "micro_batch": train.micro_batch,
        "num_microbatches": layout.num_microbatches,
        "memory": {**asdict(layout.memory), "total": layout.memory.total},
    }


def _time_json(config: RunConfig, plan: Plan, step: StepTime) -> dict[str, Any]:
    cluster, tokens = plan.cluster, _tokens(config) / step.seconds
    peak = cluster.num_gpus * cluster.gpu.peak(value_bytes(config))
    return {
        "seconds": step.seconds,
        "tokens_per_second": tokens,
        "mfu": _flops(config) / step.seconds / peak,
        "bubble": step.bubble,
        "limit": step.slowest,
        "shares_seconds": asdict(step.shares),
        "sent_bytes": asdict(step.traffic),
    }


def _tokens(config: RunConfig) -> int:
    return config.train.global_batch * config.data.seq_length


def _flops(config: RunConfig) -> float:
    return METHODS[config.method].flops(config) * _tokens(config)
