"""Run every example as it is, in its own process, and compare its output with the guide's quote.

`pytest --regenerate` writes changed words into the guide.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.guides import EXAMPLES, ROOT, environment, quoted_output, same_words

pytest.importorskip("transformers")

TINY = ["--layers", "1", "--width", "16"]
TINY_GPT = ["--layers", "1", "--width", "32", "--batch", "2", "--context", "16"]
EAGER = ["--inner-backend", "eager"]
EAGER_OPTIONS = ["--options", '{"inner_backend": "eager"}']


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments in the repository's root; a non-zero exit fails the test."""
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
        cwd=ROOT,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done


def example(script: str, *arguments: str) -> str:
    """Run an example, in which warnings of this package are errors, and return what it prints."""
    assert (EXAMPLES / script).exists()
    return run("-W", "error::UserWarning:__main__", f"examples/{script}", *arguments).stdout


def number_after(words: str, text: str) -> float:
    found = re.search(re.escape(words) + r" ([\d.e+-]+)", text)
    assert found, text
    return float(found[1])


def test_every_example_is_run_by_a_test():
    sources = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    scripts = [path for path in EXAMPLES.rglob("*.py") if "experiment" not in path.parts]  # modules of stability/run.py
    assert len(scripts) >= 11
    for path in scripts:
        name = path.relative_to(EXAMPLES).as_posix()
        spelled = (f'"{name}"', f'examples/{name}"', f'"{path.parent.name}" / "{path.name}"')
        elsewhere = name == "stability/run.py" and 'FOLDER / "run.py"' in sources
        assert elsewhere or any(name in sources for name in spelled), f"no test in tests/examples runs examples/{name}"


def test_plain_training(regenerate):
    script = "examples/unmodified_script/plain_training.py"
    assert "mhc" not in (ROOT / script).read_text()
    done = run("-m", "mhc_compile", "run", *EAGER, script, "--steps", "6", "--layers", "1")
    assert "2 hyper-connections" in done.stderr or "2 rewritten" in done.stderr
    same_words("unmodified_script", f"mhc run {script}", done.stderr + done.stdout, regenerate)
    plain = run(script, "--steps", "2", "--layers", "1").stdout  # needs nothing of this package
    assert plain.startswith("step    1  loss")


def test_own_mapping(regenerate):
    printed = example("configuration/own_mapping.py", *EAGER, *TINY, "--steps", "2")
    assert number_after("difference at the start:", printed) < 1e-5
    command = "python examples/configuration/own_mapping.py --inner-backend eager"
    same_words("configuration", command, printed, regenerate)


def test_own_preset(regenerate):
    printed = example("configuration/own_preset.py", *EAGER, "--width", "16", "--layers", "4")
    assert number_after("difference at the start:", printed) < 1e-4
    assert printed.count("identity") == 2
    assert printed.count("kronecker") == 6
    command = "python examples/configuration/own_preset.py --inner-backend eager"
    same_words("configuration", command, printed, regenerate)


def test_graph_break(regenerate):
    printed = example("graph_breaks/graph_break.py")
    assert number_after("largest difference:", printed) < 1e-5
    assert number_after("with breaks:", printed) > 1
    same_words("graph_breaks", "python examples/graph_breaks/graph_break.py", printed, regenerate)


def test_round_trip(regenerate):
    printed = example("interop/round_trip.py")
    assert printed.count("to the last bit: True") == 2
    same_words("interop", "python examples/interop/round_trip.py", printed, regenerate)


@pytest.mark.slow
def test_inspect_model():
    printed = example("inspect/inspect_model.py", *EAGER, *TINY)
    for words in (
        "2 sites in 1 chain",
        "layers.0.mhc.linear2: rewritten",
        "normalize → plan",
        "2 sites are live",
        "forward",
    ):
        assert words in printed


@pytest.mark.slow
def test_export_program(regenerate):
    printed = example("export/export_program.py", *TINY, "--steps", "2")
    assert number_after("largest difference:", printed) < 1e-5
    same_words("export", "python examples/export/export_program.py", printed, regenerate)


@pytest.mark.slow
def test_pictures(tmp_path):
    """Compare with what the commands draw today; the picture of the page needs a browser."""
    run("examples/inspect/pictures/make.py", "--folder", str(tmp_path), "--no-page")
    folder = EXAMPLES / "inspect" / "pictures"
    for name in ("trunk.svg", "diff.svg", "kernels.svg"):
        made = (tmp_path / name).read_text()
        assert made.startswith("<svg")
        if name == "trunk.svg":
            assert made == (folder / name).read_text(), "make it again with examples/inspect/pictures/make.py"


def train(*arguments: str) -> tuple[list[float], int]:
    """Run training/train.py; return its losses, and how many parameters its optimizer trains."""
    printed = example("training/train.py", *TINY_GPT, "--steps", "3", *arguments)
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", printed)]
    return losses, int(re.search(r"trains ([\d,]+) parameters", printed)[1].replace(",", ""))


def compare(plain: tuple[list[float], int], mhc: tuple[list[float], int], streams: int) -> None:
    """Assert equal first losses, and that the optimizer trains the parameters of both sites."""
    assert len(plain[0]) == len(mhc[0]) == 2
    assert plain[0][0] == pytest.approx(mhc[0][0], abs=2e-4)  # four decimals are printed
    columns = 2 * streams + streams**2
    assert mhc[1] - plain[1] == 2 * (streams * 32 * columns + columns + 3)


@pytest.mark.slow
def test_train_with_both_backends():
    plain = train("--backend", "eager")
    compare(plain, train("--backend", "mhc", "--options", '{"inner_backend": "eager", "streams": 2}'), 2)


@pytest.mark.slow
def test_train_with_both_backends_under_inductor():
    compare(train("--backend", "inductor"), train("--backend", "mhc"), 4)


@pytest.mark.slow
def test_trainer_resumes(tmp_path):
    pytest.importorskip("accelerate")

    def steps(folder: Path) -> list[str]:
        arguments = ["--output", str(folder), "--steps", "4", "--save-every", "2", *TINY_GPT, *EAGER_OPTIONS]
        done = run("examples/training/trainer.py", *arguments)
        assert "unexpected keys" not in done.stderr
        assert "2 hyper-connections, 2 of them trained" in done.stdout
        return [line for line in done.stdout.splitlines() if not line.startswith("{")]  # the Trainer's own have times

    whole = steps(tmp_path / "whole")
    # The schedule depends on the number of steps, so the interrupted run is half of a full one.
    (tmp_path / "half").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "half" / "checkpoint-2")
    assert steps(tmp_path / "half") == whole
    assert [line.split()[:2] for line in whole[:4]] == [["step", str(step)] for step in range(1, 5)]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_distributed_training(parallel):
    tiny = ["--steps", "2", "--layers", "2", "--width", "16", "--length", "8", "--parallel", parallel]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run(*launcher, str(EXAMPLES / "distributed/train.py"), *EAGER, *tiny)
    assert "MhcWarning" not in done.stderr
    first, second, end = done.stdout.splitlines()
    assert float(first.split()[-1]) > float(second.split()[-1])
    shown = "".join(
        quoted_output(EXAMPLES / "distributed" / "README.md", f"torchrun --standalone --nproc-per-node 2 {rest}")
        for rest in ("examples/distributed/train.py", "examples/distributed/train.py --parallel fsdp --bf16")
    )
    assert re.sub(r"\d[\d,.]*", "#", end) in re.sub(r"\d[\d,.]*", "#", shown)
