"""Whether a run fits a number of ranks: every degree against every size, before any memory is taken.

Each refusal is one line with the arithmetic. What cannot go wrong here (a degree below 1) the configuration refuses.
"""

from megabts.config.run import RunConfig
from megabts.errors import UsageError
from megabts.parallel.balance import check_cuts
from megabts.parallel.mesh import degrees

FROZEN = ("bts", "routing")
"""Methods that train beside frozen members."""


def check_layout(config: RunConfig, world_size: int) -> None:
    """Raise UsageError when the run's sizes do not divide as its parallel degrees ask on `world_size` ranks."""
    _, dp, ep, _ = degrees(config.parallel, world_size)
    dp *= ep if config.method == "moe" else 1  # whose ep ranks take different samples
    _check_side_by_side(config)
    _check_tensor(config)
    _check_frozen(config)
    _check_fp8(config)
    _check_expert(config)
    _check_batch(config, dp)
    _check_pipeline(config, dp)


def check_generation(config: RunConfig) -> None:
    """The same for generation, which has neither batches nor a pipeline."""
    for axis in ("tensor", "expert"):
        degree = getattr(config.parallel, axis)
        if config.method in ("btm", "routing") and degree > 1:
            raise UsageError(f"parallel.{axis} is {degree}, but method {config.method} runs on one rank; leave it at 1")
    _check_tensor(config)
    _check_expert(config)


def num_microbatches(config: RunConfig, dp: int) -> int:
    """Micro-batches that each rank runs in a step."""
    return config.train.global_batch // (config.train.micro_batch * dp)


def _check_side_by_side(config: RunConfig) -> None:
    """Members that nothing stitches run on one rank, as a batch's rows go to different ones."""
    if config.method == "btm":
        raise UsageError("method btm has nothing to train; tools/merge.py btm makes it, tools/evaluate.py runs it")
    for axis in ("tensor", "pipeline", "expert"):
        degree = getattr(config.parallel, axis)
        if config.method == "routing" and degree > 1:
            raise UsageError(f"parallel.{axis} is {degree}, but method routing runs data-parallel only; leave it at 1")


def _check_tensor(config: RunConfig) -> None:
    tp, model = config.parallel.tensor, config.model
    if tp == 1 and config.parallel.sequence:
        raise UsageError(
            "parallel.sequence is true, but parallel.tensor is 1 and there is nobody to share a sequence with; set "
            "parallel.sequence false or raise parallel.tensor"
        )
    if tp == 1:
        return
    if config.method == "moe" and config.moe.ffn_width(model.ffn_size) % tp:
        width = config.moe.ffn_width(model.ffn_size)
        raise UsageError(f"ffn experts of width {width} do not divide among parallel.tensor {tp} ranks; take fewer")
    for name in ("num_heads", "ffn_size", "hidden_size"):
        size = getattr(model, name)
        if size % tp:
            raise UsageError(f"model.{name} {size} does not divide among parallel.tensor {tp} ranks; {_divisors(size)}")
    kv_heads = model.num_kv_heads
    if kv_heads % tp and tp % kv_heads:
        raise UsageError(
            f"parallel.tensor {tp} neither divides model.num_kv_heads {kv_heads} nor is a multiple of it; "
            f"{_divisors(kv_heads)}, or a multiple of {kv_heads}"
        )
    block = -(-model.vocab_size // tp)
    if block * (tp - 1) >= model.vocab_size:
        raise UsageError(
            f"model.vocab_size {model.vocab_size} in blocks of {block} is used up before the last of parallel.tensor "
            f"{tp} ranks; take fewer"
        )
    if config.parallel.sequence and config.data.seq_length % tp:
        raise UsageError(
            f"data.seq_length {config.data.seq_length} does not divide among parallel.tensor {tp} ranks, as "
            "parallel.sequence needs; change it or set parallel.sequence false"
        )


def _check_frozen(config: RunConfig) -> None:
    if config.precision.frozen != "same" and config.method not in FROZEN:
        raise UsageError(
            f"precision.frozen {config.precision.frozen} is for frozen members, and method {config.method} has none; "
            "leave it at same"
        )


def _check_fp8(config: RunConfig) -> None:
    """Both sides of every matrix in an FP8 product are multiples of 16 on every rank; what is gathered along the
    sequence in blocks of 128, multiples of 128."""
    parallel, model, train, fp8 = config.parallel, config.model, config.train, config.precision.fp8
    if fp8 == "none":
        return
    of_torch = config.precision.layers == "torch"
    if of_torch and config.method not in FROZEN:
        raise UsageError(
            f"precision.fp8 {fp8} with layers of torch is for frozen members, and method {config.method} has none; set "
            "precision.layers te, or precision.fp8 none"
        )
    tp, seq = parallel.tensor, config.data.seq_length
    slices = tp if parallel.sequence and not of_torch else 1  # torch gathers the sequence before it rounds
    gathered = 128 if fp8 == "block" and slices > 1 else 16
    heads = sum(max(1, heads // tp) for heads in model.qkv_heads)
    needs = [
        (f"model.hidden_size {model.hidden_size}", model.hidden_size, gathered),
        (f"model.ffn_size {model.ffn_size} / parallel.tensor {tp}", model.ffn_size // tp, 16),
        (f"{model.num_heads // tp} heads of {model.head_dim}", model.num_heads // tp * model.head_dim, 16),
        (f"{heads} query, key and value heads of {model.head_dim}", heads * model.head_dim, 16),
        (
            f"train.micro_batch {train.micro_batch} x data.seq_length {seq} / {slices} slices",
            train.micro_batch * seq // slices,
            gathered,
        ),
    ]
    if config.method == "bts" and not of_torch:  # the stitches' linears
        needs.append((f"model.hidden_size {model.hidden_size} / parallel.tensor {tp}", model.hidden_size // tp, 16))
    for name, size, multiple in needs:
        if size % multiple:
            raise UsageError(
                f"precision.fp8 {fp8} needs multiples of {multiple} on every rank, and {name} = {size}; change it, or "
                "set precision.fp8 none"
            )


def _divisors(size: int) -> str:
    fitting = [number for number in range(2, min(size, 64) + 1) if size % number == 0]
    return f"parallel.tensor may be {', '.join(map(str, [1, *fitting]))}"


def _check_expert(config: RunConfig) -> None:
    ep = config.parallel.expert
    if ep == 1:
        return
    if config.method == "dense":
        raise UsageError(f"parallel.expert is {ep}, but a dense model has no experts; leave it at 1")
    if config.method == "moe":
        count = config.moe.num_ffn_experts
        if count % ep:
            fitting = ", ".join(str(number) for number in range(1, count + 1) if count % number == 0)
            raise UsageError(
                f"{count} ffn experts do not divide among parallel.expert {ep} ranks; parallel.expert may be {fitting}"
            )
        return
    members = config.bts.members
    if ep > len(members):
        raise UsageError(
            f"parallel.expert {ep} is more than the {len(members)} members ({', '.join(members)}); take fewer"
        )


def _check_batch(config: RunConfig, dp: int) -> None:
    micro, whole = config.train.micro_batch, config.train.global_batch
    if whole % (micro * dp):
        raise UsageError(
            f"train.global_batch {whole} is not a multiple of train.micro_batch {micro} x {dp} data-parallel ranks = "
            f"{micro * dp}; change one of them"
        )


def _check_pipeline(config: RunConfig, dp: int) -> None:
    parallel, layers = config.parallel, config.model.num_layers
    if parallel.cuts:
        check_cuts(parallel.cuts, layers, parallel.num_stages)
    if parallel.num_stages > layers + 2:
        raise UsageError(
            f"parallel.pipeline {parallel.pipeline} x parallel.chunks {parallel.chunks} = {parallel.num_stages} stages "
            f"are more than {layers} layers, the embedding and the head"
        )
    count = num_microbatches(config, dp)
    if parallel.chunks > 1 and count % parallel.pipeline:
        raise UsageError(
            f"schedule interleaved needs micro-batches in multiples of parallel.pipeline {parallel.pipeline}; "
            f"train.global_batch {config.train.global_batch} / train.micro_batch {config.train.micro_batch} / {dp} "
            f"data-parallel ranks = {count}; change one of them, or set parallel.chunks 1"
        )
