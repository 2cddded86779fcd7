"""Compiles a tiny model from end to end, in a process of its own: what breaks there breaks nothing here, and what hangs is ended."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from mhc_compile.tools.doctor.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["tiny_compile"]

_SECONDS = 300


def tiny_compile(seconds: float = _SECONDS) -> Iterator[Finding]:
    """Two residual blocks with Inductor: whether they are rewritten, are the same function, and learn."""
    name = "tiny compile"
    started = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "mhc_compile.tools.doctor.tiny"],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        advice = "Something hangs. TORCH_LOGS=+dynamo,+inductor python -m mhc_compile.tools.doctor.tiny shows where."
        yield Finding(name, "failed", f"not done after {seconds:.0f} s", advice)
        return
    took = time.monotonic() - started
    if done.returncode != 0 or not done.stdout.strip():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        cause = next(
            (line for line in reversed(lines) if "Error" in line.split(":")[0]),
            lines[-1] if lines else "it said nothing",
        )
        advice = "python -m mhc_compile.tools.doctor.tiny shows the whole trace."
        yield Finding(name, "failed", f"exit code {done.returncode}: {cause}", advice)
        return
    seen = json.loads(done.stdout.splitlines()[-1])
    wrong = _wrong(seen)
    found = f"{seen['overrides']} sites, largest deviation {seen['deviation']:.0e}, {took:.0f} s"
    if wrong:
        yield Finding(
            name,
            "failed",
            f"{found}: {wrong}",
            "python -m mhc_compile.tools.doctor.tiny prints what it measured; please report it.",
        )
    else:
        yield Finding(name, "ok", found)


def _wrong(seen: dict[str, Any]) -> str:
    if seen["sites"] != 2:
        return "2 were expected; is compiling switched off?"
    if not seen["deviation"] <= 1e-5:
        return "the compiled model computes something else"
    return "" if seen["learns"] else "no gradient reaches the new parameters"


def _main() -> None:
    import torch
    from torch import nn

    import mhc_compile

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
            return out

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, x = nn.Sequential(Block(), Block()).to(device), torch.randn(4, 8, 16, device=device)
    plain = model(x).detach()
    out = torch.compile(model, backend="mhc")(x)
    out.square().sum().backward()
    connections = mhc_compile.connections(model)
    learns = bool(connections) and all(
        connection.bias.grad is not None and connection.bias.grad.abs().sum() > 0 for connection in connections.values()
    )
    deviation = ((out - plain).abs().max() / plain.abs().max()).item()
    print(json.dumps({"sites": len(connections), "deviation": deviation, "learns": learns}))  # noqa: T201 - its result


if __name__ == "__main__":
    _main()
