"""Machines that are network namespaces: made, joined at a rate, removed; ranks train across."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from backends_here import CCL

from dqrm.bench.exchange.bars import verdicts
from dqrm.bench.exchange.plan import Case
from dqrm.bench.network import machines as machines_module
from dqrm.bench.network.machines import machines, why_not
from dqrm.bench.network.study import run_ranks

REASON = why_not()
needs_machines = pytest.mark.skipif(REASON is not None, reason=f"no machines: {REASON}")
README = Path(__file__).parents[2] / "README.md"

_MAKER = """
import subprocess, sys
from dqrm.bench.network.machines import machines

with machines(2, "100mbit") as made:
    sleepers = [subprocess.Popen([*machine.enter, "sleep", "100"]) for machine in made]
    [holder] = [word[9:] for word in made[1].enter if word.startswith("--target=")]
    print(*(sleeper.pid for sleeper in sleepers), holder, flush=True)
    sys.stdin.read()
"""


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@needs_machines
def test_machines_reach_each_other_and_nobody_else(tmp_path):
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    with machines(3, "100mbit") as made:
        addresses = [machine.address for machine in made]
        assert addresses == ["10.77.0.1", "10.77.0.2", "10.77.0.3"]
        code = (
            "import os, socket, sys\n"
            "rank, address = int(os.environ['RANK']), os.environ['MASTER_ADDR']\n"
            "assert socket.gethostname() == f'node{rank + 1}'\n"
            "assert os.getcwd() == sys.argv[1]\n"
            "assert [name for _, name in socket.if_nameindex()] == ['lo', 'eth0']\n"
            "if rank == 0:\n"
            "    server = socket.create_server((address, 5000))\n"
            "    heard = sorted(server.accept()[0].recv(1) for _ in range(2))\n"
            "    assert heard == [b'1', b'2'], heard\n"
            "else:\n"
            "    for _ in range(100):\n"
            "        try:\n"
            "            socket.create_connection((address, 5000), 5).sendall(b'%d' % rank)\n"
            "            break\n"
            "        except ConnectionRefusedError:\n"
            "            import time; time.sleep(0.05)\n"
            "    else:\n"
            "        sys.exit('nobody there')\n"
        )
        run_ranks(made, [sys.executable, "-c", code, str(Path.cwd())], tmp_path)
        shaped = [*made[0].enter, "tc", "qdisc", "show", "dev", "eth0"]
        said = subprocess.run(shaped, capture_output=True, text=True, check=True).stdout
        assert "tbf" in said
        assert "rate 100Mbit" in said
        with pytest.raises(RuntimeError, match=r"rank \d ended with exit code 7:\nseven"):
            run_ranks(made, ["sh", "-c", "echo seven; exit 7"], tmp_path)
    after = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    assert after == links


@needs_machines
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_of_machines_whose_maker_is_killed(how):
    maker = subprocess.Popen(
        [sys.executable, "-c", _MAKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with maker:
        processes = [int(word) for word in maker.stdout.readline().split()]
        assert len(processes) == 3
        assert alive(processes[-1])
        maker.send_signal(how)
        maker.wait(20)
    deadline = time.monotonic() + 20
    while any(map(alive, processes)):
        assert time.monotonic() < deadline, processes
        time.sleep(0.05)


def test_why_not_is_said(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert why_not() in ("it takes root to make network namespaces", REASON)
    monkeypatch.setattr(machines_module.shutil, "which", lambda tool: None)
    assert "ip, tc, unshare, nsenter, setpriv not found" in why_not()


def run_command(folder, *arguments, path=None):
    environment = os.environ if path is None else {**os.environ, "PATH": path}
    return subprocess.run(
        [sys.executable, "-m", "dqrm", "bench", "network", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_command_says_that_it_skips(tmp_path):
    done = run_command(tmp_path, path=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("skipped: ip, tc, unshare, nsenter, setpriv not found")


@needs_machines
@pytest.mark.parametrize(
    ("backend", "part", "ours"),
    [pytest.param("ccl", "steps", 3, marks=CCL.marks), ("gloo", "rows", 4)],
)
def test_the_command_from_end_to_end(backend, part, ours, tmp_path):
    done = run_command(
        tmp_path,
        *("--nproc", "2", "--rate", "1gbit", "--batch", "2048", "--repeats", "1"),
        *("--scale", "1e-2", "--json", "out.json", "--backend", backend, "--only", part),
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out.json").read_text())
    [case] = map(Case.from_dict, record["cases"])
    assert case.key == f"{part}/p2/1gbit/b2048/uniform"
    counted = [found for found in case.measured if found.role == "ours"]
    assert len(counted) == ours
    for found in counted:
        # Beside gradients only the sums of losses travel.
        assert found.interface_bytes == pytest.approx(found.sent_bytes, rel=0.02)
        assert found.header_bytes > 0
    assert sum(bar.quantity == "interface" and bar.met for bar in verdicts([case])) == ours
    assert "interface kB" in done.stdout


@needs_machines
@pytest.mark.slow
def test_two_machines_as_the_readme_says(tmp_path):
    text = README.read_text(encoding="utf-8").replace("\\\n", " ")
    [line] = re.findall(r"^(torchrun --nnodes 2 .*)$", text, re.MULTILINE)
    runs = tmp_path / "shared" / "runs"
    with machines(2, "1gbit") as made:
        line = line.replace("/shared/runs", str(runs))
        torchrun, *rest = shlex.split(line)
        assert torchrun == "torchrun"
        command = [sys.executable, "-m", "torch.distributed.run", *rest, "train.max_steps=5"]
        started = [
            subprocess.Popen(
                [*machine.enter, *command],
                cwd=tmp_path,
                env={
                    name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for machine in made
        ]
        try:
            said = [process.communicate(timeout=200)[0] for process in started]
        finally:
            for process in started:
                process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    summary = json.loads((runs / "two-machines" / "summary.json").read_text())
    assert summary["steps"] == 5
    assert any("rank 0 of 2, exchange over" in text for text in said), said
