"""How members are combined: the sections beside `model` that describe a method."""

from dataclasses import dataclass, field
from typing import Literal

from megabts.errors import UsageError


@dataclass
class BTSConfig:
    """Branch-Train-Stitch (arXiv 2502.00075): which members, where the stitch layers sit, how they start."""

    hub: str = ""
    """Folder of the hub: a megabts checkpoint or a Hugging Face Llama folder. Usually the seed; any member may be."""
    experts: dict[str, str] = field(default_factory=dict)
    """Experts by name, each with its folder: {code: DIR, math: DIR}."""
    num_stitch_layers: int = 4
    """Stitch layers K: one after every floor(L/K) layers, the last one always after layer L."""
    alternating: bool = True
    """Hub-into-Experts and Experts-into-Hub alternate, Experts-into-Hub last; false: Experts-into-Hub only."""
    expert_stream: Literal["projected", "unchanged"] = "projected"
    """What an expert continues with after an Experts-into-Hub layer: its projected state (paper) or its own state."""
    gate_dropout: float = 0.1
    """Dropout probability on the gate logits while training (the paper gives no rate)."""
    start: Literal["uniform", "hub_leaning", "hub_preserving"] = "uniform"
    """Start of the stitches, projections at identity and gate weights at zero in each case. uniform: members mix in
    equal parts; hub_leaning: a bias on the hub's gate logit; hub_preserving: h0 + a (mix - h0) with a = 0."""
    hub_bias: float = 3.0
    """Initial bias b on the hub's gate logit with start=hub_leaning: the hub's weight is e^b / (e^b + n)."""
    trainable: list[str] = field(default_factory=lambda: ["*"])
    """Which members' projections and gate slices train: member names or "*" for all."""

    def __post_init__(self) -> None:
        if self.num_stitch_layers < 1:
            raise UsageError(f"bts.num_stitch_layers is {self.num_stitch_layers}; it must be at least 1")
        if not 0 <= self.gate_dropout < 1:
            raise UsageError(f"bts.gate_dropout is {self.gate_dropout}; it must lie in [0, 1)")
        for name in self.experts:
            if name == HUB or not name.replace("-", "_").isidentifier():
                raise UsageError(f"bts.experts has a member named {name!r}; use letters, digits, - and _, not 'hub'")

    def check_trainable(self) -> None:
        """Raise UsageError when `trainable` names someone who is no member."""
        unknown = set(self.trainable) - {*self.members, "*"}
        if unknown:
            raise UsageError(f"bts.trainable names {sorted(unknown)}; the members are {', '.join(self.members)}")

    @property
    def members(self) -> tuple[str, ...]:
        """Names of all members, the hub first."""
        return (HUB, *self.experts)


HUB = "hub"
"""Name of member 0, whose output is the model's output."""
