"""How members are combined: the sections beside `model` that describe a method."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from megabts.errors import UsageError


@dataclass
class BTSConfig:
    """Branch-Train-Stitch (arXiv 2502.00075): which members, where the stitch layers sit, how they start."""

    hub: str = ""
    """Folder of the hub: a megabts checkpoint or a Hugging Face folder. Usually the seed; any member may be."""
    experts: dict[str, str] = field(default_factory=dict)
    """Experts by name, each with its folder: {code: DIR, math: DIR}."""
    num_stitch_layers: int = 4
    """Stitch layers K: one after every floor(L/K) layers, the last one always after layer L."""
    placement: list[int] = field(default_factory=list)
    """Layers, counted from 1, that a stitch layer follows: K in ascending order, the last one L. Empty: spaced evenly,
    as num_stitch_layers says (paper)."""
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
    gate: Literal["dimension", "token"] = "dimension"
    """What a gate is: a vector of hidden_size per member and token (paper), or one number."""
    gate_input: Literal["raw", "normalised"] = "raw"
    """What gates read: the hub's state as it is (paper), or divided by its root mean square."""
    projection_rank: int = 0
    """Rank r of the projections I + U V, U of hidden_size x r, zero at the start; 0: full matrices (paper)."""
    output: Literal["hub", "mixture"] = "hub"
    """What the model answers with: the hub's head (paper), or the members' probabilities through their own heads,
    mixed per token by a trained gate."""
    evidence: int = 0
    """With output=mixture: how many tokens back the gate reads how likely each member found them; 0: none."""
    trainable: list[str] = field(default_factory=lambda: ["*"])
    """Which members' projections and gate slices train: member names or "*" for all."""

    def __post_init__(self) -> None:
        if self.num_stitch_layers < 1:
            raise UsageError(f"bts.num_stitch_layers is {self.num_stitch_layers}; it must be at least 1")
        self._check_placement()
        if self.evidence < 0 or (self.evidence and self.output != "mixture"):
            raise UsageError(
                f"bts.evidence is {self.evidence} with bts.output {self.output}; it is a number of tokens, of a mixture"
            )
        if self.projection_rank < 0:
            raise UsageError(f"bts.projection_rank is {self.projection_rank}; give a rank, or 0 for full matrices")
        if not 0 <= self.gate_dropout < 1:
            raise UsageError(f"bts.gate_dropout is {self.gate_dropout}; it must lie in [0, 1)")
        for name in self.experts:
            if name == HUB or not name.replace("-", "_").isidentifier():
                raise UsageError(f"bts.experts has a member named {name!r}; use letters, digits, - and _, not 'hub'")

    def _check_placement(self) -> None:
        places = self.placement
        if places and (places[0] < 1 or places != sorted(set(places))):
            raise UsageError(f"bts.placement is {places}; give layers from 1 on, each once, in ascending order")
        if places and len(places) != self.num_stitch_layers:
            raise UsageError(
                f"bts.placement {places} has {len(places)} layers, but bts.num_stitch_layers is "
                f"{self.num_stitch_layers}; set bts.num_stitch_layers {len(places)}, or another placement"
            )

    def check_trainable(self) -> None:
        """Raise UsageError when `trainable` names someone who is no member."""
        unknown = set(self.trainable) - {*self.members, "*"}
        if unknown:
            raise UsageError(f"bts.trainable names {sorted(unknown)}; the members are {', '.join(self.members)}")

    @property
    def members(self) -> tuple[str, ...]:
        """Names of all members, the hub first."""
        return (HUB, *self.experts)


FORMS: dict[str, dict[str, Any]] = {
    "bts": {},
    "bts-mixture": {
        "output": "mixture",
        "evidence": 64,
        "gate_input": "normalised",
        "expert_stream": "unchanged",
    },
}
"""Named forms of the stitches, as settings that differ from the defaults: the paper's, and the best found here."""

Routing = Literal["topk", "switch", "soft", "sample"]
"""How a MoE layer's router chooses ffn experts: see `megabts.moe.router`."""


@dataclass
class MoEConfig:
    """Mixtures of experts (Branch-Train-MiX, sparse upcycling, Branch-Attend-Mix): what their layers are made of.

    arXiv 2403.07816, 2212.05055 and 2408.08274."""

    members: dict[str, str] = field(default_factory=dict)
    """Members by name, each with the folder it came from, the seed first. The model holds all weights itself."""
    routing: Routing = "topk"
    """Which ffn experts a token goes through: the top_k likeliest, one weighted by its probability (switch), all
    weighted (soft), or one that is sampled (sample)."""
    top_k: int = 2
    """Of each token, with routing=topk: how many ffn experts."""
    balance: float = 0.01
    """Weight alpha of the load balancing loss alpha N sum_i u_i p_i of each layer; 0: none."""
    split: int = 1
    """Chunks C that each member's feed-forward is cut into: members x C ffn experts of width ffn_size / C."""
    blend: bool = False
    """Every ffn expert is made of one chunk of every member, not of one member's."""
    freeze_ffn_experts: bool = False
    """Train routers and everything shared, but not the ffn experts."""
    first_layer_soft: bool = True
    """With routing=sample, the first layer is soft, as in the paper."""
    attention_experts: bool = False
    """Each member's attention is an attention expert behind a router of its own, soft (BAM); false: their average."""
    adapters: bool = False
    """Every expert's output passes a linear adapter; these and the routers alone train. Needs attention_experts."""

    def __post_init__(self) -> None:
        if self.adapters and not self.attention_experts:
            raise UsageError("moe.adapters is for members that stay whole; set moe.attention_experts true too")
        if self.top_k < 1 or self.split < 1:
            raise UsageError(f"moe.top_k is {self.top_k} and moe.split {self.split}; both must be at least 1")
        if self.balance < 0:
            raise UsageError(f"moe.balance is {self.balance}; it must be at least 0")
        if self.members and self.routing == "topk" and self.top_k > self.num_ffn_experts:
            raise UsageError(f"moe.top_k is {self.top_k}, more than the {self.num_ffn_experts} ffn experts; lower it")

    @property
    def num_ffn_experts(self) -> int:
        """N, of each layer."""
        return len(self.members) * self.split

    @property
    def ffn_expert_names(self) -> list[str]:
        """Of each: its member, with the chunk's number where it has several; a number where members are blended."""
        if self.blend:
            return [str(number) for number in range(self.num_ffn_experts)]
        return [f"{name}.{n}" if self.split > 1 else name for name in self.members for n in range(self.split)]

    def ffn_width(self, ffn_size: int) -> int:
        """Width of one ffn expert. Raises UsageError when the members' width does not divide, or there are none."""
        pieces = self.num_ffn_experts if self.blend else self.split
        if not self.members or ffn_size % pieces:
            raise UsageError(
                f"model.ffn_size {ffn_size} does not divide into {pieces} chunks of {len(self.members)} moe.members; "
                "change moe.split, moe.blend or moe.members"
            )
        return ffn_size // self.split

    def routing_of(self, layer: int) -> Routing:
        """The routing of one layer."""
        return "soft" if self.routing == "sample" and self.first_layer_soft and layer == 0 else self.routing

    def active(self, layer: int) -> int:
        """How many ffn experts of a layer a token runs through."""
        counts = {"topk": self.top_k, "switch": 1, "sample": 1, "soft": self.num_ffn_experts}
        return counts[self.routing_of(layer)]


@dataclass
class BTMConfig:
    """Branch-Train-Merge (arXiv 2208.03306): members whose next-token probabilities are mixed. It is not trained."""

    members: dict[str, str] = field(default_factory=dict)
    """Members by name, each with its folder; none is special."""
    top_k: int = 0
    """Mix only the k members that are likeliest at a position; 0: all."""

    def __post_init__(self) -> None:
        if self.top_k < 0:
            raise UsageError(f"btm.top_k is {self.top_k}; give a number of members, or 0 for all")
        _check_names("btm", self.members)


@dataclass
class RoutingConfig:
    """Expert routing: a linear router gives each text to one member."""

    members: dict[str, str] = field(default_factory=dict)
    """Members by name, each with its folder. The router reads embeddings of the first one: the seed, if it is in."""
    min_tokens: int = 32
    """In training the router reads the first t tokens of a sequence, t uniform from this ..."""
    max_tokens: int = 256
    """... to this. Of an evaluation window it reads so many, of a prompt all."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_tokens <= self.max_tokens:
            raise UsageError(
                f"routing.min_tokens is {self.min_tokens} and routing.max_tokens {self.max_tokens}; they must be at "
                "least 1 and in ascending order"
            )
        _check_names("routing", self.members)


def _check_names(section: str, names: Iterable[str]) -> None:
    for name in names:
        if not name.replace("-", "_").isidentifier():
            raise UsageError(f"{section}.members has a member named {name!r}; use letters, digits, - and _")


HUB = "hub"
"""Name of member 0, whose output is the model's output."""
