"""dlrm's flags: taken, without effect, refused; and never against an explicit override."""

from collections.abc import Callable

import pytest
import yaml
from click.testing import Result

from dqrm.cli.dlrm_flags import FLAGS
from dqrm.config import RunConfig
from dqrm.configuration import describe_fields, load

Run = Callable[..., Result]

# The published command line for Criteo Kaggle, the raw file aside, which is prepared first.
KAGGLE = [
    "--arch-sparse-feature-size=16",
    "--arch-mlp-bot=13-512-256-64-16",
    "--arch-mlp-top=512-256-1",
    "--data-generation=dataset",
    "--data-set=kaggle",
    "--processed-data-file=prepared/kaggle",
    "--loss-function=bce",
    "--round-targets=True",
    "--learning-rate=0.1",
    "--mini-batch-size=128",
    "--print-freq=1024",
    "--print-time",
    "--test-mini-batch-size=16384",
    "--test-num-workers=16",
    "--test-freq=10240",
]


def resolved(result: Result) -> RunConfig:
    assert result.exit_code == 0, result.stderr
    return RunConfig.model_validate(yaml.safe_load(result.stdout))


def test_the_published_command_line_gives_the_published_model(dqrm: Run) -> None:
    config = resolved(dqrm("train", "--print-config", *KAGGLE))
    expected = load(
        RunConfig,
        None,
        [
            "model.embedding_dim=16",
            "model.bottom_mlp=[512, 256, 64]",
            "model.top_mlp=[512, 256]",
            "data.path=prepared/kaggle",
            "optim.lr=0.1",
            "data.batch_size=128",
            "train.log_every=1024",
            "train.eval_batch_size=16384",
            "train.eval_every=10240",
        ],
    )
    assert config == expected


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        (["--nepochs", "3"], "train.epochs", 3),
        (["--numpy-rand-seed=727"], "train.seed", 727),
        (["--lr-num-warmup-steps=5"], "optim.warmup_steps", 5),
        (["--lr-decay-start-step=7"], "optim.decay_start_step", 7),
        (["--lr-num-decay-steps=9"], "optim.decay_steps", 9),
        (["--arch-interaction-op=cat"], "model.interaction", "cat"),
        (["--arch-interaction-itself"], "model.interaction_itself", True),
        (["--optimizer=rwsadagrad"], "optim.name", "adagrad"),
        (["--optimizer=rwsadagrad"], "optim.eps", 1e-10),
        (["--optimizer=sgd"], "optim.name", "sgd"),
        (["--num-batches=50"], "train.max_steps", 50),
        (["--num-batches=0"], "train.max_steps", None),
        (["--data-randomize=none"], "data.shuffle", False),
        (["--data-randomize=total"], "data.shuffle", True),
        (["--arch-mlp-bot=13-16"], "model.bottom_mlp", ()),
    ],
)
def test_a_flag_sets_a_key(dqrm: Run, flags: list[str], key: str, value: object) -> None:
    place: object = resolved(dqrm("train", "--print-config", *flags))
    for part in key.split("."):
        place = getattr(place, part)
    assert place == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--raw-data-file=train.txt"], "dqrm data prepare"),
        (["--max-ind-range=10000000"], "hash_buckets"),
        (["--quantize-emb-with-bit=4"], "use quant.bits"),
        (["--use-gpu"], "trains on CPUs"),
        (["--inference-only"], "dqrm eval"),
        (["--mlperf-auc-threshold=0.8"], "--min-auc"),
        (["--data-generation=random"], "dqrm data synth"),
        (["--loss-function=mse"], "the loss is binary cross-entropy"),
        (["--optimizer=adagrad"], "--optimizer=rwsadagrad"),
        (["--optimizer=adam"], "must be sgd or rwsadagrad"),
        (["--arch-mlp-bot=13"], "expected widths"),
        (["--arch-mlp-bot=13-a-16"], "expected widths"),
        (["--arch-mlp-top=512-256"], "the last width must be 1"),
        (["--processed-data-file=kaggle.npz"], "folders written by `dqrm data prepare`"),
        (["--data-randomize=day"], "data.shuffle"),
        (["--test-freq=-1"], "leave the flag out"),
        (["--num-batches=many"], "must be a whole number"),
        (["--mini-batch-size=128", "data.batch_size=64"], "give only one of them"),
        (["--no-track", "tracking.enabled=true"], "give only one of them"),
        (["--run-name=a", "name=b"], "give only one of them"),
        (["--learning-rate=fast"], "optim.lr=fast: must be a number"),
    ],
)
def test_what_is_not_taken_says_what_to_use(dqrm: Run, arguments: list[str], message: str) -> None:
    result = dqrm("train", "--print-config", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_the_same_value_twice_is_no_contradiction(dqrm: Run) -> None:
    result = dqrm("train", "--print-config", "--learning-rate=1e-1", "optim.lr=0.10")
    assert resolved(result).optim.lr == 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch-mlp-bot=7-64-32"], "ends in 32, but its last width is model.embedding_dim=16"),
        (["--num-batches=5", "--nepochs=2"], "use train.max_steps"),
        (["--arch-mlp-bot=1313-64-16"], "begins with 1313, but census has"),
    ],
)
def test_flags_are_held_against_data_and_model(
    dqrm: Run, arguments: list[str], message: str
) -> None:
    result = dqrm("train", "--dry-run", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_flags_without_effect_are_named(dqrm: Run) -> None:
    result = dqrm("train", "--dry-run", "--print-time", "--data-set=kaggle", "train.max_steps=1")
    assert result.exit_code == 0, result.stderr
    assert "without effect, as it is always so: --print-time --data-set" in result.stderr


def test_flags_are_out_of_sight_but_listed_on_request(dqrm: Run) -> None:
    assert "--mini-batch-size" not in dqrm("train", "--help").stdout
    listed = dqrm("train", "--help-dlrm")
    assert listed.exit_code == 0
    for flag in FLAGS:
        assert flag.name in listed.stdout
        assert flag.meaning in listed.stdout


def test_flags_that_set_a_key_name_an_existing_one() -> None:
    keys = {field.path for field in describe_fields(RunConfig)}
    named = [
        flag.meaning.partition(",")[0].partition(":")[0]
        for flag in FLAGS
        if flag.action is not None and not flag.meaning.startswith("no effect")
    ]
    assert len(named) == 19
    assert set(named) <= keys
