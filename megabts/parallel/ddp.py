"""Data parallelism: flat fp32 gradients in buckets, reduce-scattered over dp while backward still runs (ZeRO stage 1).

Layout. The trainable parameters lie one after the other in `flat`, last registered first, which is about the order in
which backward reaches them, and are cut into buckets. A bucket is padded until it divides over the dp ranks; rank r's
share of every bucket is its *shard*: the elements whose sum it receives, and which its optimizer steps (Rajbhandari et
al., arXiv 1910.02054). Frozen parameters have no place in the buffer.

    flat     | bucket 0                   | bucket 1                   | ...      4 bytes a parameter, on every rank
    shards   |  rank 0  |  rank 1  | pad  |  rank 0  |  rank 1  | pad  |          sums over dp, in place

Time. Autograd's gradients are added to the buffer as they come and freed at once, so low-precision parameters
accumulate in fp32 over micro-batches. In the last backward (`overlap`) bucket i is reduce-scattered, asynchronously, as
soon as all parameters of the buckets 0 .. i have their gradients. The order of launches is 0, 1, 2, ... on every rank,
whatever the order of gradients was; `sync` launches what is left (parameters without a gradient, late buckets).

Late buckets, at the end, hold parameters of which several tp ranks computed a part of the gradient (norms under
sequence parallelism; key and value heads held by several ranks). After backward those parts are added in one
all-reduce, then reduced over dp like the rest. Tied embeddings have a bucket of their own too: the first and the last
pipeline stage exchange their shards of it, after dp, and add.

ffn experts that ranks divide among them (`ParamMeta.held`) have buckets of their own, which are reduced over the ranks
that hold the same ones: each has the gradient of all tokens that came to it, from whatever rank.

With one dp rank there is no padding, no copy and no message: shards are the buckets.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megabts.parallel.collectives import all_reduce, reduce_scatter_single
from megabts.parallel.mesh import Axis, ParallelMesh
from megabts.parallel.ranges import Range, joined, overlap, without
from megabts.parallel.sharding import NamedParameters, ParamMeta

_ALIGN = 32
"""Shards begin at multiples of so many elements (128 bytes of fp32), which is what communication libraries like."""

Named = tuple[str, nn.Parameter, ParamMeta]


@dataclass(frozen=True)
class Slot:
    """One parameter's place. Ranges count the elements of the rank's (tp-local) parameter, flattened."""

    name: str
    parameter: nn.Parameter
    meta: ParamMeta
    start: int
    """Where its gradient begins in the flat buffer."""
    grad: Tensor
    """Its gradient, in its shape: a view of the flat buffer."""
    covered: Range
    """Elements in this rank's shard; (0, 0) when there are none."""
    offset: int
    """Where those begin in a tensor of all this rank's shards, one after the other."""
    counted: tuple[Range, ...]
    """What of `covered` this rank counts in sums over the whole mesh: each element is counted by one rank."""


@dataclass(frozen=True)
class Bucket:
    """Gradients that are reduced together."""

    slots: tuple[Slot, ...]
    flat: Tensor
    shard: Tensor
    """This rank's share of `flat`."""
    axis: Axis
    """The ranks that each have a share."""


class GradientBuffer:
    """Flat gradients of the trainable ones of `named`.

    `tied`: names held by both the first and the last pipeline stage, whose gradients are added over the two; every
    stage must give the same. `device` is where a rank that trains nothing takes part in what the others reduce.

    Attributes:
        buckets, slots: in the order of `flat`.
        shard_size: elements of all this rank's shards together, padding included.
        counted: views of `flat`: what this rank counts in a norm over the whole mesh (after `sync`).
    """

    def __init__(
        self,
        named: NamedParameters,
        mesh: ParallelMesh,
        *,
        bucket_elements: int = 25_000_000,
        tied: Sequence[str] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        self.mesh, self.device = mesh, torch.device(device)
        order = [item for item in named if item[1].requires_grad][::-1]
        assert all(parameter.device.type == self.device.type for _, parameter, _ in order), f"not on {device}"
        late = {name for name, _, meta in order if _partial_rows(meta, mesh.tp)}
        tied = tied if mesh.pp.size > 1 else ()
        assert late.isdisjoint(tied)
        soon = [item for item in order if item[0] not in late and item[0] not in tied]
        early = _pack([item for item in soon if not item[2].held], bucket_elements)
        early += _pack([item for item in soon if item[2].held], bucket_elements)
        place = {name: number for number, (name, _, _) in enumerate(soon)}
        early.sort(key=lambda pack: place[pack[-1][0]])  # as they will be complete
        both = _pack([item for item in order if item[0] in tied], bucket_elements)
        rest = _pack([item for item in order if item[0] in late], bucket_elements)
        self._num_early = len(early) + len(both)
        self._allot([*early, *both, *rest], tied)
        self._tied = self.buckets[len(early) : self._num_early]
        if tied:  # also the group's first message: some libraries want all its ranks in that one
            holders = all_reduce(torch.full((1,), float(len(both) > 0), device=self.device), mesh.pp)
            assert holders.item() in (0.0, 2.0), f"{tied} must be trained by the first and the last stage, or by none"
        self._partial = [piece for slot in self.slots for piece in _partial_pieces(slot, mesh.tp)]
        self._works: list[dist.Work] = []
        self._in_last_backward = False
        self._begin()
        for index, bucket in enumerate(self.buckets):
            for slot in bucket.slots:
                slot.parameter.register_post_accumulate_grad_hook(self._accumulate_into(slot, index))

    def zero(self) -> None:
        """Forget all gradients: a new step begins."""
        self.flat.zero_()
        self._begin()

    @contextmanager
    def overlap(self) -> Iterator[None]:
        """Around the last backward of a step, or around each part's last one where parts of a model run backward apart.

        Inside, a gradient that comes is complete with it.
        """
        self._in_last_backward = True
        try:
            yield
        finally:
            self._in_last_backward = False

    def sync(self) -> None:
        """After the last backward: sum the gradients over the ranks. From here on only the shards have a meaning."""
        self._launch_until(self._num_early)
        self._sum_partial()
        self._launch_until(len(self.buckets))
        for work in self._works:
            work.wait()
        self._works.clear()
        self._exchange_tied()

    @property
    def shards(self) -> list[Tensor]:
        """This rank's shard of every bucket, padding included."""
        return [bucket.shard for bucket in self.buckets]

    def divide(self, divisor: float) -> None:
        """Divide this rank's shards."""
        for shard in self.shards:
            shard.div_(divisor)

    def _allot(self, packs: list[list[Named]], tied: Sequence[str]) -> None:
        """Set flat, buckets and slots."""
        dtypes = {parameter.dtype for pack in packs for _, parameter, _ in pack}
        axes = [pack[0][2].reduced_over(self.mesh) for pack in packs]
        lengths = [
            _padded(sum(p.numel() for _, p, _ in pack), axis.size) for pack, axis in zip(packs, axes, strict=True)
        ]
        exact = torch.float64 if torch.float64 in dtypes else torch.float32
        self.flat = torch.zeros(sum(lengths), dtype=exact, device=self.device)
        self.buckets: list[Bucket] = []
        counted: list[Range] = []
        offset = begin = 0
        for pack, length, axis in zip(packs, lengths, axes, strict=True):
            flat, own = self.flat[begin : begin + length], length // axis.size
            mine, slots, start = (axis.rank * own, (axis.rank + 1) * own), [], 0
            for name, parameter, meta in pack:
                end = start + parameter.numel()
                first, last = overlap((start, end), mine)
                covered = (first - start, last - start) if first < last else (0, 0)
                once = () if name in tied and self.mesh.pp.rank else tuple(without(covered, self._copies(meta)))
                grad = flat[start:end].view(parameter.shape)
                slots.append(Slot(name, parameter, meta, begin + start, grad, covered, offset + first - mine[0], once))
                counted += [(begin + start + a, begin + start + b) for a, b in once]
                start = end
            self.buckets.append(Bucket(tuple(slots), flat, flat[slice(*mine)], axis))
            offset, begin = offset + own, begin + length
        self.shard_size = offset
        self.slots = [slot for bucket in self.buckets for slot in bucket.slots]
        self.counted = [self.flat[a:b] for a, b in joined(counted)]

    def _copies(self, meta: ParamMeta) -> list[Range]:
        """The elements of a parameter that a lower rank holds too."""
        axis = self.mesh.axis(meta.axis)
        return [_elements(meta, axis, rows) for rows in meta.duplicates(axis)]

    def _begin(self) -> None:
        self._launched = 0
        self._missing = [{slot.name for slot in bucket.slots} for bucket in self.buckets]

    def _accumulate_into(self, slot: Slot, index: int) -> Callable[[nn.Parameter], None]:
        def hook(parameter: nn.Parameter) -> None:
            assert parameter.grad is not None
            assert index >= self._launched, f"a gradient of {slot.name} came after its bucket was reduced"
            slot.grad.add_(parameter.grad)
            parameter.grad = None
            if self._in_last_backward:
                self._missing[index].discard(slot.name)
                while self._launched < self._num_early and not self._missing[self._launched]:
                    self._launch_until(self._launched + 1)

        return hook

    def _launch_until(self, end: int) -> None:
        """Start the reduction of the buckets before `end` that have not started."""
        for bucket in self.buckets[self._launched : end]:
            if bucket.axis.size > 1:
                work = reduce_scatter_single(bucket.shard, bucket.flat, group=bucket.axis.group, async_op=True)
                assert work is not None
                self._works.append(work)
        self._launched = max(self._launched, end)

    def _sum_partial(self) -> None:
        """Add up, over tp, the gradients of which several ranks have a part: one message for all of them."""
        if not self._partial:
            return
        whole = self.flat.new_zeros(sum(piece.whole for piece in self._partial))
        parts = whole.split([piece.whole for piece in self._partial])
        mine = [part[piece.start :][: len(piece.grad)] for part, piece in zip(parts, self._partial, strict=True)]
        torch._foreach_copy_(mine, [piece.grad for piece in self._partial])
        all_reduce(whole, self.mesh.tp)
        torch._foreach_copy_([piece.grad for piece in self._partial], mine)

    def _exchange_tied(self) -> None:
        """Add the other end's shards of the tied embeddings' gradients."""
        pp = self.mesh.pp
        for bucket in self._tied:
            other = pp.ranks[0] if pp.rank else pp.ranks[-1]
            theirs = torch.empty_like(bucket.shard)
            send = dist.P2POp(dist.isend, bucket.shard, other, pp.group)
            receive = dist.P2POp(dist.irecv, theirs, other, pp.group)
            for work in dist.batch_isend_irecv([send, receive]):
                work.wait()
            bucket.shard.add_(theirs)


def split_like(flat: Tensor, parameters: Iterable[Tensor]) -> list[Tensor]:
    """Views into the beginning of `flat`, one in the shape of each parameter."""
    views, start = [], 0
    for parameter in parameters:
        views.append(flat[start : start + parameter.numel()].view(parameter.shape))
        start += parameter.numel()
    return views


@dataclass(frozen=True)
class _Piece:
    """Part of a gradient that must be added up over tp."""

    grad: Tensor
    """This rank's elements, flat."""
    start: int
    """Where they begin in the whole."""
    whole: int
    """Elements of the whole, of which every rank holds some."""


def _partial_rows(meta: ParamMeta, tp: Axis) -> list[Range]:
    """Local rows of whose gradient every rank that holds them has computed a part."""
    if meta.axis != tp.name or (meta.dim is None and not meta.summed):
        return []
    return meta.replicated(tp)


def _partial_pieces(slot: Slot, tp: Axis) -> Iterator[_Piece]:
    meta, rows = slot.meta, _partial_rows(slot.meta, tp)
    flat = slot.grad.view(-1)
    if rows and meta.dim is None:
        yield _Piece(flat, 0, flat.numel())
        return
    local = full = 0
    for count, (first, last) in zip(meta.parts or (0,), meta.slices(tp) if rows else (), strict=False):
        mine, size = (local, local + last - first), (count * meta.unit or meta.shape[0])
        if mine in rows:
            a, b = _elements(meta, tp, mine)
            width = (b - a) // (last - first)
            yield _Piece(flat[a:b], (first - full) * width, size * width)
        local, full = mine[1], full + size


def _elements(meta: ParamMeta, axis: Axis, rows: Range) -> Range:
    """Local rows (of the first dimension) as a range of elements of the flat local tensor."""
    width = prod(meta.local_shape(axis)[1:])
    return rows[0] * width, rows[1] * width


def _pack(items: list[Named], capacity: int) -> list[list[Named]]:
    """Cut into packs of at most `capacity` elements, or one parameter."""
    packs: list[list[Named]] = []
    size = 0
    for item in items:
        size += item[1].numel()
        if not packs or size > capacity:
            packs.append([])
            size = item[1].numel()
        packs[-1].append(item)
    return packs


def _padded(size: int, num_ranks: int) -> int:
    return size if num_ranks == 1 else -(-size // (num_ranks * _ALIGN)) * num_ranks * _ALIGN
