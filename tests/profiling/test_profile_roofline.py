"""What holds a module, what a machine is measured to do, and how a profile is shown."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from click.testing import CliRunner
from torch import nn

from dqrm.cli import cli
from dqrm.profiling.roofline import Limits, Machine, limits, measure
from dqrm.profiling.table import count_text, profile_text
from dqrm.profiling.timing import middle
from dqrm.profiling.tree import profile
from dqrm.profiling.work import Work

MACHINE = Machine(1, {"float32": 100e9, "int8": 400e9}, bandwidth=10e9, call_seconds=2e-6)


def test_each_type_has_its_own_peak():
    work = Work(
        macs=10**9,
        moved_bytes=10**7,
        overhead_calls=50,
        flops_by_type={"float32": 10**9, "int8": 10**9},
    )
    least = limits(work, MACHINE)
    assert least.compute == pytest.approx(10e-3 + 2.5e-3)
    assert least.memory == pytest.approx(1e-3)
    assert least.overhead == pytest.approx(1e-4)
    assert least.roof == least.compute


@pytest.mark.parametrize(
    ("least", "verdict"),
    [
        (Limits(compute=0.5, memory=0.1, overhead=0.1), "compute"),
        (Limits(compute=1.1, memory=0.9, overhead=0.1), "compute"),
        (Limits(compute=0.1, memory=0.5, overhead=0.1), "memory"),
        (Limits(compute=0.1, memory=0.1, overhead=0.5), "overhead"),
        (Limits(compute=0.1, memory=1.5, overhead=0.5), "caches"),
        (Limits(compute=0.2, memory=0.1, overhead=0.1), "unclear"),
    ],
)
def test_verdict_on_a_module_that_takes_a_second(least, verdict):
    assert least.verdict(1.0) == verdict


def test_a_machine_is_measured_for_the_types_that_occur():
    with torch.no_grad():
        machine = measure({"int8", "float32", "bfloat16"})
    assert machine.threads == torch.get_num_threads()
    assert list(machine.peak_flops) == ["bfloat16", "float32", "int8"]
    assert min(machine.peak_flops.values()) > 0
    assert machine.bandwidth > 0
    assert machine.call_seconds > 0


def test_the_middle_half_of_sorted_times():
    assert middle([1]) == [1]
    assert middle([1, 2, 3]) == [1, 2, 3]
    assert middle([1, 2, 3, 4, 5]) == [2, 3, 4]
    assert middle(list(range(8))) == [2, 3, 4, 5]


def test_counts_as_people_read_them():
    assert [count_text(n) for n in (0, 999, 1000, 22_713_216)] == ["0", "999", "1K", "22.7M"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
    )
    path = tmp_path_factory.mktemp("bert")
    transformers.BertForSequenceClassification(config).save_pretrained(path)
    return path


def run(folder, *options):
    command = ["profile", str(folder), "--batch-size", "1", "--length", "8", "--repeats", "1"]
    done = CliRunner().invoke(cli, [*command, *options])
    assert done.exit_code == 0, done.stderr
    return done.stdout


def test_the_table_fits_and_says_what_it_compares_with(folder):
    lines = run(folder).splitlines()
    assert max(len(line) for line in lines) <= 100
    assert lines[0].startswith("one forward of 1 x 8 tokens, ")
    assert f"{torch.get_num_threads()} thread" in lines[0]
    (header,) = (line.split() for line in lines if line.startswith("module"))
    assert header == ["module", "kind", "params", "FLOPs", "ms", "time", "self", "roof", "bound"]
    (model,) = (line.split() for line in lines if line.startswith("model "))
    assert model[2:4] == ["100.0%", "100.0%"]
    (times,) = (line for line in lines if line.endswith("in no module"))
    assert "ms from outside" in times
    roof = lines[lines.index(times) + 1]
    assert "fp32" in roof
    assert "GB/s" in roof


@pytest.mark.parametrize(("rate", "told"), [(0.5, False), (300.0, True)])
def test_a_machine_that_others_use_is_named(rate, told):
    leaf = nn.Linear(4, 2)
    result = profile(leaf, lambda: leaf(torch.ones(3, 4)), repeats=1)
    text = profile_text(replace(result, interruptions=rate), "3 rows", None, False)
    assert ("interrupted 300 times a second" in text) is told


def test_all_columns_and_everything_as_json(folder):
    detailed = run(folder, "--detailed", "--depth", "0")
    for column in ("MACs", "non-zero", "moved", "FLOP/B", "self ms", "GFLOP/s", "calls"):
        assert column in detailed
    everything = json.loads(run(folder, "--json"))
    assert set(everything) == {
        "forward",
        "machine",
        "wall_seconds",
        "plain_seconds",
        "interruptions",
        "tree",
    }
    assert set(everything["machine"]["peak_flops"]) == {"float32"}
    tree = everything["tree"]
    least = max(
        tree["flops"] / everything["machine"]["peak_flops"]["float32"],
        tree["moved_bytes"] / everything["machine"]["bandwidth"],
    )
    assert tree["roofline"] == pytest.approx(least / tree["seconds"])
    assert f"{tree['parameters']:,}" in detailed
