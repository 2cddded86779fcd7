"""Kill examples/training/resume.py, start it again, and expect the uninterrupted run."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "training" / "resume.py"
STEPS = 12

#: Run each command line of stdin in a fork with torch loaded; print its id, then its exit code.
SERVER = """
import json, os, runpy, sys, traceback
import torch._dynamo, torch._inductor.compile_fx, mhc_compile.backend
torch.set_num_threads(1)
for line in sys.stdin:
    command = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(command["stdout"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        sys.argv = command["argv"]
        status = 1
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class ForkServer:
    """Start training processes, one at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def start(self, folder: Path, steps: int, inner_backend: str = "eager", save_every: int = 1) -> Run:
        options = json.dumps({"inner_backend": inner_backend})
        argv = [str(SCRIPT), "--layers", "1", "--width", "32", "--steps", str(steps), "--options", options]
        argv += ["--save-every", str(save_every), "--checkpoint", str(folder / "resume.pt")]
        out = folder / "output.txt"
        out.write_text("")  # not the output of the previous process
        self.process.stdin.write(json.dumps({"argv": argv, "stdout": str(out)}) + "\n")
        self.process.stdin.flush()
        return Run(int(self.process.stdout.readline()), out, self.process.stdout)


class Run:
    def __init__(self, process: int, out: Path, ends) -> None:
        self.process, self.out, self._ends = process, out, ends

    def kill(self) -> None:
        os.kill(self.process, signal.SIGKILL)

    def end(self) -> int:
        return int(self._ends.readline())

    def finish(self) -> Run:
        assert self.end() == 0, self.text
        return self

    @property
    def text(self) -> str:
        return self.out.read_text()

    @property
    def losses(self) -> dict[int, str]:
        return {int(step): loss for step, loss in re.findall(r"step +(\d+)  loss (\S+)\n", self.text)}

    @property
    def resumed(self) -> int:
        found = re.search(r"resumed at step (\d+)", self.text)
        return int(found[1]) if found else 0


@pytest.fixture(scope="module")
def server():
    server = ForkServer()
    yield server
    server.process.stdin.close()
    server.process.wait()


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory) -> dict[int, str]:
    """Return the losses of an uninterrupted run."""
    losses = server.start(tmp_path_factory.mktemp("whole"), STEPS).finish().losses
    assert list(losses) == list(range(1, STEPS + 1))
    assert len(set(losses.values())) == STEPS
    return losses


@pytest.fixture
def three_steps(server, tmp_path, tmp_path_factory) -> Path:
    """Return a folder with the checkpoint of three steps."""
    made = tmp_path_factory.getbasetemp() / "three-steps"
    if not made.exists():
        made.mkdir()
        server.start(made, 3).finish()
    shutil.copy(made / "resume.pt", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "written",
    [
        pytest.param("nothing", marks=pytest.mark.slow),
        pytest.param("the first bytes", marks=pytest.mark.slow),
        "half of it",
    ],
)
def test_killed_while_saving(written, server, whole, three_steps):
    """Kill the process where the temporary file, a pipe, takes no more bytes."""
    checkpoint, temporary = three_steps / "resume.pt", three_steps / "resume.pt.tmp"
    good = checkpoint.read_bytes()
    os.mkfifo(temporary)
    run = server.start(three_steps, STEPS)
    with temporary.open("rb", buffering=0) as pipe:
        size = {"nothing": 0, "the first bytes": 1000, "half of it": len(good) // 2}[written]
        assert len(good) - size > 100_000  # a pipe holds 65,536 bytes: the process must block
        reached = b""
        while len(reached) < size:
            reached += pipe.read(size - len(reached))
        run.kill()
        assert run.end() == -signal.SIGKILL
    assert max(run.losses) == 4
    temporary.unlink()
    temporary.write_bytes(reached)  # what a disk would have
    assert checkpoint.read_bytes() == good
    again = server.start(three_steps, 6).finish()
    assert again.resumed == 3
    assert again.losses == {step: whole[step] for step in (4, 5, 6)}
    assert not temporary.exists()


@pytest.mark.slow
def test_killed_at_random_moments(server, whole, tmp_path):
    """Every loss is that of the uninterrupted run, and no saved step is computed twice."""
    moments = random.Random(0)
    done, kills = 0, 0
    for _ in range(20):
        run = server.start(tmp_path, STEPS)
        if kills < 4:
            deadline = time.monotonic() + 120
            while not run.losses:
                assert time.monotonic() < deadline, run.text
                time.sleep(0.01)
            time.sleep(moments.uniform(0.0, 0.1))
            with contextlib.suppress(ProcessLookupError):  # it may have ended
                run.kill()
        status = run.end()
        assert status in (0, -signal.SIGKILL), run.text
        assert run.resumed in (done, done - 1)  # the last printed step may not have been saved
        assert run.losses == {step: whole[step] for step in range(run.resumed + 1, max(run.losses) + 1)}
        done = max(run.losses)
        if status == 0:
            break
        kills += 1
    assert done == STEPS
    assert kills >= 1


@pytest.mark.slow
def test_full_disk_keeps_the_previous_checkpoint(server, whole, three_steps):
    checkpoint, temporary = three_steps / "resume.pt", three_steps / "resume.pt.tmp"
    good = checkpoint.read_bytes()
    temporary.symlink_to("/dev/full")
    run = server.start(three_steps, 5)
    assert run.end() == 1
    assert "No space left on device" in run.text
    assert checkpoint.read_bytes() == good
    temporary.unlink()
    assert server.start(three_steps, 5).finish().losses == {step: whole[step] for step in (4, 5)}


@pytest.mark.slow
def test_killed_under_inductor(server, tmp_path_factory):
    folder, other = tmp_path_factory.mktemp("inductor"), tmp_path_factory.mktemp("killed")
    want = server.start(folder, 6, "inductor").finish().losses
    run = server.start(other, 6, "inductor", save_every=2)
    while len(run.losses) < 3:
        time.sleep(0.01)
    run.kill()
    assert run.end() == -signal.SIGKILL
    again = server.start(other, 6, "inductor", save_every=2).finish()
    assert again.resumed in (2, 4, 6)
    assert again.losses == {step: want[step] for step in range(again.resumed + 1, 7)}
    torch.load(other / "resume.pt", weights_only=True)
