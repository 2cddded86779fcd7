"""Compile a tiny model from end to end, in its own process, which may crash or hang."""

from __future__ import annotations

import json
import subprocess
import sys
import time

from mhc_compile.tools.doctor.check_result import Problem


def smoke_test(seconds: float = 300) -> str:
    """Check that two residual blocks are rewritten by Inductor, keep their function, and learn.

    A compiled call and one under `mhc_compile.eager` must compute each site once.
    """
    module, started = "mhc_compile.tools.doctor.smoke_test", time.monotonic()
    try:
        done = subprocess.run(  # noqa: S603 - this interpreter
            [sys.executable, "-m", module], capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        advice = f"Something hangs. TORCH_LOGS=+dynamo,+inductor python -m {module} shows where."
        raise Problem(f"not done after {seconds:.0f} s", advice) from error
    if done.returncode != 0 or not done.stdout.strip():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        cause = next((line for line in reversed(lines) if "Error" in line.split(":")[0]), lines[-1])
        raise Problem(f"exit code {done.returncode}: {cause}", f"python -m {module} shows the whole trace.")
    seen, duration = json.loads(done.stdout.splitlines()[-1]), time.monotonic() - started
    found = f"{seen['sites']} sites, computed by compiled and eager calls, largest deviation {seen['deviation']:.0e}, {duration:.0f} s"
    expected = {
        "2 were expected; is compiling switched off?": seen["sites"] == 2,
        "the compiled model computes something else": seen["deviation"] <= 1e-5,
        "no gradient reaches the new parameters": seen["learns"],
        "a compiled and an eager call did not compute every site once each": set(seen["computed"]) == {2},
    }
    if wrong := next((text for text, holds in expected.items() if not holds), None):
        raise Problem(f"{found}: {wrong}", f"python -m {module} prints what it measured; please report it.")
    return found


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
    gradients = [connection.bias.grad for connection in mhc_compile.connections(model).values()]
    learns = bool(gradients) and all(grad is not None and bool(grad.any()) for grad in gradients)
    mhc_compile.eager(model)(x)
    computed = [site.computed for site in mhc_compile.audit(model).sites]
    deviation = ((out - plain).abs().max() / plain.abs().max()).item()
    seen = {"sites": len(gradients), "deviation": deviation, "learns": learns, "computed": computed}
    print(json.dumps(seen))  # noqa: T201 - its result


if __name__ == "__main__":
    _main()
