"""A MoE model's weights from dense members', one tensor at a time: Branch-Train-MiX, BAM and sparse upcycling.

Feed-forwards become ffn experts, and in BAM (arXiv 2408.08274) attentions attention experts; routers and adapters are
new; everything else is the members' average, in fp32. With one member (sparse upcycling, arXiv 2212.05055) every expert
is its copy.

Each feed-forward may be cut into C chunks of its inner width (`split`): it is the sum of its chunks, so `down` of every
ffn expert is multiplied by C. Then ffn experts that all have equal weights, which sum to 1, add up to the average of
the members' feed-forwards, whatever C is: scales of later layers stay as they were. `blend`: the width is cut into N =
members x C pieces, and the n-th pieces of all members, side by side, are the n-th ffn expert.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megabts.checkpoint.source import DenseSource, check_same_shape, open_dense
from megabts.checkpoint.stream import write_streaming
from megabts.config.methods import MoEConfig
from megabts.errors import UsageError
from megabts.merge.soup import average
from megabts.parallel.sharding import ParamMeta

NEW = (".router.weight", ".adapters.weight")
"""What the members have not."""
ATTENTION_EXPERT = re.compile(r"(?<=\.attention\.)experts\.(\d+)\.")
"""What, in a name, makes a member's attention the n-th attention expert."""
FFN = {".mlp.experts.gate_up": ".mlp.gate_up.weight", ".mlp.experts.down": ".mlp.down.weight"}
"""What a MoE model's stacked matrices are called in a dense one."""


def dense_name(name: str) -> str:
    """The members' parameter that a MoE model's is made of; "" for routers and adapters, which are new."""
    if name.endswith(NEW):
        return ""
    for stacked, single in FFN.items():
        if name.endswith(stacked):
            return name.removesuffix(stacked) + single
    return ATTENTION_EXPERT.sub("", name)


def origins(name: str, num_members: int) -> Sequence[int]:
    """Which of the members that are read a parameter is made of: all, or the one whose attention expert it is of."""
    found = ATTENTION_EXPERT.search(name)
    return range(num_members) if found is None else (int(found[1]) if num_members > 1 else 0,)


def wanted(names: Iterable[str], member: int, num_members: int) -> list[str]:
    """What one of the members that are read is asked for, in order, to make the parameters `names`."""
    return [source for name in names if (source := dense_name(name)) and member in origins(name, num_members)]


def upcycle(
    metas: Mapping[str, ParamMeta],
    moe: MoEConfig,
    members: Sequence[Iterable[tuple[str, Tensor]]],
    seed: int,
) -> Iterator[tuple[str, Tensor]]:
    """All parameters of the MoE model with `metas`, in that order and in the first member's type.

    `members`: each one's (name, tensor) in the order of `wanted`; as many as `moe.members`, or one, which is copied.
    `seed`: of the routers' start.
    """
    streams = [iter(member) for member in members]
    dtype = torch.float32
    for name, meta in metas.items():
        source = dense_name(name)
        if not source:
            yield name, meta.initial(name, seed).to(dtype)
            continue
        found = [next(streams[member]) for member in origins(name, len(streams))]
        assert {key for key, _ in found} == {source}, f"the members' tensors come in another order: {source}"
        dtype = found[0][1].dtype
        yield name, _combine(name, [tensor for _, tensor in found], moe)
        del found


def _combine(name: str, tensors: list[Tensor], moe: MoEConfig) -> Tensor:
    if not name.endswith(tuple(FFN)):
        return average([{name: tensor} for tensor in tensors], [1.0] * len(tensors))[name]
    count = len(moe.members)
    copies = tensors if len(tensors) == count else tensors * count
    return stack_gate_up(copies, moe) if name.endswith(".gate_up") else stack_down(copies, moe)


def stack_gate_up(matrices: Sequence[Tensor], moe: MoEConfig) -> Tensor:
    """Members' [2 F, D] -> [N, 2 F / C, D]."""
    members, chunks, n = len(matrices), moe.split, moe.num_ffn_experts
    rows, d = matrices[0].shape
    out = matrices[0].new_empty(n, rows // chunks, d)
    for index, matrix in enumerate(matrices):
        if moe.blend:
            out.view(n, 2, members, -1, d)[:, :, index] = matrix.view(2, n, -1, d).transpose(0, 1)
        else:
            out.view(members, chunks, 2, -1, d)[index] = matrix.view(2, chunks, -1, d).transpose(0, 1)
    return out


def stack_down(matrices: Sequence[Tensor], moe: MoEConfig) -> Tensor:
    """Members' [D, F] -> [N, D, F / C], times C."""
    members, chunks, n = len(matrices), moe.split, moe.num_ffn_experts
    d, width = matrices[0].shape
    out = torch.empty(n, d, width // chunks, dtype=matrices[0].dtype)
    for index, matrix in enumerate(matrices):
        if moe.blend:
            out.view(n, d, members, -1)[:, :, index] = matrix.view(d, n, -1).transpose(0, 1)
        else:
            out.view(members, chunks, d, -1)[index] = matrix.view(d, chunks, -1).transpose(0, 1)
    return out.mul_(chunks)


def open_dense_members(moe: MoEConfig) -> list[DenseSource]:
    """The members, opened and checked to fit together; the first alone where all have one folder.

    Raises UserError when one is missing, UsageError when they differ or there are none.
    """
    if not moe.members:
        raise UsageError("method moe needs members; give the seed's folder at least")
    sparse = len(set(moe.members.values())) == 1
    sources = {name: open_dense(path) for name, path in list(moe.members.items())[: 1 if sparse else None]}
    check_same_shape(sources)
    return list(sources.values())


def write_upcycled(
    out: Path,
    moe: MoEConfig,
    sources: Sequence[DenseSource],
    metas: Mapping[str, ParamMeta],
    blobs: Mapping[str, bytes],
    state: Mapping[str, Any],
    seed: int,
    watch: Callable[[int, int], None],
) -> None:
    """Write a checkpoint folder of what `upcycle` makes of `sources`, in the memory of one tensor.

    `watch(done, total)` is told of every tensor. Raises CheckpointError, as `write_streaming`.
    """
    orders = [wanted(metas, member, len(sources)) for member in range(len(sources))]

    def tensors() -> Iterator[tuple[str, Tensor]]:
        streams = [source.weights(order) for source, order in zip(sources, orders, strict=True)]
        made = upcycle(metas, moe, streams, seed)
        for number in range(1, len(metas) + 1):
            yield next(made)
            watch(number, len(metas))

    value_bytes = next(sources[0].weights(orders[0]))[1].element_size()
    num_bytes = sum(prod(meta.shape) for meta in metas.values()) * value_bytes
    write_streaming(out, list(metas), tensors(), num_bytes, blobs, state)
