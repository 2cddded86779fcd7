"""Two processes of a process group that stay and do one task after another: starting one costs as
much as many tasks.
"""

from __future__ import annotations

import datetime
import os
import pickle
import sys
import time
import traceback
import warnings
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from helpers.cheap_compiles import make_compiles_cheap

import mhc_compile

if TYPE_CHECKING:
    from collections.abc import Callable


#: Seconds that a rank waits for another one, and seconds that a task may take.
PATIENCE, LIMIT = 60, 240


class RankError(AssertionError):
    """A task failed in one of the processes; the message is its traceback."""


class Ranks:
    """Processes with ranks 0, 1, ... of a gloo group on this machine.

    Args:
        folder: an empty folder; the processes meet in a file there, so that no port is needed.
        size: how many.
    """

    def __init__(self, folder: Path, size: int = 2) -> None:
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, str(folder / "store"), theirs), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(mine)
            self._processes.append(process)

    @property
    def alive(self) -> bool:
        return bool(self._processes)

    def run(self, task: Callable[..., Any], *args: Any) -> list[Any]:
        """`task(rank, *args)` in every process: what each returned. `task` must be a function of a
        module that can be imported.

        Raises:
            RankError: a task failed, or took too long. The processes are gone then.
        """
        message = pickle.dumps((task, args))
        for connection in self._connections:
            connection.send_bytes(message)
        waiting = dict(enumerate(self._connections))
        answers: dict[int, Any] = {}
        end = time.monotonic() + LIMIT
        while waiting:
            # Whoever answers first: when one rank fails, the others only wait for it.
            ready = wait(list(waiting.values()), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                self._fail(min(waiting), f"no answer within {LIMIT} s")
            for rank in [rank for rank, connection in waiting.items() if connection in ready]:
                ok, answers[rank] = self._receive(waiting.pop(rank))
                if not ok:
                    self._fail(rank, answers[rank])
        return [answers[rank] for rank in sorted(answers)]

    def _receive(self, connection: Connection) -> tuple[bool, Any]:
        try:
            ok, value = pickle.loads(connection.recv_bytes())
        except EOFError:
            return False, "the process ended"
        return ok, value

    def _fail(self, rank: int, report: str) -> None:
        self.close()
        raise RankError(f"rank {rank}: {report}")

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes.clear()
        self._connections.clear()


def _serve(rank: int, size: int, store: str, connection: Connection) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2]))  # tasks have the module names that pytest gives them
    torch.set_num_threads(1)
    make_compiles_cheap()
    warnings.filterwarnings("error", category=mhc_compile.MhcWarning)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=PATIENCE),
    )
    while True:
        try:
            task, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        torch._dynamo.reset()
        torch.manual_seed(0)
        try:
            answer = True, task(rank, *args)
        except BaseException:
            answer = False, traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))
