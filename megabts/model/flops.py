"""Model FLOPs per token: the one definition that logs, benchmark and planner share.

A multiply-add is two operations. Counted are the matrix multiplications with weights (2 x their parameters per token)
and attention's two products (4 x sequence length x query width per token; half of that where causality is credited).
The input embedding is a lookup and costs nothing; norms, rotations, gates' element-wise work and recomputation are not
model FLOPs. Published figures differ by the causal factor, so it is an argument.

A trained part costs its forward three times: forward, activation gradients, weight gradients. A frozen part that
passes gradient costs it twice, a frozen part upstream of every trainable weight once, and a part that nothing reads is
not run. Attention has no weights, so its real backward costs two forwards of activation gradients; booking one of them
as "weight gradient" is exact for trained layers and one attention forward short for frozen ones.
"""

from dataclasses import dataclass

from megabts.config.model import ModelConfig


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per token of one training step, by what they compute."""

    forward: float = 0.0
    backward_activation: float = 0.0
    backward_weight: float = 0.0

    @property
    def total(self) -> float:
        """All operations of one training step, per token."""
        return self.forward + self.backward_activation + self.backward_weight

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            self.forward + other.forward,
            self.backward_activation + other.backward_activation,
            self.backward_weight + other.backward_weight,
        )


def layer_flops(config: ModelConfig, seq_length: int, *, causal: bool = True) -> float:
    """Forward operations of one Transformer layer per token, in sequences of `seq_length` tokens."""
    query_width = config.num_heads * config.head_dim
    qkv_width = sum(config.qkv_heads) * config.head_dim
    weights = config.hidden_size * (qkv_width + query_width + 3 * config.ffn_size)
    attention = 4 * seq_length * query_width
    return 2 * weights + (attention / 2 if causal else attention)


def head_flops(config: ModelConfig) -> float:
    """Forward operations of the output head per token, for the unpadded vocabulary."""
    return 2 * config.hidden_size * config.vocab_size


def dense_flops(config: ModelConfig, seq_length: int, *, causal: bool = True) -> Flops:
    """Operations per token of training one dense decoder: 2P + attention forward, three times that in all."""
    forward = config.num_layers * layer_flops(config, seq_length, causal=causal) + head_flops(config)
    return Flops(forward, forward, forward)
