"""A dense decoder's parts: parameters of the real modules, and what the torch backend's layers keep and move.

What a layer keeps, in elements per position (D hidden, F feed-forward, q and k the widths of this rank's query and key
heads; sigma is 1 / tp under sequence parallelism, else 1; M where the weights train, else 0):

    attention norm    sigma D, and sigma M D of its output
    attention         q + k rotated, v, out and the logsumexp; grouped keys and values are repeated to the query heads
                      (2 q in place of v's q + 2 k, which is the projection's whole output)
    feed-forward      sigma D, sigma M D, 2 F / tp, M F / tp

    selective         attention keeps q + 2 k and M q instead;   full: sigma D for the whole layer

On a GPU attention is PyTorch's flash kernel, which keeps the same tensors as the CPU's. A frozen layer keeps something
only if it passes gradient; else nothing.

Element-wise work is counted from the backend's kernels, each of which reads and writes memory: a norm's forward is five
passes partly in fp32. A library that fuses them moves less.
"""

from functools import cache
from typing import Literal

import torch

from megabts.config.model import ModelConfig
from megabts.config.run import RunConfig
from megabts.model.layer import Layer
from megabts.model.torch_backend import TorchBackend
from megabts.parallel.mesh import Axis
from megabts.planner.work import Parts, Work, rows, slice_share, value_bytes

NORM_BYTES = (28.0, 92.0)
"""Per element of a bf16 norm, forward and backward: casts to fp32, squares, products, sums."""
ROTATE_BYTES = (12.0, 12.0)
SWIGLU_BYTES = (10.0, 26.0)
"""Per element of F."""
ADD_BYTES = (6.0, 6.0)
"""Per element of a residual, and of its gradient."""
LOGIT_BYTES = 50.0
"""Per logit: casts, maximum, exponentials, sums; all of it in forward."""
CHUNK = 1024
"""Positions whose logits exist at once."""


def decoder_parts(config: RunConfig, ep_rank: int = 0) -> Parts:
    """A decoder that trains whole."""
    model = config.model
    layer = layer_work(config, trains=True, passes=True)
    embedding, head, tied = embedding_work(config, trains=True), head_work(config, trains=True, passes=True), 0
    if model.tie_embeddings:
        tied = vocabulary_elements(config)
    return Parts(embedding, (layer,) * model.num_layers, head, tied, _largest(config))


def layer_work(config: RunConfig, *, trains: bool, passes: bool) -> Work:
    """One layer of one member; `passes`: its input needs a gradient."""
    count, matrices = layer_parameters(model_key(config.model), config.parallel.tensor)
    everywhere, share = rows(config), slice_share(config)
    d, value = config.model.hidden_size, value_bytes(config)
    if config.precision.fp8 == "current" and not trains:  # a byte an element, and one in the transposed copy
        count -= matrices - matrices * (1 + passes) // value
    entry = share * everywhere * d * value if passes else 0.0
    query, key = head_widths(config)
    moved = _layer_moved(config, query + key)
    sent = tensor_bytes(config, d)
    backward = trains or passes
    full = config.train.recompute == "full" and backward
    forward_moved = moved[0] * everywhere
    backward_moved = (moved[1] * everywhere + full * forward_moved) if backward else 0.0
    # Forward: two sums over tp. Backward: two; under sequence parallelism a trained linear's input is gathered again.
    # Recomputation ends before the layer's last sum.
    sequence = config.parallel.sequence
    times = (2 + full * (1.5 if sequence else 1) + trains * sequence) if backward else 0
    return Work(
        parameters=count,
        trainable=count if trains else 0,
        kept=layer_kept(config, trains=trains) if passes else 0.0,
        entry=entry,
        working=_layer_working(config, trains=trains, passes=backward),
        again=_again(config) if backward else 0.0,
        moved=(forward_moved, backward_moved),
        tensor=(2 * sent, times * sent),
    )


def layer_kept(config: RunConfig, *, trains: bool, recompute: str | None = None) -> float:
    """Bytes that a layer which passes gradient keeps; `recompute` None: as configured."""
    recompute = recompute or config.train.recompute
    value, everywhere, share = value_bytes(config), rows(config), slice_share(config)
    d, f = config.model.hidden_size, config.model.ffn_size / config.parallel.tensor
    if recompute == "full":
        return everywhere * share * d * value
    heads, scales = attention_kept(config, trains=trains, recompute=recompute)
    elements = 2 * share * d * (1 + trains) + 2 * f + trains * f + heads
    return everywhere * (elements * value + scales + 2 * share * 4)


def attention_kept(config: RunConfig, *, trains: bool, recompute: str) -> tuple[float, float]:
    """What an attention keeps per position from its projection on: (elements, bytes of fp32 figures besides)."""
    model, (query, key) = config.model, head_widths(config)
    if recompute == "selective":
        return query + 2 * key + trains * query, 0.0
    repeated, scales = query > key, 4 * query / model.head_dim
    if not model.qk_norm:
        return query + key + (2 * query if repeated else query + 2 * key) + query, scales
    scales += 8 if model.qk_norm_span == "full" else 4 * (query + key) / model.head_dim
    elements = query + 2 * key  # the projection's output, which the norms read
    return elements + (3 * query if repeated else query + key) + query, scales


def embedding_work(config: RunConfig, *, trains: bool) -> Work:
    """The embedding of one member: a lookup, summed over tp."""
    count, everywhere, d = vocabulary_elements(config), rows(config), config.model.hidden_size
    value, tp = value_bytes(config), config.parallel.tensor
    tokens = (8 if tp == 1 else 17) * everywhere if trains else 0.0
    gradient, half = count * value if trains else 0.0, tensor_bytes(config, d) / 2
    return Work(
        parameters=count,
        trainable=count if trains else 0,
        kept=tokens,
        working=everywhere * d * value + gradient,
        moved=(2 * everywhere * d * value, gradient),
        tensor=(half, trains * half) if config.parallel.sequence else (2 * half, 0.0),
    )


def head_work(config: RunConfig, *, trains: bool, passes: bool) -> Work:
    """Final norm, head and loss, whose gradients exist from forward on; tied embeddings are `Parts.tied`."""
    model, everywhere, share = config.model, rows(config), slice_share(config)
    d, value, vocabulary = model.hidden_size, value_bytes(config), vocabulary_elements(config)
    count = d + (0 if model.tie_embeddings else vocabulary)
    entry = share * everywhere * d * value if passes else 0.0
    kept = entry + passes * everywhere * (share * 4 + d * value) + trains * 4 * vocabulary
    logits = min(CHUNK, everywhere) * vocabulary / d
    working = logits * (2 * value + 8) + 2 * everywhere * d * value + trains * vocabulary * (4 + value)
    norm = [everywhere * share * d * passed * value / 2 for passed in NORM_BYTES]
    sent = tensor_bytes(config, d)
    gradient = trains * vocabulary * (4 + 4 + 4 + value)
    return Work(
        parameters=count,
        trainable=count if trains else 0,
        kept=kept,
        entry=entry,
        working=working,
        moved=(norm[0] + everywhere * vocabulary / d * LOGIT_BYTES, (norm[1] if passes else 0.0) + gradient),
        tensor=(sent / 2, passes * sent / 2) if config.parallel.sequence else (0.0, passes * sent),
    )


def tensor_bytes(config: RunConfig, width: float) -> float:
    """Bytes a rank sends to sum [s, b, width] over tp: an all-reduce, or a gather and a scatter of half of it each.

    Rings: 2 (tp - 1) / tp of the tensor for an all-reduce. Under sequence parallelism forward does both halves, too.
    """
    tp = config.parallel.tensor
    return 2 * (tp - 1) / tp * rows(config) * width * value_bytes(config)


def vocabulary_elements(config: RunConfig) -> int:
    """Of [V, D], on the first tensor-parallel rank."""
    return -(-config.model.vocab_size // config.parallel.tensor) * config.model.hidden_size


ModelKey = tuple[int, int, int, int, int, bool, bool, Literal["head", "full"]]
"""What a layer's shapes depend on: D, heads, key/value heads, head's width, F, biases, norms of heads and of what."""


def model_key(model: ModelConfig) -> ModelKey:
    """The sizes of a layer."""
    return (
        model.hidden_size,
        model.num_heads,
        model.num_kv_heads,
        model.head_dim,
        model.ffn_size,
        model.qkv_bias,
        model.qk_norm,
        model.qk_norm_span,
    )


@cache
def layer_parameters(key: ModelKey, tp: int) -> tuple[int, int]:
    """Elements of a real layer's parameters on a tensor-parallel rank: all, and those of its linears' matrices."""
    d, heads, kv_heads, head_dim, ffn, bias, norm, span = key
    model = ModelConfig(
        hidden_size=d,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_size=ffn,
        qkv_bias=bias,
        qk_norm=norm,
        qk_norm_span=span,
    )
    layer = Layer(model, TorchBackend(torch.float32, "meta", Axis("tp", tp)), "none")
    sizes = [(parameter.numel(), parameter.dim()) for parameter in layer.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, dims in sizes if dims == 2)


def head_widths(config: RunConfig) -> tuple[float, float]:
    """Widths of this rank's query heads and of its key heads; it has one of the latter at least."""
    model, tp = config.model, config.parallel.tensor
    return model.num_heads * model.head_dim / tp, max(1, model.num_kv_heads // tp) * model.head_dim


def _layer_moved(config: RunConfig, turned: float) -> tuple[float, float]:
    """Bytes per position, forward and backward."""
    model, value, share = config.model, value_bytes(config), slice_share(config)
    d, f = model.hidden_size, model.ffn_size / config.parallel.tensor
    sums = [
        2 * share * d * (norm + add) + turned * rotate + f * swiglu
        for norm, add, rotate, swiglu in zip(NORM_BYTES, ADD_BYTES, ROTATE_BYTES, SWIGLU_BYTES, strict=True)
    ]
    return sums[0] * value / 2, sums[1] * value / 2


def _layer_working(config: RunConfig, *, trains: bool, passes: bool) -> float:
    """The feed-forward, in forward (2 F and F) or backward (their gradients and a product), and a weight's gradient.

    What recomputation makes anew lives then, too.
    """
    model, value, tp = config.model, value_bytes(config), config.parallel.tensor
    activations = rows(config) * value * (2 * model.hidden_size + 5 * model.ffn_size / tp)
    weight = 2 * model.ffn_size * model.hidden_size / tp * value if trains else 0.0
    again = 0.0
    if passes and config.train.recompute == "full":
        again = layer_kept(config, trains=trains, recompute="none")
    elif passes and config.train.recompute == "selective":
        again = rows(config) * value * 5 * model.num_heads * model.head_dim / tp
    return activations + weight + again


def _again(config: RunConfig) -> float:
    """Attention's products, run again under selective recomputation, on this rank; causal."""
    if config.train.recompute != "selective":
        return 0.0
    width = config.model.num_heads * config.model.head_dim / config.parallel.tensor
    return rows(config) * 2 * config.data.seq_length * width


def _largest(config: RunConfig) -> int:
    model, tp = config.model, config.parallel.tensor
    return max(vocabulary_elements(config), 2 * model.ffn_size * model.hidden_size // tp)
