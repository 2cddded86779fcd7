"""The examples run as they are, in a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = ["--steps", "3", "--layers", "1", "--width", "32", "--batch", "2", "--context", "16"]


def train(*args: str) -> tuple[list[float], int]:
    """Runs train.py: the losses that it printed, and how many parameters its optimizer trains."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(EXAMPLES / "training" / "train.py"), *TINY, *args],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", done.stdout)]
    trained = re.search(r"trains ([\d,]+) parameters", done.stdout)
    assert trained
    return losses, int(trained[1].replace(",", ""))


def compare(plain: tuple[list[float], int], mhc: tuple[list[float], int], streams: int) -> None:
    """Same start, and the optimizer that existed before the first call trains the hyper-connections of both sites."""
    assert len(plain[0]) == len(mhc[0]) == 2
    assert plain[0][0] == pytest.approx(mhc[0][0], abs=2e-4)  # four decimals are printed
    columns = 2 * streams + streams**2
    assert mhc[1] - plain[1] == 2 * (streams * 32 * columns + columns + 3)


@pytest.mark.slow
def test_train_with_both_backends() -> None:
    plain = train("--backend", "eager")
    compare(plain, train("--backend", "mhc", "--options", '{"inner_backend": "eager", "streams": 2}'), 2)


def test_plain_training_and_the_output_that_its_readme_shows() -> None:
    script = str(EXAMPLES / "unmodified_script" / "plain_training.py")
    assert "mhc" not in Path(script).read_text()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mhc_compile",
            "run",
            "--inner-backend",
            "eager",
            script,
            "--steps",
            "6",
            "--layers",
            "1",
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    readme = (EXAMPLES / "training" / "README.md").read_text().split("$ mhc run examples/plain_training.py\n")[1].split("```")[0]

    def words(text: str) -> str:
        return re.sub(r"\s+", " ", re.sub(r"[\d,]*\d(\.\d+)?", "#", text))

    assert "2 hyper-connections" in done.stderr
    assert words(done.stderr + done.stdout) == words(readme)


@pytest.mark.slow
def test_export_program_and_the_output_that_its_readme_shows() -> None:
    command = [sys.executable, "-W", "error::UserWarning:__main__", str(EXAMPLES / "export" / "export_program.py")]
    tiny = ["--layers", "1", "--width", "16", "--steps", "2"]
    done = subprocess.run(
        [*command, *tiny], capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    readme = (EXAMPLES / "training" / "README.md").read_text().split("$ python examples/export_program.py\n")[1].split("```")[0]

    def words(text: str) -> str:
        """Numbers left out: this run is smaller than the one shown."""
        return re.sub(r"\s+", " ", re.sub(r"\d+(\.\d+)?(e-\d+)?", "#", text))

    assert words(done.stdout) == words(readme)
    difference = re.search(r"largest difference: (.*)", done.stdout)
    assert difference
    assert float(difference[1]) < 1e-5


def test_own_mapping_and_the_output_that_its_readme_shows() -> None:
    command = [sys.executable, "-W", "error::UserWarning:__main__", str(EXAMPLES / "configuration" / "own_mapping.py")]
    tiny = ["--inner-backend", "eager", "--layers", "1", "--width", "16", "--steps", "2"]
    done = subprocess.run(
        [*command, *tiny], capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    shown = (EXAMPLES / "training" / "README.md").read_text().split("$ python examples/own_mapping.py --inner-backend eager\n")[1]

    def words(text: str) -> str:
        """Numbers left out: this run is smaller than the one shown."""
        return re.sub(r"\s+", " ", re.sub(r"\d+(\.\d+)?(e-\d+)?", "#", text))

    assert words(done.stdout) == words(shown.split("```")[0])
    difference = re.search(r"largest difference at the start: (.*)", done.stdout)
    assert difference
    assert float(difference[1]) < 1e-5


@pytest.mark.slow
def test_train_with_both_backends_under_inductor() -> None:
    compare(train("--backend", "inductor"), train("--backend", "mhc"), 4)


@pytest.mark.slow
def test_trainer_goes_on_where_it_was(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")

    def run(folder: Path, steps: int) -> list[str]:
        command = [sys.executable, str(EXAMPLES / "training" / "trainer.py"), "--output", str(folder), "--steps", str(steps)]
        tiny = ["--layers", "1", "--width", "32", "--batch", "2", "--context", "16", "--save-every", "2"]
        done = subprocess.run(
            [*command, *tiny, "--options", '{"inner_backend": "eager"}'],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        assert "unexpected keys" not in done.stderr
        assert "2 hyper-connections, of which 2 have learnt" in done.stdout
        return [
            line for line in done.stdout.splitlines() if not line.startswith("{")
        ]  # the Trainer's own lines have times

    whole = run(tmp_path / "whole", 4)
    # A schedule depends on how long the run is to be, so the interrupted one is the longer one's first half.
    (tmp_path / "half").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "half" / "checkpoint-2")
    assert run(tmp_path / "half", 4) == whole
    assert [line.split()[:2] for line in whole[:4]] == [["step", str(step)] for step in range(1, 5)]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_distributed_training_and_the_output_that_its_readme_shows(parallel: str) -> None:
    script = EXAMPLES / "distributed" / "train.py"
    tiny = [
        "--inner-backend",
        "eager",
        "--steps",
        "2",
        "--layers",
        "2",
        "--width",
        "16",
        "--length",
        "8",
        "--parallel",
        parallel,
    ]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), *tiny],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "MhcWarning" not in done.stderr
    first, second, end = done.stdout.splitlines()
    assert float(first.split()[-1]) > float(second.split()[-1])
    shown = (EXAMPLES / "distributed" / "README.md").read_text()
    assert re.sub(r"\d[\d,.]*", "#", end) in re.sub(r"\d[\d,.]*", "#", shown)
