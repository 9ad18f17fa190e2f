"""The flags of facebookresearch/dlrm's dlrm_s_pytorch.py, taken where they mean the same.

Each known flag either becomes a dotted override, has no effect because this is what dqrm always
does, or is refused with what to use instead. The meanings were read off dlrm_s_pytorch.py.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from dqrm.cli.options import Function

if TYPE_CHECKING:
    from dqrm.config import RunConfig

_META = "dqrm.dlrm"


@dataclass
class Given:
    """What the dlrm flags on a command line amount to."""

    overrides: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Value as YAML, and the flag it came from, by dotted key."""
    num_dense: int | None = None
    """First number of --arch-mlp-bot: dense columns the data must have."""
    bottom_output: int | None = None
    """Last number of --arch-mlp-bot: must equal model.embedding_dim."""
    steps_per_epoch: int | None = None
    """--num-batches; it bounds every epoch, train.max_steps the whole run."""
    without_effect: list[str] = field(default_factory=list)
    """Flags that ask for what happens anyway."""

    def set(self, flag: str, key: str, value: str) -> None:
        """Remember ``key=value``; two flags may not disagree."""
        if self.overrides.get(key, (value, flag))[0] != value:
            before, other = self.overrides[key]
            raise click.UsageError(f"{other} sets {key}={before}, but {flag} sets {key}={value}")
        self.overrides[key] = (value, flag)


@dataclass(frozen=True)
class Flag:
    """One flag of dlrm."""

    name: str
    meaning: str
    """The dotted key it sets, or why it has no effect, or what to use instead."""
    action: Callable[[Given, str], None] | None
    """None refuses the flag."""
    switch: bool = False
    """Whether the flag stands alone, without a value."""


def _key(flag: str, key: str, positive: bool = True) -> Flag:
    def action(given: Given, text: str) -> None:
        if positive and text.startswith("-"):
            raise click.UsageError(
                f"{flag}={text}: leave the flag out for dqrm's default of {key}, or give a "
                "positive number"
            )
        given.set(flag, key, text)

    return Flag(flag, key, action)


def _nothing(flag: str, why: str, *values: str, switch: bool = False) -> Flag:
    """A flag without effect, for some values only where ``values`` are given."""

    def action(given: Given, text: str) -> None:
        if values and text.lower() not in values:
            raise click.UsageError(f"{flag}={text}: not offered; {why}")
        given.without_effect.append(flag)

    return Flag(flag, f"no effect: {why}", action, switch)


def _refused(flag: str, instead: str, switch: bool = False) -> Flag:
    return Flag(flag, instead, None, switch)


def _widths(flag: str, text: str) -> list[int]:
    try:
        widths = [int(part) for part in text.split("-")]
    except ValueError:
        widths = []
    if len(widths) < 2 or min(widths) < 1:
        raise click.UsageError(f"{flag}={text}: expected widths such as 13-512-256-64-16")
    return widths


def _bottom(given: Given, text: str) -> None:
    given.num_dense, *hidden, given.bottom_output = _widths("--arch-mlp-bot", text)
    given.set("--arch-mlp-bot", "model.bottom_mlp", str(hidden))


def _top(given: Given, text: str) -> None:
    *hidden, last = _widths("--arch-mlp-top", text)
    if last != 1:
        raise click.UsageError(f"--arch-mlp-top={text}: the last width must be 1, the click logit")
    given.set("--arch-mlp-top", "model.top_mlp", str(hidden))


def _optimizer(given: Given, text: str) -> None:
    if text == "sgd":
        given.set("--optimizer", "optim.name", "sgd")
    elif text == "rwsadagrad":
        given.set("--optimizer", "optim.name", "adagrad")
        given.set("--optimizer", "optim.eps", "1e-10")  # the default of its RWSAdagrad
    elif text == "adagrad":
        raise click.UsageError(
            "--optimizer=adagrad keeps one accumulator per weight in dlrm; dqrm keeps one per "
            "embedding row: use --optimizer=rwsadagrad, or optim.name=adagrad"
        )
    else:
        raise click.UsageError(f"--optimizer={text}: must be sgd or rwsadagrad")


def _interaction_itself(given: Given, text: str) -> None:
    given.set("--arch-interaction-itself", "model.interaction_itself", "true")


def _batches(given: Given, text: str) -> None:
    if not text.isdigit():
        raise click.UsageError(f"--num-batches={text}: must be a whole number; 0 means all")
    if int(text):
        given.steps_per_epoch = int(text)
        given.set("--num-batches", "train.max_steps", text)


def _processed(given: Given, text: str) -> None:
    if text.endswith((".npz", ".bin")):
        raise click.UsageError(
            f"--processed-data-file={text}: dqrm reads folders written by `dqrm data prepare`; "
            "prepare the raw file and give that folder"
        )
    given.set("--processed-data-file", "data.path", text)


def _randomize(given: Given, text: str) -> None:
    if text not in ("total", "none"):
        raise click.UsageError(
            f"--data-randomize={text}: use data.shuffle=true, with data.window_rows rows mixed "
            "at a time, or data.shuffle=false"
        )
    given.set("--data-randomize", "data.shuffle", "true" if text == "total" else "false")


_PREPARE = "give it to `dqrm data prepare` and train on the folder it writes (data.path)"
_TABLES = "tables come from the data: set hash_buckets or max_size of a column in its schema"
_SYNTH = "dlrm's random data cannot be learnt; `dqrm data synth` makes data that can"
_ONE_PROCESS = "this version trains in one process"
_BATCHES = "batches are cut from memory-mapped files without worker processes"
_GATE = "`dqrm eval RUN --min-auc X` exits with 3 below X; train.patience stops early"

FLAGS: tuple[Flag, ...] = (
    _key("--mini-batch-size", "data.batch_size"),
    _key("--test-mini-batch-size", "train.eval_batch_size"),
    _key("--nepochs", "train.epochs"),
    _key("--learning-rate", "optim.lr"),
    _key("--arch-sparse-feature-size", "model.embedding_dim"),
    Flag("--arch-mlp-bot", "model.bottom_mlp, without the first and the last width", _bottom),
    Flag("--arch-mlp-top", "model.top_mlp, without the last width", _top),
    _key("--arch-interaction-op", "model.interaction"),
    Flag("--arch-interaction-itself", "model.interaction_itself", _interaction_itself, True),
    Flag("--optimizer", "optim.name: sgd, or rwsadagrad for adagrad", _optimizer),
    _key("--test-freq", "train.eval_every"),
    _key("--print-freq", "train.log_every"),
    _key("--numpy-rand-seed", "train.seed"),
    _key("--lr-num-warmup-steps", "optim.warmup_steps"),
    _key("--lr-decay-start-step", "optim.decay_start_step"),
    _key("--lr-num-decay-steps", "optim.decay_steps"),
    Flag("--num-batches", "train.max_steps, with one epoch", _batches),
    Flag("--processed-data-file", "data.path, a folder of `dqrm data prepare`", _processed),
    Flag("--data-randomize", "data.shuffle: total or none", _randomize),
    _nothing("--data-generation", _SYNTH, "dataset"),
    _nothing("--data-set", "the prepared data knows its format", "kaggle", "terabyte"),
    _nothing("--loss-function", "the loss is binary cross-entropy", "bce"),
    _nothing("--round-targets", "labels are 0 or 1", "true", "1"),
    _nothing("--activation-function", "hidden layers are ReLU", "relu"),
    _nothing("--sync-dense-params", _ONE_PROCESS),
    _nothing("--num-workers", _BATCHES),
    _nothing("--test-num-workers", _BATCHES),
    _nothing("--memory-map", "data is always memory-mapped", switch=True),
    _nothing("--print-time", "speed is always logged", switch=True),
    _nothing("--print-wall-time", "-v logs with times", switch=True),
    _nothing("--mlperf-logging", "AUC is always logged", switch=True),
    _refused("--arch-embedding-size", _TABLES),
    _refused("--max-ind-range", _TABLES),
    _refused("--raw-data-file", _PREPARE),
    _refused("--dataset-multiprocessing", "`dqrm data prepare` works in parallel", True),
    _refused("--data-sub-sample-rate", "sub-sample the raw rows before `dqrm data prepare`"),
    _refused("--mlperf-bin-loader", _PREPARE, True),
    _refused("--mlperf-bin-shuffle", "use data.shuffle=true", True),
    _refused("--data-size", _SYNTH),
    _refused("--num-indices-per-lookup", _SYNTH),
    _refused("--num-indices-per-lookup-fixed", _SYNTH),
    _refused("--rand-data-dist", _SYNTH),
    _refused("--rand-data-min", _SYNTH),
    _refused("--rand-data-max", _SYNTH),
    _refused("--rand-data-mu", _SYNTH),
    _refused("--rand-data-sigma", _SYNTH),
    _refused("--data-trace-file", _SYNTH),
    _refused("--data-trace-enable-padding", _SYNTH),
    _refused("--quantize-emb-with-bit", "use quant.bits; dqrm trains at that precision"),
    _refused("--quantize-mlp-with-bit", "use quant.mlp_bits; dqrm trains at that precision"),
    _refused("--loss-weights", "the loss is plain binary cross-entropy"),
    _refused("--loss-threshold", "predictions are not clipped; the loss works on logits"),
    _refused("--weighted-pooling", "pooling has no learnt weights; see model.pooling"),
    _refused("--md-flag", "mixed dimensions are not offered; see model.embedding_dim", True),
    _refused("--md-threshold", "mixed dimensions are not offered"),
    _refused("--md-temperature", "mixed dimensions are not offered"),
    _refused("--md-round-dims", "mixed dimensions are not offered", True),
    _refused("--qr-flag", f"quotient-remainder tables are not offered; {_TABLES}", True),
    _refused("--qr-threshold", f"quotient-remainder tables are not offered; {_TABLES}"),
    _refused("--qr-operation", f"quotient-remainder tables are not offered; {_TABLES}"),
    _refused("--qr-collisions", f"quotient-remainder tables are not offered; {_TABLES}"),
    _refused("--inference-only", "use `dqrm eval RUN`", True),
    _refused("--load-model", "use --resume to go on, `dqrm eval` to measure"),
    _refused("--save-model", "every run saves its checkpoints and its packed model"),
    _refused("--save-onnx", "the packed model is the export of this version", True),
    _refused("--use-gpu", "dqrm trains on CPUs", True),
    _refused("--dist-backend", _ONE_PROCESS),
    _refused("--local_rank", _ONE_PROCESS),
    _refused("--print-precision", "numbers are logged with the digits that matter"),
    _refused("--debug-mode", "use --debug for tracebacks, -v for details", True),
    _refused("--enable-profiling", "use torch.profiler around dqrm.training", True),
    _refused("--plot-compute-graph", "not offered", True),
    _refused("--tensor-board-filename", "curves are in MLflow: `dqrm ui`"),
    _refused("--mlperf-acc-threshold", _GATE),
    _refused("--mlperf-auc-threshold", _GATE),
    _refused("--mlperf-grad-accum-iter", "use a larger data.batch_size"),
)


def dlrm_options(command: Function) -> Function:
    """Add the flags to a command, out of sight of its help."""
    for flag in FLAGS:
        command = click.option(
            flag.name,
            hidden=True,
            expose_value=False,
            is_flag=flag.switch,
            default=None,
            callback=_collect(flag),
        )(command)
    return command


def _collect(flag: Flag) -> Any:
    def callback(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
        if value is None or value is False or ctx.resilient_parsing:
            return
        if flag.action is None:
            raise click.UsageError(f"{flag.name} of dlrm is not taken: {flag.meaning}")
        given = ctx.meta.setdefault(_META, Given())
        flag.action(given, str(value))

    return callback


def given_flags(ctx: click.Context) -> Given:
    """What the flags on this command line amount to."""
    given = ctx.meta.get(_META)
    return given if isinstance(given, Given) else Given()


def merge(given: Given, overrides: Iterable[str]) -> list[str]:
    """Return the overrides of the flags followed by the explicit ones.

    Raises click.UsageError where a flag and an override set one key to different values.
    """
    from dqrm.yaml_text import parse_value

    explicit = list(overrides)
    for argument in explicit:
        key, _, value = argument.partition("=")
        if key in given.overrides:
            flag_value, flag = given.overrides[key]
            if parse_value(flag_value) != parse_value(value):
                raise click.UsageError(
                    f"{flag} sets {key}={flag_value}, but the override sets {argument}; "
                    "give only one of them"
                )
    return [f"{key}={value}" for key, (value, _) in given.overrides.items()] + explicit


def check(given: Given, config: "RunConfig") -> None:
    """Hold what the flags say of the data and the model against the resolved configuration.

    Raises click.UsageError for the first disagreement.
    """
    if given.bottom_output not in (None, config.model.embedding_dim):
        raise click.UsageError(
            f"--arch-mlp-bot ends in {given.bottom_output}, but its last width is "
            f"model.embedding_dim={config.model.embedding_dim} "
            "(--arch-sparse-feature-size)"
        )
    if given.steps_per_epoch is not None and config.train.epochs > 1:
        raise click.UsageError(
            f"--num-batches={given.steps_per_epoch} bounds every epoch in dlrm; with "
            f"train.epochs={config.train.epochs} use train.max_steps, which bounds the whole run"
        )
    if given.num_dense is not None:
        from dqrm.data.dataset import PreparedDataset

        dataset = PreparedDataset.open(config.data.path)
        if given.num_dense != dataset.num_dense:
            raise click.UsageError(
                f"--arch-mlp-bot begins with {given.num_dense}, but {config.data.path} has "
                f"{dataset.num_dense} dense columns"
            )


def help_text() -> str:
    """One line for each flag: what it sets, or what to use instead."""
    width = max(len(flag.name) for flag in FLAGS)
    taken = [f"  {f.name:<{width}}  {f.meaning}" for f in FLAGS if f.action is not None]
    refused = [f"  {f.name:<{width}}  {f.meaning}" for f in FLAGS if f.action is None]
    return "\n".join(["Flags of dlrm that are taken:", *taken, "", "Not taken:", *refused])
