"""`mhc demo`: the data, the two sides, resuming bit for bit, interruption, and what is printed and written."""

from __future__ import annotations

import copy
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from click.testing import CliRunner, Result

from mhc_compile.cli.demo import command
from mhc_compile.errors import MhcError, OptionError
from mhc_compile.tools.demo import checkpoint, corpus, requirements, session, training
from mhc_compile.tools.demo.interrupt import Interrupts
from mhc_compile.tools.demo.plots import draw, smooth, terminal_plots
from mhc_compile.tools.demo.settings import Settings
from mhc_compile.tools.demo.side import Side
from mhc_compile.tools.demo.tasks import make_task
from mhc_compile.tools.demo.training import Duel, rate

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest.importorskip("transformers")
pytest.importorskip("plotext")
pytest.importorskip("matplotlib")

TINY = [
    "--inner-backend",
    "eager",
    "--layers",
    "1",
    "--width",
    "32",
    "--batch",
    "2",
    "--context",
    "16",
    "--dropout",
    "0.1",
]
SETTINGS = Settings(inner_backend="eager", layers=1, width=32, batch=2, context=16, dropout=0.1)


def demo(*args: str | Path, tiny: list[str] | None = None) -> Result:
    """The command in this process."""
    return CliRunner().invoke(command, [*(TINY if tiny is None else tiny), "--quiet", *map(str, args)])


def start(out: Path, *args: str) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "mhc_compile", "demo", *TINY, "--out", str(out), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "error::UserWarning", "OMP_NUM_THREADS": "1"},
    )


def wait_for_steps(out: Path, process: subprocess.Popen[str], steps: int) -> None:
    """Returns when the checkpoint in `out` has that many."""
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        if (out / checkpoint.NAME).exists() and checkpoint.load(out / checkpoint.NAME)["run"]["step"] >= steps:
            return
        time.sleep(0.05)
    pytest.fail(f"no checkpoint with {steps} steps; exit {process.poll()}: {process.communicate()[1]}")


def same_run(one: Path, other: Path) -> None:
    """Both checkpoints hold the same weights, optimizer state and histories, bit for bit."""
    a, b = (checkpoint.load(path / checkpoint.NAME)["run"] for path in (one, other))
    assert a["step"] == b["step"]
    for name in ("plain", "mhc"):
        mine, theirs = a["sides"][name], b["sides"][name]
        assert mine["losses"] == theirs["losses"]
        assert len(mine["losses"]) == a["step"]
        assert mine["validation"] == theirs["validation"]
        assert mine["model"].keys() == theirs["model"].keys()
        for key, value in mine["model"].items():
            assert torch.equal(value, theirs["model"][key]), key
        assert mine["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]
        for key, state in mine["optimizer"]["state"].items():
            for entry, value in state.items():
                assert torch.equal(value, theirs["optimizer"]["state"][key][entry]), (key, entry)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from more, and the processes that are compared must have equally many."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data() -> corpus.Corpus:
    return corpus.load_corpus()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A run of 12 steps in one go, and what it printed."""
    out = tmp_path_factory.mktemp("whole")
    result = CliRunner().invoke(command, [*TINY, "--steps", "12", "--out", str(out)])
    assert result.exit_code == 0, result.output
    return out, result


# The data


def test_split_is_by_file_and_disjoint(data: corpus.Corpus) -> None:
    train, validation = set(data.train.files), set(data.validation.files)
    assert not train & validation
    assert 0.05 < len(validation) / len(train | validation) < 0.15
    assert {corpus.is_validation(path) for path in validation} == {True}
    assert {corpus.is_validation(path) for path in train} == {False}
    assert not [path for path in train | validation if "site-packages" in path or "/tests/" in path]
    assert "argparse.py" in train | validation


def test_split_depends_on_the_path_alone() -> None:
    # Written down, so that a change of the hash, which would mix training and validation of old checkpoints, is seen.
    names = ["argparse.py", "asyncio/locks.py", "json/decoder.py", "netrc.py", "operator.py", "typing.py", "uuid.py"]
    assert [name for name in names if corpus.is_validation(name)] == ["asyncio/locks.py", "netrc.py", "operator.py"]


def test_bytes_of_a_split_are_its_files(data: corpus.Corpus) -> None:
    import sysconfig

    root = Path(sysconfig.get_paths()["stdlib"])
    split = data.validation
    for index in (0, len(split.files) - 1):
        content = (root / split.files[index]).read_bytes()
        begin = split.starts[index]
        assert bytes(split.data[begin : begin + len(content) + 1].tolist()) == content + b"\0"


def test_loading_is_deterministic_and_capped(tmp_path: Path) -> None:
    for name in ("a.py", "b.py", "c.py", "d/e.py", "f.py", "g.py", "h.py", "i.py", "j.py", "k.py", "l.py", "m.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n" * 10)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "no.py").write_text("no")
    (tmp_path / "no.txt").write_text("no")
    for number in range(40):  # enough for a validation file
        (tmp_path / f"more{number}.py").write_text("x = 1\n")
    everything = corpus.load_corpus(tmp_path)
    again = corpus.load_corpus(tmp_path)
    assert everything.digest == again.digest
    assert torch.equal(everything.train.data, again.train.data)
    assert not [path for path in (*everything.train.files, *everything.validation.files) if "no" in path]
    size = len(everything.train.data) + len(everything.validation.data)
    fewer = corpus.load_corpus(tmp_path, limit=size // 2)
    assert set(fewer.train.files) < set(everything.train.files)
    assert len(fewer.train.data) + len(fewer.validation.data) <= size // 2 + 60  # and a zero byte behind each
    (tmp_path / "a.py").write_text("changed")
    assert corpus.load_corpus(tmp_path).digest != everything.digest


def test_no_sources_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MhcError, match="found 0 Python files"):
        corpus.load_corpus(tmp_path)


def test_batches_are_a_function_of_seed_and_step(data: corpus.Corpus) -> None:
    task, again = (make_task(data, SETTINGS) for _ in range(2))
    inputs, targets = task.training(3)
    assert inputs.shape == targets.shape == (2, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(inputs, again.training(3)[0])
    assert not torch.equal(inputs, task.training(4)[0])
    assert not torch.equal(inputs, make_task(data, Settings(**{**SETTINGS.to_dict(), "seed": 1})).training(3)[0])


def test_image_task_draws_pieces_of_its_own_split(data: corpus.Corpus) -> None:
    task = make_task(data, Settings(model="vit", batch=4, context=4))
    inputs, targets = task.validation()[0]
    assert inputs.shape == (4, 1, 16, 16)
    assert inputs.dtype == torch.float32
    assert inputs.abs().max() <= 1
    held_out = bytes(data.validation.data.tolist())
    for image, target in zip(inputs, targets, strict=True):
        piece = bytes(((image + 1) * 127.5).round().to(torch.uint8).flatten().tolist())
        assert piece in held_out
        assert 0 <= target < task.classes == 8


# The two sides


def test_both_sides_start_equal_and_only_mhc_has_hyper_connections(data: corpus.Corpus) -> None:
    duel = Duel(SETTINGS, make_task(data, SETTINGS))
    plain, mhc = (side.model.state_dict() for side in duel.sides)
    assert plain.keys() < mhc.keys()
    assert {key for key in mhc if ".mhc." not in key} == plain.keys()
    assert all(torch.equal(value, mhc[key]) for key, value in plain.items())
    losses = duel.advance()
    assert losses.plain == pytest.approx(losses.mhc, abs=1e-5)
    assert 5 < losses.plain < 6
    phis = [value for key, value in duel.mhc.model.state_dict().items() if key.endswith("phi")]
    assert len(phis) == 2
    assert all(phi.abs().max() > 0 for phi in phis)  # it is the rewritten model that ran
    trained = {id(parameter) for group in duel.mhc.optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in duel.mhc.model.parameters()}


def test_different_weights_are_rejected() -> None:
    one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    with pytest.raises(MhcError, match="weight differs"):
        training.check_same_weights(one, other)


@pytest.mark.slow
def test_validation_changes_nothing(data: corpus.Corpus) -> None:
    duel = Duel(SETTINGS, make_task(data, SETTINGS))
    duel.advance()
    before = [copy.deepcopy(side.model.state_dict()) for side in duel.sides]
    first, second = duel.validate(), duel.validate()
    assert first == second  # no dropout
    assert max(site.entering.distance for site in duel.stability().sites) > 0
    for side, state in zip(duel.sides, before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in side.model.state_dict().items())
        assert all(module.training for module in side.model.modules())


def test_learning_rate_depends_on_the_step_alone() -> None:
    rates = [rate(step, 1.0) for step in range(1000)]
    assert rates[:2] == [0.01, 0.02]
    assert max(rates) == rates[99] == 1.0
    assert rates[399] == pytest.approx(0.5)


def test_step_seconds_leave_compilation_out(data: corpus.Corpus) -> None:
    side = Side("plain", torch.nn.Linear(2, 2), backend="eager", lr=0.1)
    state = side.state_dict()
    state |= {
        "losses": [1.0] * 8,
        "seconds": [30.0, 9.0, 9.0, 1.0, 1.0, 20.0, 9.0, 1.0],
        "starts": [[0, 0.5], [5, 0.0]],
    }
    side.load_state_dict(state)
    assert side.step_seconds == 1.0
    assert side.compile_seconds == [29.5, 19.0]


@pytest.mark.parametrize("model", ["llama", "vit"])
@pytest.mark.slow
def test_other_models(model: str, tmp_path: Path) -> None:
    tiny = [value if value != "16" else "4" for value in TINY] if model == "vit" else TINY
    result = demo("--model", model, "--steps", 2, "--out", tmp_path, "--json", tiny=tiny)
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["sites"] == 2
    assert figures["first_step"]["difference"] == pytest.approx(0, abs=1e-5)
    assert figures["unit"] == ("patch" if model == "vit" else "byte")


# Resuming


def test_resume_is_bit_for_bit(whole: tuple[Path, Result], tmp_path: Path) -> None:
    first = demo("--steps", 5, "--out", tmp_path)
    assert first.exit_code == 0, first.output
    assert checkpoint.load(tmp_path / checkpoint.NAME)["run"]["step"] == 5
    # Only --steps is new; the rest comes from the checkpoint.
    second = demo("--resume", "--steps", 12, "--out", tmp_path, tiny=[])
    assert second.exit_code == 0, second.output
    same_run(whole[0], tmp_path)


def test_the_comparison_sees_one_bit(whole: tuple[Path, Result], tmp_path: Path) -> None:
    content = checkpoint.load(whole[0] / checkpoint.NAME)
    weight = content["run"]["sides"]["mhc"]["model"]["transformer.wte.weight"]
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(2.0))
    checkpoint.save(tmp_path / checkpoint.NAME, content)
    with pytest.raises(AssertionError):
        same_run(whole[0], tmp_path)


@pytest.mark.slow
def test_resume_is_bit_for_bit_under_inductor(tmp_path: Path) -> None:
    # Long enough, and on threads enough, that additions in the order of arrival would show.
    tiny = ["inductor" if value == "eager" else "128" if value == "16" else value for value in TINY]
    for out, steps, more in (("whole", "60", []), ("halves", "20", []), ("halves", "60", ["--resume"])):
        # A process each: nothing of the first half may survive in memory.
        arguments = [*tiny, "--quiet", "--steps", steps, "--out", str(tmp_path / out), *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "2"}
        subprocess.run(
            [sys.executable, "-m", "mhc_compile", "demo", *arguments], check=True, capture_output=True, env=environment
        )
    same_run(tmp_path / "whole", tmp_path / "halves")


@pytest.mark.slow
def test_killed_run_resumes_bit_for_bit(whole: tuple[Path, Result], tmp_path: Path) -> None:
    process = start(tmp_path, "--steps", "100000", "--save-every", "0")
    wait_for_steps(tmp_path, process, 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    saved = checkpoint.load(tmp_path / checkpoint.NAME)["run"]["step"]
    steps = max(12, saved)
    assert demo("--resume", "--steps", steps, "--out", tmp_path).exit_code == 0
    if steps > 12:  # a fast machine: the reference has to be as long
        assert demo("--resume", "--steps", steps, "--out", whole[0]).exit_code == 0
    same_run(whole[0], tmp_path)


@pytest.mark.slow
def test_interrupt_leaves_a_usable_checkpoint(tmp_path: Path) -> None:
    process = start(tmp_path, "--steps", "100000")
    wait_for_steps(tmp_path, process, 1)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == ""
    step = checkpoint.load(tmp_path / checkpoint.NAME)["run"]["step"]
    assert (
        stderr.splitlines()[-1] == f"Interrupted after step {step}. Continue with: mhc demo --resume --out {tmp_path}"
    )
    assert "Traceback" not in stderr
    resumed = demo("--resume", "--steps", step + 1, "--out", tmp_path)
    assert resumed.exit_code == 0, resumed.output
    assert checkpoint.load(tmp_path / checkpoint.NAME)["run"]["step"] == step + 1


def test_interrupt_before_the_first_step_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deterministic = []

    def interrupted(self: Duel) -> None:
        deterministic.append(torch.are_deterministic_algorithms_enabled())
        raise KeyboardInterrupt

    monkeypatch.setattr(Duel, "advance", interrupted)
    result = demo("--out", tmp_path)
    assert result.exit_code == 130
    assert deterministic == [True]
    assert not torch.are_deterministic_algorithms_enabled()
    assert result.stderr == "Interrupted before the first step was done: nothing was saved.\n"
    assert not (tmp_path / checkpoint.NAME).exists()


@pytest.mark.slow
def test_half_a_step_is_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = Side.train

    def interrupted(self: Side, *args: torch.Tensor, seed: int, rate: float) -> float:
        if self.name == "mhc" and len(self.losses) == 2:  # the other side did this step already
            os.kill(os.getpid(), signal.SIGINT)
        return train(self, *args, seed=seed, rate=rate)

    monkeypatch.setattr(Side, "train", interrupted)
    result = demo("--steps", 100, "--out", tmp_path)
    assert result.exit_code == 130, result.output
    content = checkpoint.load(tmp_path / checkpoint.NAME)["run"]
    assert content["step"] == 3
    assert [len(side["losses"]) for side in content["sides"].values()] == [3, 3]


def test_shield_puts_an_interrupt_off() -> None:
    interrupts = Interrupts()
    reached = []

    def strike() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        reached.append(1)

    def strike_behind_a_shield() -> None:
        with interrupts.shield():
            strike()

    with interrupts.active():
        with pytest.raises(KeyboardInterrupt):
            strike_behind_a_shield()
        assert reached == [1]
        interrupts.pending = False
        with pytest.raises(KeyboardInterrupt):
            strike()
        assert reached == [1]


def test_resume_without_a_checkpoint(tmp_path: Path) -> None:
    result = demo("--resume", "--out", tmp_path)
    assert isinstance(result.exception, MhcError)
    assert f"there is no checkpoint {tmp_path / checkpoint.NAME} to resume" in str(result.exception)


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "other"])
def test_resume_of_a_damaged_checkpoint(damage: str, whole: tuple[Path, Result], tmp_path: Path) -> None:
    path = tmp_path / checkpoint.NAME
    good = (whole[0] / checkpoint.NAME).read_bytes()
    if damage == "other":
        torch.save({"weights": torch.zeros(2)}, path)
    else:
        path.write_bytes({"cut": good[: len(good) // 2], "text": b"hello", "empty": b""}[damage])
    result = demo("--resume", "--out", tmp_path)
    assert isinstance(result.exception, MhcError)
    assert str(path) in str(result.exception)
    assert ("is no checkpoint of this demo" if damage == "other" else "is damaged") in str(result.exception)


@pytest.mark.parametrize(
    ("option", "given", "has"),
    [
        ("--model", "llama", "gpt2"),
        ("--seed", "7", "0"),
        ("--batch", "3", "2"),
        ("--inner-backend", "aot_eager", "eager"),
    ],
)
def test_resume_with_other_settings(option: str, given: str, has: str, whole: tuple[Path, Result]) -> None:
    result = demo("--resume", "--out", whole[0], option, given, tiny=[])
    assert result.exit_code == 2
    message = " ".join(result.stderr.split())
    assert option in message
    assert given in message
    assert f"{has!r} in the checkpoint" in message or f"{has} in the checkpoint" in message


def test_resume_with_too_few_steps(whole: tuple[Path, Result]) -> None:
    result = demo("--resume", "--out", whole[0], "--steps", 1)
    assert result.exit_code == 2
    assert "--steps is 1 and the checkpoint is at step" in result.stderr


def test_resume_with_other_data(whole: tuple[Path, Result], tmp_path: Path) -> None:
    content = checkpoint.load(whole[0] / checkpoint.NAME)
    checkpoint.save(tmp_path / checkpoint.NAME, {**content, "digest": "0" * 64})
    result = demo("--resume", "--out", tmp_path)
    assert result.exit_code == 2
    assert "other files" in result.stderr


def test_a_failed_save_keeps_the_old_checkpoint(whole: tuple[Path, Result], tmp_path: Path) -> None:
    path = tmp_path / checkpoint.NAME
    content = checkpoint.load(whole[0] / checkpoint.NAME)
    checkpoint.save(path, content)
    before = path.read_bytes()
    with pytest.raises((AttributeError, TypeError, RuntimeError)):
        checkpoint.save(path, {**content, "run": lambda: None})
    assert path.read_bytes() == before


# What is printed and written


def test_summary(whole: tuple[Path, Result]) -> None:
    out, result = whole
    figures = json.loads((out / session.RESULT).read_text())
    text = result.stdout
    assert "transformer.h.0" in text  # the site report
    for side in ("plain", "mhc"):
        assert f"{figures[side]['validation'][-1][1]:.4f}" in text
        assert f"{figures[side]['loss'][0]:.6f}" in text
    for words in ("bytes per second", "compilation", "Gain of the composite H_res", "Streams:", "says nothing about"):
        assert words in text
    assert "mhc − plain" in text
    assert all(len(line) <= 80 for line in text.splitlines() if not line.startswith("Written:"))


@pytest.mark.slow
def test_json_and_a_note_about_other_conditions(whole: tuple[Path, Result], tmp_path: Path) -> None:
    content = checkpoint.load(whole[0] / checkpoint.NAME)
    content["conditions"]["threads"] = 77
    checkpoint.save(tmp_path / checkpoint.NAME, content)
    result = CliRunner().invoke(command, ["--resume", "--out", str(tmp_path), "--json"])
    assert result.exit_code == 0
    assert "written with threads 77" in result.stderr
    figures = json.loads(result.stdout)
    assert figures == json.loads((tmp_path / session.RESULT).read_text())
    assert figures["plain"] == json.loads((whole[0] / session.RESULT).read_text())["plain"]
    assert set(figures) == _documented_keys("")
    assert set(figures["mhc"]) == _documented_keys("[.]")
    steps = figures["steps"]
    for side in ("plain", "mhc"):
        assert len(figures[side]["loss"]) == steps
        assert figures[side]["validation"][-1][0] == steps
        assert figures[side]["tokens_per_second"] == pytest.approx(2 * 16 / figures[side]["step_seconds"])
    assert figures["mhc"]["parameters"] > figures["plain"]["parameters"]
    assert abs(figures["first_step"]["difference"]) < 1e-5
    assert 0.99 < figures["gain"]["forward"] < 1.01
    assert max(figures["streams_distance"]) > 0


def _documented_keys(prefix: str) -> set[str]:
    """The names on the left of the table in the module that makes the result."""
    from mhc_compile.tools.demo import result

    rows = re.findall(rf"^{prefix}(\w[\w, ]*?)  +\S", inspect.cleandoc(result.__doc__ or ""), re.MULTILINE)
    return {name for row in rows for name in row.split(", ")}


def test_png(whole: tuple[Path, Result]) -> None:
    image = (whole[0] / session.PICTURE).read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(image) > 20_000


def test_picture_shows_the_losses(whole: tuple[Path, Result]) -> None:
    figures = json.loads((whole[0] / session.RESULT).read_text())
    figures["mhc"]["loss"][3:5] = [7.0, 8.0]
    losses, gap = draw(figures).axes
    drawn = {line.get_label(): [list(axis) for axis in line.get_data()] for line in (*losses.lines, *gap.lines)}
    for name in ("plain", "mhc"):
        side = figures[name]
        steps = list(range(1, 13))
        assert drawn[f"{name}, training (mean of 20 steps)"] == [steps, smooth(side["loss"])]
        label = f"{name}, validation {side['validation'][-1][1]:.4f}"
        assert drawn[label] == [list(axis) for axis in zip(*side["validation"], strict=True)]
    a, b = (smooth(figures[name]["loss"]) for name in ("plain", "mhc"))
    assert drawn["training (mean of 20 steps)"][1] == pytest.approx([y - x for x, y in zip(a, b, strict=True)])
    assert losses.get_ylabel() == "loss (nats per byte)"
    assert gap.get_xlabel() == "training steps"


@pytest.mark.parametrize("width", [60, 79, 100])
def test_terminal_plots_fit(width: int, whole: tuple[Path, Result]) -> None:
    import plotext

    figures = json.loads((whole[0] / session.RESULT).read_text())
    for plot in terminal_plots(figures, width):
        lines = plotext.uncolorize(plot).splitlines()
        assert max(map(len, lines)) <= width
        assert "●" in plot


def test_smoothing() -> None:
    assert smooth([4.0, 2.0, 0.0, 2.0], 2) == [4.0, 3.0, 1.0, 1.0]


def test_progress_in_a_log(whole: tuple[Path, Result]) -> None:
    lines = whole[1].stderr.splitlines()
    assert any(line.startswith("step 0 of 12: validation loss") for line in lines)
    assert not [line for line in lines if "arning" in line]


@pytest.mark.slow
def test_quiet_and_an_earlier_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Duel, "__init__", interrupted)
    (tmp_path / checkpoint.NAME).write_text("an earlier run")
    loud = CliRunner().invoke(command, ["--out", str(tmp_path)])
    assert "will be replaced" in loud.stderr
    assert len(loud.stderr.splitlines()) > 2
    assert len(demo("--out", tmp_path).stderr.splitlines()) == 1
    assert (tmp_path / checkpoint.NAME).read_text() == "an earlier run"


def test_missing_dependency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "REQUIRED", ("transformers", "no_such_library"))
    result = demo("--out", tmp_path)
    assert isinstance(result.exception, MhcError)
    assert str(result.exception) == 'the demo needs no_such_library: pip install "mhc-compile[demo]"'


def test_wrong_sizes() -> None:
    assert demo("--width", 40).exit_code == 2
    assert demo("--model", "vit", "--context", 5).exit_code == 2
    with pytest.raises(OptionError, match="square"):
        Settings(model="vit", context=5)


def test_help_is_fast_and_needs_no_torch() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from mhc_compile.cli.demo import command;"
        "r = CliRunner().invoke(command, ['--help']); assert r.exit_code == 0;"
        "print([m for m in ('torch', 'transformers', 'matplotlib', 'plotext') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
