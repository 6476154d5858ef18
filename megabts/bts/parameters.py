"""How many parameters a BTS model has: as it is held and run here, and as the paper counts them.

The two differ. The paper counts a hub slice in the gate of Hub-into-Experts layers, which its equations never read, and
whole members; here that slice is not allocated, and the final norms and heads of the experts are not even built. Of
stitches of another form (low rank, token gates, a mixed output, another start) the paper's count is a comparison.
"""

from dataclasses import dataclass

from megabts.bts.plan import stitch_plan
from megabts.config.methods import HUB, BTSConfig
from megabts.config.model import ModelConfig


@dataclass(frozen=True)
class ParameterReport:
    """Counts of one BTS model."""

    trained: int
    """Parameters that train: of the stitches, those that `bts.trainable` names."""
    paper_trained: int
    """K (2n + 1) D^2: n projections and n + 1 gate slices in every stitch layer."""
    paper_total: int
    """Whole members and `paper_trained`."""
    total: int
    """Whole members and these very stitches; `paper_total` counts the hub slices that nothing reads too."""
    active: int
    """What one token runs through: members, the experts without final norm and head, and the stitches."""

    unread: int
    """What of `paper_trained` is in hub slices of Hub-into-Experts gates, where nothing reads it."""
    paper_form: bool
    """Whether the stitches are the paper's, and train whole: then `paper_trained` is a count of this very model."""

    def __str__(self) -> str:
        slices = "the never used hub slices of the Hub-into-Experts gates and " if self.unread else ""
        paper = f"{self.paper_trained:,} of {self.paper_total:,}, with {slices}whole members"
        whole, words = self.active, "the paper's stitches of these members would count as"
        if self.paper_form:
            whole, words = self.paper_total, "the paper counts"
        return f"trained {self.trained:,} of {short(whole)}; {words} {paper}; a token runs through {self.active:,}"


def parameter_report(model: ModelConfig, bts: BTSConfig) -> ParameterReport:
    """Count without building anything. Raises UsageError as `stitch_plan`."""
    d, n = model.hidden_size, len(bts.experts)
    projection, gate = matrix_sizes(bts, d)
    owned = dict.fromkeys(bts.members, 0)
    plan = stitch_plan(model.num_layers, bts)
    for point in plan:
        for expert in bts.experts:
            owned[expert] += projection + gate
        if point.kind == "experts_into_hub":
            owned[HUB] += gate + (d if bts.start != "uniform" else 0)  # gate slice; hub bias or mix
    heads = 1
    if bts.output == "mixture":
        heads = n + 1
        owned = {name: count + d for name, count in owned.items()}
        owned[HUB] += bts.evidence
    trained = sum(count for name, count in owned.items() if name in bts.trainable or "*" in bts.trainable)
    paper_trained = bts.num_stitch_layers * (2 * n + 1) * d * d
    output = d + (0 if model.tie_embeddings else model.vocab_size * d)
    members = (n + 1) * model.num_parameters
    return ParameterReport(
        trained=trained,
        paper_trained=paper_trained,
        paper_total=members + paper_trained,
        total=members + sum(owned.values()),
        active=members - (n + 1 - heads) * output + sum(owned.values()),
        unread=sum(point.kind == "hub_into_experts" for point in plan) * d * d,
        paper_form=(bts.start, bts.gate, bts.projection_rank, bts.output) == ("uniform", "dimension", 0, "hub")
        and trained == sum(owned.values()),
    )


def matrix_sizes(bts: BTSConfig, hidden_size: int) -> tuple[int, int]:
    """Parameters of (a projection, a gate slice)."""
    d, rank = hidden_size, bts.projection_rank
    return (2 * d * rank if rank else d * d), (d if bts.gate == "token" else d * d)


def short(count: int) -> str:
    """11,023,134,720 -> "11.0B"."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)
