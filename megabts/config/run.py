"""One run's configuration: nested dataclasses, one section each; every class checks only itself.

`megabts.config.load` reads a YAML file and `--section.key value` overrides into a `RunConfig`.
"""

from dataclasses import dataclass, field
from typing import Literal

from megabts.config.methods import BTMConfig, BTSConfig, MoEConfig, RoutingConfig
from megabts.config.model import ModelConfig
from megabts.errors import UsageError


def _at_least(least: int, section: object, name: str, *fields: str) -> None:
    for key in fields:
        if getattr(section, key) < least:
            raise UsageError(f"{name}.{key} is {getattr(section, key)}; it must be at least {least}")


@dataclass
class ParallelConfig:
    """Degrees of the mesh axes (pp, dp, ep, tp); data parallelism takes the ranks that remain."""

    tensor: int = 1
    """Tensor-parallel ranks."""
    sequence: bool = False
    """Sequence parallelism: norms and residual stream are split over the sequence among the tensor-parallel ranks."""
    pipeline: int = 1
    """Pipeline ranks."""
    schedule: Literal["none", "1f1b", "interleaved"] = "1f1b"
    """Order of work in a pipeline: none (one micro-batch after the other), 1f1b, or interleaved 1f1b over `chunks`."""
    chunks: int = 1
    """Stages that each pipeline rank holds with schedule=interleaved: rank r has stages r, r + pipeline, ..."""
    cuts: list[int] = field(default_factory=list)
    """Layers before each boundary between stages, pipeline * chunks - 1 ascending numbers; empty: balanced by cost."""
    expert: int = 1
    """Expert-parallel ranks: of a BTS model members side by side, of mixtures ffn experts, on different samples."""
    exchange: Literal["auto", "gather", "reduce"] = "auto"
    """How Experts-into-Hub layers meet over expert ranks: the hub gathers every expert's state, or sums are reduced
    to it, whose bytes do not grow with the number of experts. auto: gather up to 3 experts."""
    bucket_mb: int = 100
    """Size of a gradient bucket, MB of fp32: its reduction starts as soon as backward has filled it."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Communication library; auto is nccl on GPUs and gloo on CPU."""
    timeout: int = 300
    """Seconds without progress after which a run of several ranks ends; four times that at the start and in saves."""

    def __post_init__(self) -> None:
        _at_least(1, self, "parallel", "tensor", "pipeline", "chunks", "expert", "bucket_mb", "timeout")
        if self.chunks > 1 and (self.schedule != "interleaved" or self.pipeline == 1):
            raise UsageError(
                f"parallel.chunks is {self.chunks}, which needs parallel.schedule interleaved and parallel.pipeline "
                "above 1; set them, or leave it at 1"
            )
        if self.schedule == "interleaved" and self.chunks == 1:
            raise UsageError(
                "parallel.schedule interleaved needs several layer chunks a rank; set parallel.chunks, or schedule 1f1b"
            )
        if self.cuts and (len(self.cuts) != self.num_stages - 1 or sorted(self.cuts) != self.cuts):
            raise UsageError(
                f"parallel.cuts is {self.cuts}; {self.num_stages} stages (pipeline {self.pipeline} x chunks "
                f"{self.chunks}) need as many cuts as boundaries ({self.num_stages - 1}), ascending; mend them, or "
                "leave them out for balanced ones"
            )

    @property
    def num_stages(self) -> int:
        """Stages of the whole pipeline."""
        return self.pipeline * self.chunks


@dataclass
class DataConfig:
    """Indexed datasets (.bin/.idx), blended for training and kept apart per domain for validation."""

    train: dict[str, float] = field(default_factory=dict)
    """Training datasets: {path prefix: weight}; weights are normalised."""
    valid: dict[str, str] = field(default_factory=dict)
    """Validation datasets: {domain: path prefix}; each is evaluated by itself."""
    split: str = "100,0,0"
    """Megatron's train,valid,test percentages of each training dataset's sequences."""
    seq_length: int = 64
    """Tokens per training sample."""
    seed: int = 1234
    """Seed of the document and sample shuffles, and of the blend's index."""
    cache: str = ""
    """Folder for index caches; empty: no cache."""
    tokenizer: str = ""
    """Tokenizer: a .model file, a tokenizer.json or its folder, `bytes`, or `null:VOCAB`. Saved with checkpoints."""
    eod_mask_loss: bool = False
    """Leave the end-of-document token out of the loss as an input position."""

    def __post_init__(self) -> None:
        _at_least(1, self, "data", "seq_length")


@dataclass
class OptimizerConfig:
    """AdamW and the learning-rate schedule."""

    lr: float = 3e-3
    """Peak learning rate."""
    min_lr_ratio: float = 0.1
    """Final learning rate as a share of the peak."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Decay after warm-up; wsd: warm-up, stable, decay over the last wsd_decay of the steps."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    wsd_decay: float = 0.2
    """Share of the steps that schedule=wsd decays over."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; vectors (norms, biases) have none."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 leaves gradients as they are."""
    skip_sigma: float = 6.0
    """Skip a step whose loss or gradient norm is this many standard deviations above its recent mean; 0 skips only
    what is not finite. Three such steps in a row end the run."""
    lr_scale: dict[str, float] = field(default_factory=dict)
    """Learning-rate factor by parameter-name pattern, first match wins: {"head.*": 0.1}; 0 freezes."""
    library: Literal["auto", "torch"] = "auto"
    """Whose fused AdamW kernel steps on a GPU: Transformer Engine's, else NVIDIA apex's, else torch's; or torch's."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise UsageError(f"optimizer.lr is {self.lr}; it must be positive")
        for name in ("min_lr_ratio", "beta1", "beta2"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"optimizer.{name} is {getattr(self, name)}; it must lie in [0, 1]")
        if not 0 < self.wsd_decay <= 1:
            raise UsageError(f"optimizer.wsd_decay is {self.wsd_decay}; it is a share of the steps in (0, 1]")
        _at_least(0, self, "optimizer", "warmup_steps", "weight_decay", "clip_grad", "skip_sigma")


@dataclass
class TrainConfig:
    """Length, batch and memory of the run."""

    steps: int = 100
    """Optimizer steps of the whole run."""
    global_batch: int = 8
    """Samples per step over all data-parallel ranks and micro-batches."""
    micro_batch: int = 8
    """Samples per forward pass on one rank; gradients accumulate up to the global batch."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in backward: none; selective (attention and MLP activation); full (whole layers)."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether element-wise work is compiled into few passes over memory (torch.compile): auto does so where a compiler
    is found and the run is long enough to pay for it, 1000 steps."""
    seed: int = 0
    """Seed of the initial weights and of dropout."""
    valid_every: int = 0
    """Steps between validations; 0 validates at the end only, -1 never."""
    valid_samples: int = 64
    """Samples per domain and validation."""

    def __post_init__(self) -> None:
        _at_least(1, self, "train", "steps", "global_batch", "micro_batch", "valid_samples")
        _at_least(-1, self, "train", "valid_every")


@dataclass
class CheckpointConfig:
    """Where a run is kept, and what it starts from."""

    dir: str = ""
    """Run folder for checkpoints, logs and TensorBoard; empty: nothing is written."""
    every: int = 0
    """Steps between checkpoints; 0 saves at the end only."""
    keep: int = 2
    """Newest checkpoints kept; 0 keeps all."""
    save_fail: Literal["continue", "stop"] = "continue"
    """When a checkpoint cannot be written (disk full): go on training with a warning, or end the run."""
    resume: bool = False
    """Continue this very run from the newest checkpoint in dir; starts anew when dir has none."""
    force_resume: bool = False
    """Resume although settings that change the data or the schedule differ from the checkpoint's."""
    asynchronous: bool = True
    """Write checkpoints beside the training: it waits only while tensors are copied to main memory."""
    init_from: str = ""
    """Start a new run from another checkpoint's or Hugging Face folder's weights; step, optimizer, data begin at 0."""

    def __post_init__(self) -> None:
        _at_least(0, self, "checkpoint", "every", "keep")


@dataclass
class PrecisionConfig:
    """Number formats."""

    dtype: Literal["auto", "float64", "float32", "bfloat16"] = "float32"
    """Weights and activations; bfloat16 keeps fp32 masters in the optimizer. auto: bfloat16 where the hardware
    multiplies it natively. float64 is for comparisons."""
    frozen: Literal["same", "bfloat16"] = "same"
    """Frozen members, and hidden states with them: same as dtype, or bfloat16, which keeps half of float32's bytes and
    where the hardware multiplies it natively is faster. What trains stays in dtype."""
    layers: Literal["torch", "te"] = "torch"
    """Layer library: plain PyTorch, or NVIDIA's Transformer Engine (GPU)."""
    fp8: Literal["none", "current", "delayed", "block"] = "none"
    """FP8 matrix products in the linears, by how they are scaled. Layers of torch have `current`, in frozen members
    alone; te all, in all linears."""

    def __post_init__(self) -> None:
        if self.fp8 not in ("none", "current") and self.layers != "te":
            raise UsageError(
                f"precision.fp8 {self.fp8} needs Transformer Engine; set precision.layers te, or precision.fp8 current"
            )
        if self.fp8 != "none" and self.dtype == "float64":
            raise UsageError(f"precision.fp8 {self.fp8} has no results in float64; set precision.dtype bfloat16")


@dataclass
class LoggingConfig:
    """What is reported, and where."""

    every: int = 1
    """Steps between log lines."""
    tensorboard: bool = True
    """Write TensorBoard events below checkpoint.dir."""
    adam_every: int = 0
    """Steps between reports of Adam's health per layer (update norm, cosine to the gradient, bimodality); 0: never."""
    progress: bool = False
    """Show a progress bar in place of log lines."""

    def __post_init__(self) -> None:
        _at_least(1, self, "logging", "every")
        _at_least(0, self, "logging", "adam_every")


@dataclass
class RunConfig:
    """Everything one run needs to know."""

    method: Literal["dense", "bts", "moe", "btm", "routing"] = "dense"
    """What is trained: a dense decoder, the stitches of a BTS model, a decoder of mixtures of ffn experts (BTX), or a
    router between members. btm, an ensemble, is not trained."""
    model: ModelConfig = field(default_factory=ModelConfig)
    bts: BTSConfig = field(default_factory=BTSConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    btm: BTMConfig = field(default_factory=BTMConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
