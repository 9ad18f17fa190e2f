"""How to optimize, how long, when to evaluate and what to keep."""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from dqrm.settings import Settings


class OptimConfig(Settings):
    """Optimizer of the dense parameters and of the embedding rows, and the rate schedule."""

    name: Literal["sgd", "adagrad", "adam"] = "sgd"
    """adagrad keeps one accumulator a row for embeddings; adam updates touched rows only."""

    lr: PositiveFloat = 0.1
    """Learning rate after warm-up."""

    embedding_lr: PositiveFloat | None = None
    """Learning rate of the embedding rows; lr when not given."""

    eps: PositiveFloat = 1e-8
    """Added to the denominator of adagrad and adam."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of adam's first and second moment."""

    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of the MLP weights, in units of the learning rate."""

    embedding_weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of embedding rows, applied when a row is looked up."""

    warmup_steps: NonNegativeInt = 0
    """Steps over which the rate rises linearly from 0 to lr."""

    decay_start_step: NonNegativeInt = 0
    """First step of the polynomial (power 2) decay; no decay while decay_steps is 0."""

    decay_steps: NonNegativeInt = 0
    """Length of the decay to zero in steps."""

    clip_norm: PositiveFloat | None = None
    """Largest L2 norm of the whole gradient, embedding rows included; None does not clip."""


class TrainingConfig(Settings):
    """Length of training, evaluation, selection and threads."""

    epochs: PositiveInt = 1
    """Passes over the training split."""

    max_steps: PositiveInt | None = None
    """Stop after this many steps, whatever the epoch."""

    seed: NonNegativeInt = 0
    """Seeds initialisation, the order of rows and dropout."""

    warm_start: Path | None = None
    """Begin with the model, and the optimizer's state, of this run or checkpoint; its data must
    have been the base of this data (`dqrm data prepare --base`), or the same."""

    eval_every: PositiveInt | None = None
    """Steps between validations; one validation per epoch when not given."""

    eval_batch_size: PositiveInt = 16384
    """Rows per batch in validation and test."""

    select: Literal["auc", "log_loss"] = "auc"
    """Validation metric that chooses the model to keep."""

    patience: PositiveInt | None = None
    """Stop after this many validations without a better model; None never stops early."""

    precision: Literal["fp32", "bf16", "int8"] = "fp32"
    """What the MLPs multiply in; weights, sums, updates and all else stay FP32. bf16: operands
    rounded to bfloat16, where the processor multiplies those faster. int8: quantized layers of 32
    or more inputs and 2 or more outputs multiply 8-bit codes forward and backward, with gradients
    rounded stochastically, other layers are as in bf16; needs quant.mlp_bits 4 or 8 and
    quant.activation_bits 32."""

    optimize: Literal["default", "ipex"] = "default"
    """ipex: the MLPs go through Intel Extension for PyTorch, which wants torch 2.8."""

    threads: PositiveInt | None = None
    """Threads to compute with; the cores this process may really use when not given."""

    log_every: PositiveInt = 100
    """Steps between logged training losses."""


class CheckpointConfig(Settings):
    """What is kept to resume from."""

    every_steps: PositiveInt | None = None
    """Steps between checkpoints; None leaves it to every_minutes and epoch ends."""

    every_minutes: PositiveFloat | None = 10.0
    """Minutes between checkpoints; None leaves it to every_steps and epoch ends."""

    keep_last: PositiveInt = 2
    """Checkpoints kept, besides the best one."""


class DataConfig(Settings):
    """The prepared data set and how it is read."""

    path: str = "census"
    """Folder written by `dqrm data prepare`, or the name of the built-in example, census."""

    batch_size: PositiveInt = 2048
    """Rows per training batch."""

    shuffle: bool = True
    """Visit the training rows in a new order every epoch, fixed by the seed."""

    window_rows: PositiveInt = Field(default=1 << 20)
    """Rows held in memory and shuffled together; larger mixes better and uses more memory."""


class ExchangeConfig(Settings):
    """What processes that train together send each other; without effect in a single one."""

    backend: Literal["auto", "ccl", "gloo", "ccl-intel"] = "auto"
    """ccl: oneCCL. gloo: torch's own. auto: oneCCL where every process can load it, else Gloo.
    ccl-intel: Intel's oneccl_bindings_for_pytorch, made for older torch."""

    rows: Literal["fp32", "bf16", "int8", "int4"] = "int8"
    """Gradients of touched embedding rows; int8 and int4 have a scale a row."""

    placement: Literal["auto", "replicate", "shard"] = "auto"
    """replicate: every process has all embedding tables. shard: tables of more than
    shard_over_rows rows are shared out, whole or by ranges of rows. auto: shard where the tables
    and their optimizer state do not fit into the memory of every process."""

    shard_over_rows: NonNegativeInt = 100_000
    """Rows up to which a table is replicated when tables are sharded."""

    vectors: Literal["fp32", "bf16", "int8"] = "bf16"
    """Pooled vectors of sharded tables; int8 has a scale a vector. Evaluation sends FP32."""

    vector_gradients: Literal["fp32", "bf16", "int8"] = "int8"
    """Gradients of pooled vectors of sharded tables; int8 has a scale a vector and is rounded
    stochastically."""

    dense: Literal["fp32", "bf16", "fp16", "int8", "int4", "sign"] = "int8"
    """Gradients of the MLPs; int8 and int4 have a scale a block, sign is one bit a value."""

    error_feedback: bool = True
    """Add what the dense codec lost to the next step's gradients."""

    residual_rows: NonNegativeInt | None = None
    """Rows whose loss is kept for when they come again; None keeps up to 262,144 with rows=int4
    and none otherwise, where stochastic rounding is right on average."""

    warmup_steps: NonNegativeInt = 0
    """Steps at the beginning that exchange in FP32."""

    timeout_seconds: PositiveFloat = 600.0
    """How long to wait for another process before the run fails and names it."""
