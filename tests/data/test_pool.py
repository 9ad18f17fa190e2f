"""How worker processes are started."""

import json
import subprocess
import sys
import textwrap

import pytest

SCRIPT = textwrap.dedent(
    """
    import json, os, sys, threading
    from dqrm.data.pool import Pool, use_one_thread
    use_one_thread()
    import dqrm.data.stages
    from dqrm.data.slots import pa  # Arrow keeps a thread of its own, which does no harm.

    if sys.argv[1] == "thread":
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    if sys.argv[1] == "memory":
        held = bytearray(b"x") * 250_000_000
    lock = os.open(".", os.O_RDONLY)
    with Pool(2, lock) as pool:
        parents = set(pool.run(os.getppid, [()] * 20))
        opened = list(pool.run(os.path.exists, [(f"/proc/self/fd/{lock}",)] * 20))
    print(json.dumps([parents == {os.getpid()}, any(opened)]))
    """
)


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
@pytest.mark.parametrize(
    ("what", "forked"), [("nothing", True), ("thread", False), ("memory", False)]
)
def test_a_small_process_without_threads_is_forked(what, forked, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, what],
        check=True, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    was_forked, lock_is_open = json.loads(done.stdout)
    assert was_forked == forked
    if was_forked:
        assert not lock_is_open
