"""What a Branch-Train-Stitch run hands to its report: plain records that go to JSON and back.

A report is kept as data first (`Report.to_dict`) and drawn second, so a page can be drawn again without training again.
Every record checks its own shape when it is made. Losses are in nats per token. Limit: all of it is held in memory,
tokens of the coloured texts included, so give some hundred tokens per text and not a corpus.
"""

from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from megabts.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Self

AVERAGE = "average"


class Record:
    """A dataclass that goes to a JSON-ready dictionary and back."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Self":
        """The record that `to_dict` was called on, also after a trip through JSON.

        Raises UserError when a field is unknown or missing.
        """
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        if set(data) != known:
            odd = ", ".join(sorted(set(data) ^ known))
            raise UserError(f"{cls.__name__}: unknown or missing fields: {odd}; was it written by another version?")
        return cls(**data)


@dataclass
class Curve(Record):
    """The losses of one training run.

    `steps`, `tokens` (seen by this run up to and including the step) and `losses` (training loss) have one entry per
    logged step; `valid` has (step, loss) pairs per domain.
    """

    name: str
    steps: list[int]
    tokens: list[int]
    losses: list[float]
    valid: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not len(self.steps) == len(self.tokens) == len(self.losses):
            raise UserError(
                f"curve '{self.name}': {len(self.steps)} steps, {len(self.tokens)} token counts and "
                f"{len(self.losses)} losses; give one of each per logged step"
            )
        self.valid = {domain: [(step, loss) for step, loss in points] for domain, points in self.valid.items()}


@dataclass
class SweepPoint(Record):
    """One learning rate tried for the dense model (the seed, trained on with the stitches' data), with its losses."""

    learning_rate: float
    losses: dict[str, float]
    average: float
    chosen: bool


@dataclass
class GateTable(Record):
    """Mean gate weights, `values[layer][member][domain]` in 0..1; None where a member has no gate.

    A layer's name says where it sits and what it is: "layer 2, Hub-into-Experts" or "layer 4, Experts-into-Hub".
    """

    layers: list[str]
    members: list[str]
    domains: list[str]
    values: list[list[list[float | None]]]

    def __post_init__(self) -> None:
        rows = [row for layer in self.values for row in layer]
        fits = len(self.values) == len(self.layers) and all(len(layer) == len(self.members) for layer in self.values)
        if not fits or any(len(row) != len(self.domains) for row in rows):
            raise UserError(
                f"gate table: values are not {len(self.layers)} layers x {len(self.members)} members x "
                f"{len(self.domains)} domains"
            )


@dataclass
class TokenText(Record):
    """One validation text: per token the last gate's mean weight of each member (tokens x members)."""

    domain: str
    tokens: list[str]
    weights: list[list[float]]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.weights):
            raise UserError(f"text from '{self.domain}': {len(self.tokens)} tokens but {len(self.weights)} weight rows")


@dataclass
class Report(Record):
    """Everything the page shows.

    `models` maps a model's name (seed, expert-*, soup, dense-data-matched, bts) to its validation loss per domain and
    under "average"; `seconds` and `tokens` go by stage; `checks` are (claim, holds?, the numbers behind it).
    """

    title: str
    domains: list[str]
    models: dict[str, dict[str, float]]
    seconds: dict[str, float]
    tokens: dict[str, int]
    curves: list[Curve]
    sweep: list[SweepPoint]
    gates: GateTable
    texts: list[TokenText]
    settings: dict[str, str]
    checks: list[tuple[str, bool, str]]

    def __post_init__(self) -> None:
        columns = [*self.domains, AVERAGE]
        for kind, name, losses in [
            *(("model", name, losses) for name, losses in self.models.items()),
            *(("sweep", f"{point.learning_rate:g}", {**point.losses, AVERAGE: 0.0}) for point in self.sweep),
        ]:
            missing = [column for column in columns if column not in losses]
            if missing:
                raise UserError(f"report: {kind} '{name}' has no loss for {', '.join(missing)}")
        members = len(self.gates.members)
        for text in self.texts:
            if any(len(row) != members for row in text.weights):
                raise UserError(f"report: text from '{text.domain}' needs one weight for each of {members} members")
        self.checks = [(claim, holds, numbers) for claim, holds, numbers in self.checks]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Self":
        nested: dict[str, Any] = {}
        for key, kind in (("curves", Curve), ("sweep", SweepPoint), ("texts", TokenText)):
            nested[key] = [kind.from_dict(item) for item in data.get(key, [])]
        if "gates" in data:
            nested["gates"] = GateTable.from_dict(data["gates"])
        return super().from_dict({**data, **{key: value for key, value in nested.items() if key in data}})
