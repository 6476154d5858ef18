"""A BTS model's parts on one expert-parallel rank: frozen members, and stitches of which it owns slices.

What a stitch keeps, in elements of D / tp per position, besides fp32 dropout masks of all D per gate: what its linears
read (whole: the hub's state; into the hub, every local expert's, too), per expert its own and the projected state and
the gate; into the hub over several ranks either everything on the hub's rank (gather) or each rank's own (reduce).

Bytes over the expert axis, in hidden states, as NCCL moves them (its broadcast and reduce are rings: one state through
every link), in the busiest direction: Hub-into-Experts 1 forward, 1 backward; into the hub by gather the n experts that
lie elsewhere each way, as slices under tensor parallelism; by reduce 1 (broadcast) + 2 (P - 1) / P (maximum) + 2 (sums)
forward and 2 + 1 backward.
"""

from functools import cache

import torch

from megabts.bts.flow import StitchFlow, gradient_flow, needs_gradient
from megabts.bts.placement import Placement
from megabts.bts.plan import Kind, StitchPoint, stitch_plan
from megabts.bts.stitch import Stitch
from megabts.config.methods import HUB, BTSConfig
from megabts.config.run import RunConfig
from megabts.model.torch_backend import TorchBackend
from megabts.parallel.mesh import Axis
from megabts.planner.decoder import embedding_work, head_work, layer_work, tensor_bytes, vocabulary_elements
from megabts.planner.work import Parts, Work, rows, slice_share, state_bytes, value_bytes

GATE_BYTES = (60.0, 60.0)
"""Per element of a bf16 gate: dropout's mask in fp32, the product, softmax or sigmoid, the mixture."""


def bts_parts(config: RunConfig, ep_rank: int = 0) -> Parts:
    """The parts of expert-parallel rank `ep_rank`."""
    model, bts = config.model, config.bts
    ep = Axis("ep", config.parallel.expert, ep_rank)
    placement = Placement.of(bts.members, ep, config.parallel.exchange)
    flows = gradient_flow(stitch_plan(model.num_layers, bts), bts)
    stitches = {flow.point.after: flow for flow in flows}
    silent, passing = (layer_work(config, trains=False, passes=passes) for passes in (False, True))
    layers = []
    for depth in range(model.num_layers):
        needs = needs_gradient(flows, depth)
        through = len(needs.intersection(placement.local))
        work = passing.times(through) + silent.times(len(placement.local) - through)
        if depth in stitches:
            work = _shared(work, stitches[depth], placement, config)
        if depth + 1 in stitches:
            work += stitch_work(config, stitches[depth + 1], placement)
        layers.append(work)
    embedding = embedding_work(config, trains=False).times(len(placement.local))
    head = Work()
    if placement.has_hub:
        head = head_work(config, trains=False, passes=HUB in needs_gradient(flows, model.num_layers))
    if bts.output == "mixture":
        head = head.times(len(placement.local))
    tied = vocabulary_elements(config) if model.tie_embeddings and placement.has_hub else 0
    largest = model.hidden_size**2 // config.parallel.tensor
    return Parts(embedding, tuple(layers), head, tied, largest, len(placement.local))


def stitch_work(config: RunConfig, flow: StitchFlow, placement: Placement) -> Work:
    """One stitch on one rank."""
    parameters, trainable = _count(config, flow.point.kind, placement)
    d, everywhere, value = config.model.hidden_size, rows(config), value_bytes(config)
    gates = len(placement.gated(flow.point.kind))
    moved = [each * gates * everywhere * d / config.parallel.tensor * value / 2 for each in GATE_BYTES]
    return Work(
        parameters=parameters,
        trainable=trainable,
        kept=_kept(config, flow, placement),
        working=everywhere * value * d * 4,
        moved=(moved[0], moved[1]),
        tensor=_tensor(config, flow, placement),
        expert=_exchanged(config, flow, placement),
    )


def _tensor(config: RunConfig, flow: StitchFlow, placement: Placement) -> tuple[float, float]:
    """Bytes over tp, in halves of an all-reduce: states enter whole, or are taken as slices, and leave as slices.

    Into the hub enter the local experts and, where gates are, the hub, whose slice is taken; into the experts enters
    the hub, and the experts' slices are taken. Under sequence parallelism slices change places all-to-all.
    """
    half, tp = tensor_bytes(config, config.model.hidden_size) / 2, config.parallel.tensor
    experts, hub, before = list(placement.experts), [HUB] * placement.has_hub, flow.before
    last = flow.point.after == config.model.num_layers
    gates = [HUB] * bool(placement.gated(flow.point.kind))
    if flow.point.kind == "hub_into_experts":
        entered, sliced, left = gates, experts, experts
    else:
        left = hub + experts * (config.bts.expert_stream == "projected" and not last)
        entered, sliced = gates + experts, hub
    entering, slicing = (sum(name in before for name in names) for names in (entered, sliced))
    if not config.parallel.sequence:
        return half * len(left), half * (2 * entering + slicing)
    through = len(sliced) + len(left)
    return half * (len(entered) + through / tp), half * (entering + (slicing + len(left)) / tp)


def _kept(config: RunConfig, flow: StitchFlow, placement: Placement) -> float:
    """Bytes kept of one stitch; nothing where nothing trains or passes gradient."""
    if not (flow.trained or flow.before):
        return 0.0
    tp, into_hub = config.parallel.tensor, flow.point.kind == "experts_into_hub"
    experts, hub = len(placement.experts), placement.has_hub
    gates = len(placement.gated(flow.point.kind))
    own = 1 / tp if tp > 1 else 0.0  # with one tensor-parallel rank a slice is the state itself
    whole = float(gates > 0)  # the hub's state, which gates read
    if not into_hub:
        slices = experts * 3 / tp
    elif placement.exchange == "gather":
        whole += experts
        slices = hub * ((2 * len(placement.members) - 1) / tp + own)
    else:
        whole += experts
        slices = (experts + gates + 2 * hub) / tp + hub * own
    mixes = config.bts.start == "hub_preserving" and into_hub and hub
    masks = 2 * gates if config.bts.gate_dropout > 0 else 0
    return rows(config) * config.model.hidden_size * ((whole + slices + mixes / tp) * value_bytes(config) + masks)


def _shared(layer: Work, flow: StitchFlow, placement: Placement, config: RunConfig) -> Work:
    """The layer after a stitch, without the states that the stitch keeps already."""
    tp, sequence = config.parallel.tensor, config.parallel.sequence
    if flow.point.kind == "hub_into_experts":
        shared = int(placement.has_hub and HUB in flow.after and not sequence)
    elif config.bts.expert_stream == "unchanged":
        shared = 0 if sequence else len(placement.experts)
    else:
        copied = placement.ep.size > 1 and placement.exchange == "gather"
        shared = len(placement.experts) if tp == 1 and not copied else 0
    state = shared * state_bytes(config)
    return layer + Work(kept=-state, entry=-state)


def _exchanged(config: RunConfig, flow: StitchFlow, placement: Placement) -> tuple[float, float]:
    size, tp = placement.ep.size, config.parallel.tensor
    if size == 1:
        return 0.0, 0.0
    state = rows(config) * config.model.hidden_size * value_bytes(config)
    whole, part = state * slice_share(config), state / tp
    if flow.point.kind == "hub_into_experts":
        return whole, whole if HUB in flow.before else 0.0
    if placement.exchange == "gather":
        there = sum(placement.expert_counts[1:]) if placement.has_hub else len(placement.experts)
        return there * part, there * part
    forward = whole + part * (2 * (size - 1) / size + 2)
    return forward, 2 * part + (whole if HUB in flow.before else 0.0)


def _count(config: RunConfig, kind: Kind, placement: Placement) -> tuple[int, int]:
    """(held, trainable) elements of the real stitch."""
    bts = config.bts
    ep, exchange = placement.ep, placement.exchange
    owners = _stitch_elements(
        kind,
        config.model.hidden_size,
        bts.members,
        (bts.start, bts.gate, bts.projection_rank),
        config.parallel.tensor,
        ep.size,
        ep.rank,
        exchange,
    )
    trained = [count for owner, count in owners if "*" in bts.trainable or owner in bts.trainable]
    return sum(count for _, count in owners), sum(trained)


@cache
def _stitch_elements(
    kind: Kind,
    size: int,
    members: tuple[str, ...],
    form: tuple[str, str, int],
    tp: int,
    ep: int,
    ep_rank: int,
    exchange: str,
) -> tuple[tuple[str, int], ...]:
    """(member, elements) of each of a real stitch's parameters on this rank; `form`: start, gate, projection rank."""
    start, gate, rank = form
    experts = dict.fromkeys(members[1:], "")
    bts = BTSConfig(experts=experts, start=start, gate=gate, projection_rank=rank)  # type: ignore[arg-type]
    placement = Placement(members, Axis("ep", ep, ep_rank), exchange)  # type: ignore[arg-type]
    flow = gradient_flow([StitchPoint(0, kind)], bts)[0]
    stitch = Stitch(kind, size, bts, TorchBackend(torch.float32, "meta", Axis("tp", tp)), placement, flow)
    return tuple(
        (name.split(".")[1] if name.split(".")[0] in ("projections", "gates") else HUB, parameter.numel())
        for name, parameter in stitch.named_parameters()
    )
