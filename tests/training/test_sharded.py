"""Runs whose large tables are shared out among processes: the result is that of one process."""

import json
from pathlib import Path

import pytest
import torch
from backends_here import CCL
from safetensors.torch import load_file
from worlds import run_ranks

from dqrm.config import RunConfig
from dqrm.data.dataset import PreparedDataset
from dqrm.training.build import sizes_of
from dqrm.training.checkpoint import list_checkpoints, read_checkpoint
from dqrm.training.evaluate import evaluate
from dqrm.training.saved import load_saved
from dqrm.training.sharding import describe, plan

PLAIN = {"rows": "fp32", "dense": "fp32", "vectors": "fp32", "vector_gradients": "fp32"}


def settings(path, output, name, **sections):
    config = {
        "output": str(output),
        "name": name,
        # 67 leaves a last batch of 45 rows that ranks share unevenly.
        "data": {"path": str(path), "batch_size": 67, "window_rows": 1000},
        "model": {"embedding_dim": 8, "bottom_mlp": [16], "top_mlp": [16], "dropout": 0.2},
        "quant": {},
        "optim": {"name": "adagrad", "lr": 0.05},
        "train": {"epochs": 2, "threads": 1, "log_every": 10, "max_steps": 30},
        "checkpoint": {"every_steps": 25},
        # Of the tables, user and item are sharded; item is split where there are three processes.
        "exchange": {"timeout_seconds": 30.0, "placement": "shard", "shard_over_rows": 50},
        "tracking": {"enabled": False},
    }
    for section, values in sections.items():
        config[section] = {**config[section], **values}
    return config


def train_rank(rank, world_size, *, runs):
    from dqrm.training.run import train

    results = []
    for config, resume in runs:
        result = train(
            RunConfig.model_validate(config), resume=None if resume is None else Path(resume)
        )
        results.append(None if result.test is None else result.test.auc)
    return results


def train_world(world_size, *runs, backend="gloo"):
    """Train some runs in so many processes; return the folder and the test AUC of each."""
    runs = [
        ({**config, "exchange": {**config["exchange"], "backend": backend}}, resume)
        for config, resume in ((run if isinstance(run, tuple) else (run, None)) for run in runs)
    ]
    outcomes = run_ranks(train_rank, world_size, backend=None, timeout=120, runs=runs)
    for outcome in outcomes:
        assert outcome.returned, f"rank {outcome.rank}: {outcome.error}\n{outcome.output}"
    return [
        (Path(config["output"]) / config["name"], auc)
        for (config, _), auc in zip(runs, outcomes[0].result, strict=True)
    ]


def newest(folder):
    return list_checkpoints(folder / "checkpoints")[-1]


def tensors(folder):
    path = newest(folder)
    return {
        f"{name}/{key}": tensor
        for name in ("model", "optimizer")
        for key, tensor in load_file(path / f"{name}.safetensors").items()
    }


def assert_close(folder, expected, losses=True):
    found, wanted = tensors(folder), tensors(expected)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        if tensor.is_floating_point():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    if not losses:
        return
    histories = [read_checkpoint(newest(run)).state.history for run in (folder, expected)]
    of_runs = [[e["train/loss"] for e in history if "train/loss" in e] for history in histories]
    assert of_runs[0] == pytest.approx(of_runs[1], rel=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sharded")


CASES = {
    "sgd": {"optim": {"name": "sgd", "lr": 1.0}},
    "adagrad": {},
    "adam": {"optim": {"name": "adam", "lr": 0.01}},
    "mean": {
        "model": {"pooling": "mean"},
        "optim": {"name": "sgd", "lr": 1.0},
        "exchange": {"shard_over_rows": 0},
    },
    # With a second thread the exchange runs beside the computation.
    "all": {"exchange": {"shard_over_rows": 0}, "train": {"threads": 2}},
    "fp32": {"quant": {"bits": 32}},
    "by_row": {"quant": {"granularity": "row"}},
    "periodic": {"quant": {"scale_period": 7, "ste": "clip"}},
    # Some ranks have no sample, some owners no bag.
    "tiny": {"data": {"batch_size": 2}, "train": {"max_steps": 12}},
}


@pytest.fixture(scope="module")
def alone(clicks_data, folder):
    """Each case in one process."""
    runs = [settings(clicks_data, folder, f"{case}1", **CASES[case]) for case in CASES]
    return dict(zip(CASES, train_world(1, *runs), strict=True))


@pytest.mark.parametrize(
    ("size", "cases"),
    [
        (2, ["sgd", "mean", "all", "fp32", "by_row"]),
        (3, ["adagrad", "adam", "mean", "all", "periodic", "tiny"]),
    ],
)
def test_without_codecs_the_run_is_that_of_one_process(clicks_data, folder, alone, size, cases):
    runs = []
    for case in cases:
        changes = CASES[case]
        exchange = {**changes.get("exchange", {}), **PLAIN}
        changed = {**changes, "exchange": exchange}
        runs.append(settings(clicks_data, folder, f"{case}{size}", **changed))
    for case, (run, auc) in zip(cases, train_world(size, *runs), strict=True):
        expected, expected_auc = alone[case]
        assert_close(run, expected)
        assert auc == pytest.approx(expected_auc, abs=1e-4), case
        summaries = [json.loads((path / "summary.json").read_text()) for path in (run, expected)]
        assert summaries[0]["packed_bytes"] == summaries[1]["packed_bytes"]


@pytest.mark.parametrize("backend", [CCL])
def test_over_oneccl_it_is_the_same_run(backend, clicks_data, folder, alone):
    config = settings(clicks_data, folder, "ccl", exchange=PLAIN)
    [(run, auc)] = train_world(2, config, backend=backend)
    assert_close(run, alone["adagrad"][0])
    assert auc == pytest.approx(alone["adagrad"][1], abs=1e-4)


@pytest.fixture(scope="module")
def compressed(clicks_data, folder):
    """Two processes with the default codecs: one run, and one cut off at step 17."""
    whole = settings(clicks_data, folder, "compressed")
    short = settings(clicks_data, folder, "broken", train={"max_steps": 17})
    runs = train_world(2, whole, short)
    (runs[1][0] / "summary.json").unlink()
    return runs


def test_with_codecs_it_trains_as_well(compressed, alone):
    run, auc = compressed[0]
    assert auc == pytest.approx(alone["adagrad"][1], abs=0.01)
    logged = [e for e in read_checkpoint(newest(run)).state.history if "comm/ratio" in e]
    assert len(logged) == 3
    for entry in logged:
        assert entry["comm/ratio"] > 1.5
        assert entry["comm/sent_bytes_per_step"] > 0


def test_what_is_left_is_read_as_any_other_run(compressed, clicks_data):
    run, auc = compressed[0]
    dataset = PreparedDataset.open(clicks_data)
    saved = [load_saved(path, dataset) for path in (run, newest(run))]
    for one in saved:
        measured = evaluate(one.model, dataset.split("test"), 1000)
        assert measured.auc == pytest.approx(auc, abs=1e-6), one.source


def test_a_resumed_run_has_the_bits_of_an_unbroken_one(compressed, clicks_data, folder):
    [(again, _)] = train_world(2, (settings(clicks_data, folder, "broken"), str(compressed[1][0])))
    found, wanted = tensors(again), tensors(compressed[0][0])
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name


def test_a_run_goes_on_in_other_numbers_of_processes_and_placements(clicks_data, folder, alone):
    changes = {"exchange": PLAIN, "optim": {"name": "adam", "lr": 0.01}}

    def step(name, until, **exchange):
        found = {**changes, "exchange": {**PLAIN, **exchange}, "train": {"max_steps": until}}
        return settings(clicks_data, folder, name, **found)

    def go_on(size, until, **exchange):
        (folder / "moved" / "summary.json").unlink()
        return train_world(size, (step("moved", until, **exchange), str(folder / "moved")))

    train_world(2, step("moved", 8))
    go_on(3, 14, shard_over_rows=0)
    go_on(1, 20)
    [(run, auc)] = go_on(2, 30, placement="replicate")
    assert auc == pytest.approx(alone["adam"][1], abs=1e-4)
    assert_close(run, alone["adam"][0], losses=False)


STORAGES = {"bf16": {"storage": "bf16"}}
STORAGES |= {f"int{b}": {"storage": f"int{b}", "bits": b, "granularity": "row"} for b in (8, 4)}


def test_rows_in_few_bits_are_sharded_too(clicks_data, folder, alone):
    def run(storage, **train):
        return settings(clicks_data, folder, storage, quant=STORAGES[storage], train=train)

    runs = train_world(2, *(run(storage) for storage in STORAGES))
    for storage, (_, auc) in zip(STORAGES, runs, strict=True):
        # Rounded with other random bits than in one process.
        assert auc == pytest.approx(alone["by_row"][1], abs=0.03), storage
    longer = [run(storage, max_steps=31) for storage in STORAGES]
    pairs = zip(longer, runs, strict=True)
    for again, _ in train_world(1, *((config, str(path)) for config, (path, _) in pairs)):
        assert read_checkpoint(newest(again)).state.step == 31


def test_the_plan_says_where_tables_lie_and_what_memory_ranks_need(clicks_data, folder):
    config = RunConfig.model_validate(settings(clicks_data, folder, "plan"))
    dataset = PreparedDataset.open(clicks_data)
    sizes = sizes_of(config, dataset)
    lines = describe(plan(config, dataset, 2), dataset, sizes)
    assert lines[0] == f"tables on every rank: 1 with {dataset.tables[2].num_rows} rows"
    half = dataset.tables[1].num_rows // 2
    assert f"rows of user, item[{half}:{2 * half}]; " in lines[1]
    assert f"rank 1: {half} rows of item[0:{half}]; " in lines[2]
    # Rows of 8 values in FP32 and a sum of Adagrad.
    assert sizes.training_row_bytes == 36


def rows_of_rank(rank, world_size, *, data, config):
    from dqrm.models.placement import place_tables
    from dqrm.training.build import build_model
    from dqrm.training.sharded_optimizer import ShardedOptimizer

    config = RunConfig.model_validate(config)
    dataset = PreparedDataset.open(data)
    rows = [table.num_rows for table in dataset.tables]
    placement = place_tables(rows, [1] * len(rows), world_size, 50)
    model = build_model(config, dataset, placement, rank)
    with pytest.raises(ValueError, match=r"optim\.clip_norm needs"):
        ShardedOptimizer(model, config.optim.model_copy(update={"clip_norm": 1.0}))
    kept = sum(count for count in rows if count <= 50)
    weights = [p.shape[0] for name, p in model.emb_l.named_parameters()]
    return sum(rows), kept, sum(weights)


def test_a_rank_has_memory_for_its_own_rows_only(clicks_data, folder):
    config = settings(clicks_data, folder, "memory")
    outcomes = run_ranks(rows_of_rank, 3, backend=None, data=str(clicks_data), config=config)
    results = [outcome.result for outcome in outcomes]
    assert all(outcome.returned for outcome in outcomes), outcomes[0].error
    total, kept, _ = results[0]
    assert sum(held - kept for _, _, held in results) == total - kept
    assert max(held - kept for _, _, held in results) < (total - kept) / 2
