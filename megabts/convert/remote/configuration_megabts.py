"""The configuration of a stitched model in transformers: its members' own ones, and the form of its stitches."""

from typing import Any

from transformers import PretrainedConfig

SIZES = ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings")


class MegaBTSConfig(PretrainedConfig):
    """Members in order, the hub first: `member_names`, and of each the dictionary of its transformers configuration.

    `stitch_points`: [after how many layers, "hub_into_experts" or "experts_into_hub"] of every stitch layer, in order.
    Lists and not dictionaries, as transformers sorts a dictionary's keys when it saves.

    `num_hidden_layers` counts the layers of a cache: one for every layer of every member, and one more where the output
    reads evidence. `member_layers` is the members' own number.

    `member_folders`, `member_hashes`: where the members' weights are, if they are not in the model's own folder.
    """

    model_type = "megabts_bts"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers' own name

    def __init__(
        self,
        member_names: list[str] | None = None,
        member_configs: list[dict[str, Any]] | None = None,
        stitch_points: list[list[Any]] | None = None,
        expert_stream: str = "projected",
        start: str = "uniform",
        gate: str = "dimension",
        gate_input: str = "raw",
        projection_rank: int = 0,
        output: str = "hub",
        evidence: int = 0,
        member_folders: list[str] | None = None,
        member_hashes: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.member_names = member_names or []
        self.member_configs = member_configs or []
        self.stitch_points = stitch_points or []
        self.expert_stream = expert_stream
        self.start = start
        self.gate = gate
        self.gate_input = gate_input
        self.projection_rank = projection_rank
        self.output = output
        self.evidence = evidence
        self.member_folders = member_folders
        self.member_hashes = member_hashes
        hub = self.member_configs[0] if self.member_configs else {}
        sizes = {key: hub[key] for key in SIZES if key in hub}
        layers = self.member_layers * len(self.member_names) + (1 if evidence else 0)
        # Each member's head is tied to its embedding, or not, in its own configuration.
        fixed = {**sizes, "num_hidden_layers": layers, "tie_word_embeddings": False}
        super().__init__(**{**kwargs, **fixed})

    @property
    def member_layers(self) -> int:
        """Layers of one member."""
        return self.member_configs[0]["num_hidden_layers"] if self.member_configs else 0
