"""The study of the exchange: all contestants do the same work, bytes are right, bars are judged."""

import json
import subprocess
import sys
import time

import pytest
import torch
from backends_here import BACKENDS
from worlds import run_world

from dqrm.bench.exchange.bars import BARS, verdicts
from dqrm.bench.exchange.counters import HEADER_BYTES, read_counters
from dqrm.bench.exchange.plan import Case, Measured, Plan
from dqrm.bench.exchange.report import bar_lines, case_table, dense_on_paper, phase_table, title
from dqrm.bench.exchange.rows import row_message_bytes
from dqrm.bench.exchange.study import check_room, usable_backends
from dqrm.kernels.row_messages import encode_rows, row_message_bound
from dqrm.kernels.tables import RowGradient

TINY = Plan(
    batches=(8,), indices=("uniform",), scale=1e-5, rounds=2, turn_seconds=1e-4, ring_lookups=900
)


def measured(name, role, *seconds, **more):
    return Measured(name, role, list(seconds), list(seconds), **more)


def rows_case(**times):
    case = Case("rows", 2, "ccl", 2048, "uniform", 33_762_577, 16)
    case.measured = [
        measured("INT8 with residuals, ccl", "ours", 2e-3, 1e-3, sent_bytes=590e3),
        measured("INT8 with residuals, gloo", "ours", 4e-3, 4e-3, sent_bytes=590e3),
        measured("INT4 with residuals, ccl", "ours", 2e-3, 2e-3, sent_bytes=350e3),
        measured("sparse all-reduce, gloo", "peer", 30e-3, 12e-3, formula_bytes=2100e3),
        measured("raw FP32 gather, ccl", "peer", 5e-3, 5e-3, formula_bytes=3800e3),
        measured("distinct FP32 gather, gloo", "peer", 3e-3, 3e-3, formula_bytes=2100e3),
    ]
    return case


def test_rows_are_judged_round_by_round_against_the_fastest():
    found = {(bar.quantity, bar.ours, bar.against): bar for bar in verdicts([rows_case()])}
    ours = "INT8 with residuals, ccl"
    # 30 / 2 and 12 / 1; 3 / 2 and 3 / 1.
    assert found["time", ours, "sparse all-reduce, gloo"].value == pytest.approx(13.5)
    gathers = found["time", ours, "distinct FP32 gather, gloo"]
    assert gathers.value == pytest.approx(2.25)
    assert gathers.met
    assert found["seconds", ours, ""].met
    fewer = found["bytes", "INT4 with residuals, ccl", "sparse all-reduce, gloo"]
    assert (fewer.value, fewer.met) == (6.0, True)
    assert not any(name.endswith(", gloo") for _, name, _ in found)
    case = rows_case()
    case.network = "1gbit"
    case.measured.append(measured("FP32, ccl", "ours", 3e-3, 3e-3))
    [times] = [bar for bar in verdicts([case]) if bar.quantity == "time"]
    assert (times.against, times.value, times.met) == ("FP32, ccl", 2.25, True)


def test_steps_are_judged_where_they_should_be():
    case = Case("steps", 2, "ccl", 2048, "uniform", 33_762_577, 16)
    case.measured = [
        measured("one process alone", "alone", 10e-3),
        measured("INT8 rows, INT8 MLPs", "ours", 12.5e-3, sent_bytes=1e6),
        measured("codecs off", "ours", 14e-3, sent_bytes=4e6),
    ]
    [bar] = verdicts([case])
    assert (bar.value, bar.met) == (pytest.approx(0.8), False)
    case.network = "1gbit"
    case.measured[1] = measured(
        "INT8 rows, INT8 MLPs", "ours", 7e-3, sent_bytes=1e6, interface_bytes=1.01e6
    )
    [interface] = verdicts([case])
    assert (interface.value, interface.met) == (pytest.approx(0.01), True)
    case.processes, case.network = 4, ""
    assert [bar.quantity for bar in verdicts([case])] == ["interface"]
    case.batch = 16
    assert list(verdicts([case])) == []


def test_reports_have_a_cell_for_everything():
    case = rows_case()
    case.measured[0].phases["wire"] = 1e-3
    header, lines = case_table(case)
    assert all(len(line) == len(header) for line in lines)
    assert "of INT8 with residuals, ccl" in header
    header, lines = phase_table(case)
    assert lines == [["INT8 with residuals, ccl", "1.000"]]
    assert {line[-1] for line in bar_lines(verdicts([case]))} <= {"met", "short"}
    messages = Case("messages", 2, "ccl", 0, "", 1, 16)
    messages.measured = [measured("all-reduce 64 MiB, gloo", "peer", 64 * 2**20 / 1e9)]
    [line] = dense_on_paper([case, messages])
    # 2 (W - 1) / W of 33,762,577 rows of 64 bytes, at 1 GB/s.
    assert "2,161 MB" in line
    assert "2,161 ms" in line
    assert "batch 2048" in title(case)
    assert Case.from_dict(json.loads(json.dumps(case.as_dict()))) == case


def test_counters_are_those_of_the_interface():
    text = "Inter-| Receive\n lo: 1 2 0 0 0 0 0 0 3 4 0\n eth0: 5000 50 0 0 0 0 0 0 9000 70 0 0\n"
    found = read_counters("eth0", text)
    assert (found.received_bytes, found.received_packets) == (5000, 50)
    assert found.sent_payload == 9000 - 70 * HEADER_BYTES
    assert (found - read_counters("lo", text)).sent_packets == 66
    with pytest.raises(ValueError, match="'wlan7'"):
        read_counters("wlan7", text)
    assert read_counters("lo").sent_bytes >= 0


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_calculated_bytes_are_those_of_the_message(bits):
    generator = torch.Generator().manual_seed(bits)
    rows = torch.randint(0, 2**26, (700,), generator=generator).unique()
    rows = torch.cat([torch.arange(300), rows + 300, torch.tensor([2**33])])
    gradient = RowGradient(rows, torch.randn(len(rows), 16, generator=generator))
    out = torch.empty(row_message_bound(len(rows), 16, bits), dtype=torch.uint8)
    size, bad = encode_rows(gradient, out, bits=bits)
    assert bad is None
    assert row_message_bytes(rows, 16, bits) == 32 + size


def test_plans_travel_and_do_not_outgrow_memory(tmp_path):
    TINY.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == TINY
    check_room(TINY, 2)
    with pytest.raises(ValueError, match="--scale"):
        check_room(Plan(), 10_000)
    assert usable_backends(("gloo",)) == (("gloo",), "")


def everything(rank, world_size, *, over):
    from torch import distributed

    from dqrm.bench.exchange import rows, worker
    from dqrm.bench.exchange.turns import Runner, take_turns_together
    from dqrm.bench.speed.embedding import LEARNING_RATE, our_collection
    from dqrm.bench.speed.traffic import kaggle_shape, make_traffic
    from dqrm.comm import process_group

    process_group.register()
    # The slowest rank's time counts, on all ranks.
    sleepy = Runner("sleepy", lambda number: time.sleep(0.02 * rank))
    [turns] = take_turns_together(
        [sleepy], distributed.group.WORLD, rounds=2, turn_seconds=0.0, seed=0
    )
    assert min(turns.wall_seconds) >= 0.02

    # Everybody takes the same step of the same tables.
    shape = kaggle_shape(16, 1e-5, None)
    traffic = make_traffic(shape, 8, "uniform", seed=rank, ring_lookups=900)
    tables = our_collection(shape, 32)
    tables.weight.detach().zero_()
    work = rows.RowWork(tables, traffic)
    gradient = torch.zeros_like(work.weight).index_add_(0, work.numbers[0], work.by_id)
    distributed.all_reduce(gradient)
    expected = -LEARNING_RATE * gradient / world_size
    changes = {}
    for kind in (rows.SparseAllReduce, rows.RawGather, rows.DistinctGather):
        work.weight.zero_()
        kind(work, distributed.new_group(backend="gloo")).call(0)
        changes[kind.__name__] = float((work.weight - expected).abs().max())
    for name, (codec, kept) in worker._OURS.items():
        work.weight.zero_()
        ours = rows.OurRows(work, distributed.new_group(), codec, kept)
        ours.call(0)
        ours.close()
        changes[name] = float((work.weight - expected).abs().max())
    step = float(expected.abs().max())

    plan = Plan(**{**TINY.__dict__, "backends": tuple(dict.fromkeys((over, "gloo")))})
    plan = Plan(**{**plan.__dict__, "interface": "lo"})
    cases = [case.as_dict() for case in worker.Study(plan, over).run()]
    return changes, step, cases


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_parts_in_two_processes(backend):
    (changes, step, cases), (_, _, others) = run_world(
        everything, 2, backend=backend, over=backend, timeout=120
    )
    loss = {"INT8": 1 / 60, "INT8 with residuals": 1 / 100, "INT4 with residuals": 1 / 6}
    for name, change in changes.items():
        assert change <= loss.get(name, 1e-5) * step, name
    cases = {case.part: case for case in map(Case.from_dict, cases)}
    assert list(cases) == ["rows", "messages", "steps"]
    for case in cases.values():
        assert (case.processes, case.backend) == (2, backend)
        for found in case.measured:
            assert len(found.wall_seconds) == len(found.cpu_seconds) == TINY.rounds
            assert min(found.wall_seconds) > 0
    ours = [found for found in cases["rows"].measured if found.role == "ours"]
    assert {found.name.partition(", ")[2] for found in ours} == {backend, "gloo"}
    for found in ours:
        assert {"sum repeated rows", "encode", "wire", "decode", "apply"} <= set(found.phases)
        # Messages are padded to what all have room for.
        assert found.formula_bytes <= found.sent_bytes <= 1.1 * found.formula_bytes + 4096
    steps = {found.name: found for found in cases["steps"].measured}
    assert steps["codecs off"].sent_bytes > 2 * steps["INT8 rows, INT8 MLPs"].sent_bytes > 0
    assert steps["codecs off"].interface_bytes > 0
    assert all(steps["codecs off"].phases[f"{what} wire"] > 0 for what in ("rows", "MLPs"))
    # Times are those of the slowest rank, so both ranks tell the same.
    assert [case["measured"][0]["wall_seconds"] for case in others] == [
        case.measured[0].wall_seconds for case in cases.values()
    ]


def test_the_command_from_end_to_end(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "dqrm", "bench", "exchange", "--only", "rows"),
            *("--batch", "16", "--indices", "zipf", "--backend", "gloo", "--repeats", "1"),
            *("--scale", "1e-5", "--json", "out.json", "--plot", "out.png"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["command"] == "bench exchange"
    assert record["tags"]["version.torch"] == torch.__version__
    [case] = record["cases"]
    assert case["key"] == "rows/p2/b16/zipf"
    assert {found["role"] for found in case["measured"]} == {"ours", "peer"}
    assert (tmp_path / "out.png").stat().st_size > 1000
    assert "an all-reduce of all" in done.stdout
    assert "sparse all-reduce, gloo" in done.stdout


def test_every_bar_names_contestants_that_exist():
    from dqrm.bench.exchange.bars import GATHERS, SPARSE
    from dqrm.bench.exchange.steps import ALONE, APART, CODECS
    from dqrm.bench.exchange.worker import _OURS

    known = {"rows": {*_OURS, SPARSE, *GATHERS}, "steps": {*CODECS, ALONE, APART}}
    for bar in BARS:
        assert {*bar.ours, *bar.against} <= known[bar.part], bar
