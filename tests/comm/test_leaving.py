"""How processes leave: threads of a transport must not outlive the interpreter."""

import os
import socket
import subprocess
import sys

import pytest
from backends_here import BACKENDS

LATE = """
import sys
import threading
import time

import torch
import torch.distributed as dist

from dqrm.comm import process_group

process_group.init(sys.argv[1], timeout=30)
group = dist.group.WORLD
called = threading.Event()


def call(future):
    called.set()
    time.sleep(1)


work = dist.all_reduce(torch.ones(4), async_op=True)
work.get_future().add_done_callback(call)
called.wait()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_thread_that_calls_back_late_does_not_abort_the_process(backend: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LATE, backend],
            env=os.environ | place | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=60)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], said
