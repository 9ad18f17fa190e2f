"""One rank of a study of the exchange.

    python -m dqrm.bench.exchange.worker PLAN.json CASES.json

It joins the world that the environment speaks of, takes part in everything the plan says, and on
rank 0 writes the cases.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import distributed
from torch.distributed import ProcessGroup

from dqrm.bench.exchange.counters import read_counters
from dqrm.bench.exchange.messages import message_runners
from dqrm.bench.exchange.plan import Case, Measured, Plan, Role
from dqrm.bench.exchange.rows import (
    DistinctGather,
    OurRows,
    RawGather,
    RowContestant,
    RowWork,
    SparseAllReduce,
)
from dqrm.bench.exchange.steps import ALONE, APART, StepWork
from dqrm.bench.exchange.turns import Runner, Turns, take_turns_together
from dqrm.bench.speed.embedding import our_collection
from dqrm.bench.speed.traffic import IndexKind, Traffic, kaggle_shape, make_traffic
from dqrm.comm import process_group
from dqrm.comm.row_codec import Rows
from dqrm.launch import find_place
from dqrm.runtime import prepare_threads
from dqrm.training.exchanged_step import TABLES

log = logging.getLogger(__name__)

_GROUPS = {"ccl": "ccl", "gloo": "watched_gloo"}
"""What torch calls our groups; "gloo" is its own."""
_KEPT = 2**18
_OURS: dict[str, tuple[Rows, int]] = {
    "INT8": (Rows(8), 0),
    "INT8 with residuals": (Rows(8), _KEPT),
    "INT4 with residuals": (Rows(4), _KEPT),
    "FP32": (Rows(32), 0),
}
_COUNTED_CALLS = 20
"""On as many batches bytes are counted, after everything was timed."""


class Study:
    """The same on all ranks.

    Args:
        plan: what to measure.
        backend: that the world was joined over.
    """

    def __init__(self, plan: Plan, backend: str) -> None:
        self.plan, self.backend = plan, backend
        self.rank, self.processes = distributed.get_rank(), distributed.get_world_size()
        self.shape = kaggle_shape(plan.dim, plan.scale, None)
        self.control = _new_group("gloo")
        self.peers = {"gloo": _new_group("gloo")}
        if "ccl" in plan.backends:
            self.peers["ccl"] = _new_group("ccl")

    def run(self) -> Iterator[Case]:
        """Measure, and yield every case as it is done."""
        parts = {"rows": self._rows, "messages": self._messages, "steps": self._steps}
        for part in self.plan.parts:
            yield from parts[part]()

    def _case(self, part: str, traffic: Traffic | None) -> Case:
        case = Case(
            part=part,  # type: ignore[arg-type]
            processes=self.processes,
            backend=self.backend,
            batch=0 if traffic is None else traffic.batch,
            indices="" if traffic is None else traffic.kind,
            rows=self.shape.total_rows,
            dim=self.shape.dim,
        )
        log.info("%s", case.key)
        return case

    def _traffic(self) -> Iterator[Traffic]:
        plan = self.plan
        for batch in plan.batches:
            for kind in plan.indices:
                # Every rank has samples of its own.
                seed = plan.seed * 1009 + self.rank
                yield make_traffic(
                    self.shape, batch, cast("IndexKind", kind), seed, plan.ring_lookups
                )

    def _take_turns(self, runners: list[Runner]) -> list[Turns]:
        plan = self.plan
        return take_turns_together(
            runners,
            self.control,
            rounds=plan.rounds,
            turn_seconds=plan.turn_seconds,
            seed=plan.seed,
        )

    def _rows(self) -> Iterator[Case]:
        collection = our_collection(self.shape, 32)
        groups = {
            (codec, backend): _new_group(_GROUPS[backend])
            for backend in self.plan.backends
            for codec in _OURS
        }
        for traffic in self._traffic():
            case, work = self._case("rows", traffic), RowWork(collection, traffic)
            ours = {
                f"{codec}, {backend}": OurRows(work, group, *_OURS[codec])
                for (codec, backend), group in groups.items()
            }
            everybody: dict[str, RowContestant] = {
                **ours,
                "sparse all-reduce, gloo": SparseAllReduce(work, self.peers["gloo"]),
            }
            for name, group in self.peers.items():
                everybody[f"raw FP32 gather, {name}"] = RawGather(work, group)
                everybody[f"distinct FP32 gather, {name}"] = DistinctGather(work, group)
            turns = self._take_turns([Runner(name, c.call) for name, c in everybody.items()])
            case.touched_rows = self._mean(float(len(work.touched(0))))
            for (name, contestant), times in zip(everybody.items(), turns, strict=True):
                case.measured.append(self._row_result(name, contestant, times, name in ours))
            for contestant in ours.values():
                contestant.close()
            yield case

    def _row_result(
        self, name: str, contestant: RowContestant, times: Turns, ours: bool
    ) -> Measured:
        phases = contestant.phases()
        before = contestant.counted_bytes()
        seen = self._seen(contestant.call)
        after = contestant.counted_bytes()
        formula = sum(contestant.formula_bytes(number) for number in range(_COUNTED_CALLS))
        sent = None
        if before is not None and after is not None:
            sent = self._mean((after - before) / _COUNTED_CALLS)
        return Measured(
            name,
            "ours" if ours else "peer",
            times.wall_seconds,
            times.cpu_seconds,
            sent,
            self._mean(formula / _COUNTED_CALLS),
            *seen,
            phases=phases,
        )

    def _messages(self) -> Iterator[Case]:
        case = self._case("messages", None)
        runners = [
            runner
            for name, group in self.peers.items()
            for runner in message_runners(name, group, uneven=name != "gloo")
        ]
        for runner, times in zip(runners, self._take_turns(runners), strict=True):
            role: Role = "ours" if runner.name.endswith("ccl") else "peer"
            case.measured.append(Measured(runner.name, role, times.wall_seconds, times.cpu_seconds))
        yield case

    def _steps(self) -> Iterator[Case]:
        work = StepWork(self.shape, self.backend)
        for traffic in self._traffic():
            case = self._case("steps", traffic)
            runners = work.runners(traffic)
            for runner, times in zip(runners, self._take_turns(runners), strict=True):
                role: Role = "alone" if runner.name in (ALONE, APART) else "ours"
                found = Measured(runner.name, role, times.wall_seconds, times.cpu_seconds)
                if runner.name in work.exchanges:
                    found = self._counted(found, work, runner)
                case.measured.append(found)
            case.touched_rows = self._mean(
                float(sum(len(column.unique()) for column in traffic.batches[0]))
            )
            yield case
        work.close()

    def _counted(self, found: Measured, work: StepWork, runner: Runner) -> Measured:
        """Add the bytes of a call and where its time goes."""
        meter = work.exchanges[runner.name].meter
        before = meter.report()
        seen = self._seen(runner.call)
        after = meter.report()
        return replace(
            found,
            sent_bytes=self._mean(
                (after["total"]["sent_bytes"] - before["total"]["sent_bytes"]) / _COUNTED_CALLS
            ),
            interface_bytes=seen[0],
            header_bytes=seen[1],
            phases={
                name: (seconds - _seconds(before)[name]) / _COUNTED_CALLS
                for name, seconds in _seconds(after).items()
            },
        )

    def _seen(self, call: Callable[[int], object]) -> tuple[float | None, float | None]:
        """Make the counted calls; return what one sent by the network interface.

        Returns:
            Bytes without headers, and those of headers, the means over ranks; None where the plan
            names no interface.
        """
        interface = self.plan.interface
        distributed.barrier(self.control)
        before = None if interface is None else read_counters(interface)
        for number in range(_COUNTED_CALLS):
            call(number)
        distributed.barrier(self.control)
        if interface is None or before is None:
            return None, None
        taken = read_counters(interface) - before
        return (
            self._mean(taken.sent_payload / _COUNTED_CALLS),
            self._mean(taken.sent_headers / _COUNTED_CALLS),
        )

    def _mean(self, value: float) -> float:
        total = torch.tensor([value], dtype=torch.float64)
        distributed.all_reduce(total, group=self.control)
        return float(total) / self.processes


def _seconds(report: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return a meter's seconds by what was exchanged, and what callers waited for."""
    seconds: dict[str, float] = {}
    for key, counted in report.items():
        if key == "total":
            continue
        what = "rows" if key.startswith(f"{TABLES}/") else "MLPs"
        for stage in ("encode", "wire", "decode"):
            name = f"{what} {stage}"
            seconds[name] = seconds.get(name, 0.0) + counted[f"{stage}_seconds"]
    return {**seconds, "waited for": report["total"]["exposed_seconds"]}


def _new_group(backend: str) -> ProcessGroup:
    group = distributed.new_group(backend=backend)
    assert isinstance(group, ProcessGroup)
    return group


def main(arguments: list[str]) -> None:
    """Take part as one rank."""
    plan_file, result_file = map(Path, arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    plan = Plan.read(plan_file)
    torch.set_num_threads(prepare_threads(1).count)
    backend = process_group.init(plan.backends[0], timeout=plan.timeout_seconds)
    process_group.register()
    place = find_place()
    if place.rank == 0:
        log.setLevel(logging.INFO)
    cases = []
    for case in Study(plan, backend).run():
        cases.append(case.as_dict())
        if place.rank == 0:
            # After every case: what was measured survives a failure later on.
            result_file.write_text(json.dumps(cases), encoding="utf-8")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
