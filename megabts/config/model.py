"""Sizes and options of one decoder of the Llama family and its relatives, and the presets.

Every member of a BTS model has one `ModelConfig`; all members of one model share the same one. The class checks
only itself; whether it fits a mesh is the mesh's business.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from megabts.errors import UsageError

ROPE_SCALING_KEYS: dict[str, set[str]] = {
    "linear": {"type", "factor"},
    "llama3": {"type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position"},
    "yarn": {"type", "factor", "original_max_position", "beta_fast", "beta_slow", "attention_factor", "truncate"},
}


@dataclass
class ModelConfig:
    """Sizes of one decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    preset: str = ""
    """Named sizes that the other fields of this section override: tiny, 125m, 1b, paper-2.7b, llama-3-8b."""
    vocab_size: int = 512
    """Number of token ids; unpadded."""
    hidden_size: int = 64
    """Width D of the residual stream."""
    num_layers: int = 4
    """Transformer layers L."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int = 2
    """Key/value heads; num_heads for multi-head, 1 for multi-query attention."""
    head_dim: int = 0
    """Width of one head; 0 means hidden_size / num_heads."""
    ffn_size: int = 176
    """Width of the SwiGLU feed-forward matrices (after the 2/3 scaling where a paper gives the unscaled figure)."""
    max_seq_len: int = 2048
    """Longest sequence, in tokens, that generation and the importer accept."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: dict[str, Any] = field(default_factory=dict)
    """Rotary scaling: {} | {type: linear, factor} | {type: llama3, factor, low_freq_factor, high_freq_factor,
    original_max_position} | {type: yarn, factor, original_max_position, beta_fast, beta_slow, attention_factor,
    truncate (true or false)}."""
    norm_eps: float = 1e-5
    """Epsilon of every RMSNorm."""
    tie_embeddings: bool = False
    """The output head shares the embedding's weight."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections."""
    qk_norm: bool = False
    """RMSNorm of queries and keys before the rotation."""
    qk_norm_span: Literal["head", "full"] = "head"
    """What qk_norm norms: each head by itself (Qwen3), or all query heads of a position, and all key heads, together
    (OLMo-2)."""
    norm_position: Literal["pre", "post"] = "pre"
    """A layer's two RMSNorms are on what attention and feed-forward read (pre), or on their outputs (post: OLMo-2)."""
    cross_document_attention: bool = True
    """Documents packed into one sequence attend to each other; false keeps each to itself."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; output projections use init_std / sqrt(2 num_layers)."""

    def __post_init__(self) -> None:
        if self.head_dim == 0 and self.num_heads > 0:
            if self.hidden_size % self.num_heads:
                raise UsageError(
                    f"model.hidden_size {self.hidden_size} is not a multiple of model.num_heads {self.num_heads}; "
                    "change one of them or set model.head_dim"
                )
            self.head_dim = self.hidden_size // self.num_heads
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise UsageError(
                f"model.num_heads {self.num_heads} is not a multiple of model.num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UsageError(f"model.head_dim {self.head_dim} is odd; rotary positions need an even one")
        if self.qk_norm_span == "full" and not self.qk_norm:
            raise UsageError("model.qk_norm_span is full, but model.qk_norm is false; set it true, or the span to head")
        self._check_rope_scaling()

    def _check_rope_scaling(self) -> None:
        if not self.rope_scaling:
            return
        kind = self.rope_scaling.get("type")
        if not isinstance(kind, str) or kind not in ROPE_SCALING_KEYS:
            raise UsageError(f"model.rope_scaling type {kind!r} is unknown; use one of {sorted(ROPE_SCALING_KEYS)}")
        if set(self.rope_scaling) != ROPE_SCALING_KEYS[kind]:
            keys = sorted(ROPE_SCALING_KEYS[kind])
            raise UsageError(f"model.rope_scaling of type {kind} needs exactly the keys {keys}")
        for key, value in self.rope_scaling.items():
            if key == "truncate":
                if not isinstance(value, bool):
                    raise UsageError(f"model.rope_scaling.truncate is {value!r}; it must be true or false")
            elif key != "type" and (isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0):
                raise UsageError(f"model.rope_scaling.{key} is {value!r}; it must be a positive number")

    @property
    def qkv_heads(self) -> tuple[int, int, int]:
        """Heads in the fused query-key-value projection: (query, key, value)."""
        return (self.num_heads, self.num_kv_heads, self.num_kv_heads)

    @property
    def num_parameters(self) -> int:
        """Number of parameters, embeddings included, counted once when tied."""
        d, hd = self.hidden_size, self.head_dim
        qkv = sum(self.qkv_heads) * hd
        layer = qkv * d + self.num_heads * hd * d + 3 * d * self.ffn_size + 2 * d
        normed = 2 if self.qk_norm_span == "head" else self.num_heads + self.num_kv_heads
        layer += qkv * self.qkv_bias + normed * hd * self.qk_norm
        return self.num_layers * layer + d + self.vocab_size * d * (1 if self.tie_embeddings else 2)


_LLAMA3 = {"rope_theta": 500_000.0, "max_seq_len": 8192}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "125m": {
        "vocab_size": 32_000,
        "hidden_size": 768,
        "num_layers": 12,
        "num_heads": 12,
        "num_kv_heads": 12,
        "ffn_size": 2048,
    },
    "1b": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "num_layers": 16,
        "num_heads": 32,
        "num_kv_heads": 8,
        "ffn_size": 8192,
        "tie_embeddings": True,
        **_LLAMA3,
    },
    "paper-2.7b": {
        "vocab_size": 128_000,
        "hidden_size": 3072,
        "num_layers": 20,
        "num_heads": 24,
        "num_kv_heads": 1,
        "ffn_size": 8192,
        **_LLAMA3,
    },
    "llama-3-8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 8,
        "ffn_size": 14_336,
        **_LLAMA3,
    },
}
"""Sizes by name. `paper-2.7b` is the seed of the BTS paper (arXiv 2502.00075): 2,689,723,392 parameters."""
