"""`mhc demo`: data, models, resuming bit for bit, interruption, summary and files."""

from __future__ import annotations

import copy
import inspect
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from click.testing import CliRunner, Result

from mhc_compile.cli.demo import command
from mhc_compile.errors import MhcError, OptionError
from mhc_compile.tools.demo import CHECKPOINT, LOG, PICTURE, RESULT, Settings
from mhc_compile.tools.demo.data import Corpus, NextByte, is_validation, load_corpus, make_task
from mhc_compile.tools.demo.report import collect, draw, smooth
from mhc_compile.tools.demo.session import load_checkpoint, save_checkpoint, shield
from mhc_compile.tools.demo.train import PairedTraining, Trainer, build_model, learning_rate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

ALONE = ["--seeds", "1"]
TINY = [
    *ALONE,
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
    """Run the command in this process."""
    return CliRunner().invoke(command, [*(TINY if tiny is None else tiny), "--quiet", *map(str, args)])


def start(out: Path, *args: str) -> subprocess.Popen[str]:
    """Start the command in its own process, which heeds SIGINT even if this one, in a shell's
    background, ignores it.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "mhc_compile", "demo", *TINY, "--out", str(out), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "error::UserWarning", "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for_steps(out: Path, process: subprocess.Popen[str], steps: int) -> None:
    """Return when the checkpoint in `out` has that many."""
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if (out / CHECKPOINT).exists() and load_checkpoint(out / CHECKPOINT)["run"]["step"] >= steps:
            return
        time.sleep(0.05)
    code = process.poll()
    process.kill()
    pytest.fail(f"no checkpoint with {steps} steps; exit {code}: {process.communicate()[1]}")


def same_run(one: Path, other: Path) -> None:
    """Both checkpoints hold the same weights, optimizer state and histories, bit for bit."""
    a, b = (load_checkpoint(path / CHECKPOINT)["run"] for path in (one, other))
    assert a["step"] == b["step"]
    assert a["validation"] == b["validation"]
    assert a["validation"]
    for name in ("plain", "mhc"):
        mine, theirs = a[name], b[name]
        assert mine["losses"] == theirs["losses"]
        assert len(mine["losses"]) == a["step"]
        assert mine["model"].keys() == theirs["model"].keys()
        for key, value in mine["model"].items():
            assert torch.equal(value, theirs["model"][key]), key
        assert mine["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]
        for key, state in mine["optimizer"]["state"].items():
            for entry, value in state.items():
                assert torch.equal(value, theirs["optimizer"]["state"][key][entry]), (key, entry)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Use one thread: the processes that are compared must have equally many."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data() -> Corpus:
    return load_corpus()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Run 12 steps in one go, and keep the initial weights and the checkpoint after 5 steps.

    Attributes: `out` (folder, with `step5.pt`), `result` (output), `training`, `weights` by name.
    """
    run = SimpleNamespace(out=tmp_path_factory.mktemp("whole"))

    def save(path: Path, content: dict[str, Any]) -> None:
        save_checkpoint(path, content)
        if content["run"]["step"] == 5:
            shutil.copy(path, run.out / "step5.pt")

    def build(settings: Settings, task: NextByte) -> PairedTraining:
        run.training = PairedTraining(settings, task)
        run.weights = {
            name: copy.deepcopy(trainer.model.state_dict()) for name, trainer in run.training.trainers.items()
        }
        return run.training

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mhc_compile.tools.demo.session.save_checkpoint", save)
        patch.setattr("mhc_compile.tools.demo.session.PairedTraining", build)
        run.result = CliRunner().invoke(command, [*TINY, "--steps", "12", "--save-every", "0", "--out", str(run.out)])
    assert run.result.exit_code == 0, run.result.output
    return run


@pytest.fixture(scope="module")
def whole(recorded: SimpleNamespace) -> tuple[Path, Result]:
    return recorded.out, recorded.result


# The data


def test_split_is_by_file_and_disjoint(data: Corpus) -> None:
    train, validation = set(data.train.contents), set(data.validation.contents)
    assert not train & validation
    assert 0.05 < len(validation) / len(train | validation) < 0.15
    assert {is_validation(path) for path in validation} == {True}
    assert {is_validation(path) for path in train} == {False}
    assert not [path for path in train | validation if "site-packages" in path or "/tests/" in path]
    assert "argparse.py" in train | validation


def test_split_depends_on_the_path_alone() -> None:
    # A change of the hash would mix training and validation of old checkpoints.
    names = ["argparse.py", "asyncio/locks.py", "json/decoder.py", "netrc.py", "operator.py", "typing.py", "uuid.py"]
    assert [name for name in names if is_validation(name)] == ["asyncio/locks.py", "netrc.py", "operator.py"]


def test_bytes_of_a_split_are_its_files(data: Corpus) -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    contents = b"".join((root / path).read_bytes() + b"\0" for path in sorted(data.validation.contents))
    assert bytes(data.validation.data.tolist()) == contents


def test_loading_is_deterministic_and_the_digest_of_all_contents(tmp_path: Path) -> None:
    for name in ("a.py", "b.py", "c.py", "d/e.py", "f.py", "g.py", "h.py", "i.py", "j.py", "k.py", "l.py", "m.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n" * 10)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "no.py").write_text("no")
    (tmp_path / "no.txt").write_text("no")
    for number in range(40):  # enough for a validation file
        (tmp_path / f"more{number}.py").write_text("x = 1\n")
    everything = load_corpus(tmp_path)
    again = load_corpus(tmp_path)
    assert everything.digest == again.digest
    assert torch.equal(everything.train.data, again.train.data)
    assert not [path for path in (*everything.train.contents, *everything.validation.contents) if "no" in path]
    (tmp_path / "a.py").write_text("changed")
    assert load_corpus(tmp_path).digest != everything.digest


def test_no_sources_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MhcError, match="found 0 Python files"):
        load_corpus(tmp_path)


def test_batches_are_a_function_of_seed_and_step(data: Corpus) -> None:
    task, again = (make_task(data, SETTINGS) for _ in range(2))
    inputs, targets = task.training(3)
    assert inputs.shape == targets.shape == (2, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(inputs, again.training(3)[0])
    assert not torch.equal(inputs, task.training(4)[0])
    assert not torch.equal(inputs, make_task(data, replace(SETTINGS, seed=1)).training(3)[0])


def test_image_task_draws_pieces_of_its_own_split(data: Corpus) -> None:
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


# The two models


def test_both_models_start_equal_and_only_mhc_has_hyper_connections(recorded: SimpleNamespace) -> None:
    plain, mhc = recorded.weights["plain"], recorded.weights["mhc"]
    assert plain.keys() < mhc.keys()
    assert {key for key in mhc if ".mhc." not in key} == plain.keys()
    assert all(torch.equal(value, mhc[key]) for key, value in plain.items())
    losses = [trainer.losses[0] for trainer in recorded.training.trainers.values()]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0] == pytest.approx(math.log(256) + 0.5, abs=0.2)  # logits of variance 1
    trainer = recorded.training.trainers["mhc"]
    phis = [value for key, value in trainer.model.state_dict().items() if key.endswith("phi")]
    assert len(phis) == 2
    assert all(phi.abs().max() > 0 for phi in phis)  # the rewritten model ran
    trained = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in trainer.model.parameters()}


def test_different_weights_are_rejected(data: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = iter([0, 1])
    monkeypatch.setattr("mhc_compile.tools.demo.train.stable_seed", lambda *_: next(seeds))
    with pytest.raises(MhcError, match=r"start from different weights: transformer\.wte\.weight"):
        PairedTraining(SETTINGS, make_task(data, SETTINGS))


@pytest.mark.parametrize(
    ("model", "matrix"),
    [
        ("gpt2", "transformer.h.0.mlp.c_fc.weight"),
        ("llama", "model.layers.0.mlp.up_proj.weight"),
        ("vit", "vit.layers.0.mlp.fc1.weight"),
    ],
)
def test_initial_weights_fit_the_width(model: str, matrix: str) -> None:
    """With 0.02 at a width of 64 the plain model would be starved, and the comparison unfair."""
    settings = Settings.choose({"model": model, "width": 64, "layers": 1})
    deviation = build_model(settings, 8).get_parameter(matrix).std().item()
    assert deviation == pytest.approx(1 / 8, rel=0.05)


@pytest.mark.slow
def test_validation_changes_nothing(data: Corpus) -> None:
    pair = PairedTraining(SETTINGS, make_task(data, SETTINGS))
    pair.advance()
    before = [copy.deepcopy(trainer.model.state_dict()) for trainer in pair.trainers.values()]
    first = pair.validate()
    assert pair.validation.pop(pair.step) == first
    assert pair.validate() == first  # no dropout
    assert max(site.entering.distance for site in pair.measure_streams().sites) > 0
    for trainer, state in zip(pair.trainers.values(), before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in trainer.model.state_dict().items())
        assert all(module.training for module in trainer.model.modules())


def test_learning_rate_depends_on_the_step_alone() -> None:
    rates = [learning_rate(step, 1.0) for step in range(1000)]
    assert rates[:2] == [0.01, 0.02]
    assert max(rates) == rates[99] == 1.0
    assert rates[399] == pytest.approx(0.5)


def test_step_seconds_leave_compilation_out() -> None:
    trainer = Trainer(torch.nn.Linear(2, 2), "eager", None, 7.0)
    state = trainer.state_dict()
    state |= {
        "losses": [1.0] * 8,
        "seconds": [30.0, 9.0, 9.0, 1.0, 1.0, 20.0, 9.0, 1.0],
        "starts": [(0, 0.5), (5, 0.25)],
    }
    trainer.load_state_dict(state)
    assert trainer.step_seconds == 1.0
    assert trainer.compile_seconds == [0.5, 0.25]  # this process has trained no step yet
    trainer.losses.append(1.0)
    trainer.seconds.append(5.0)
    assert trainer.compile_seconds == [0.5, 0.25, 7.0]


def test_compilation_is_timed_before_the_first_step_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    training, other = (PairedTraining(SETTINGS, make_task(load_corpus(), SETTINGS)) for _ in range(2))
    real = Trainer._loss
    monkeypatch.setattr(Trainer, "_loss", lambda *args: (time.sleep(0.1), real(*args))[1])
    for trainer in training.trainers.values():
        before, preparation = copy.deepcopy(trainer.model.state_dict()), trainer.starts[0][1]
        trainer.compile(*training.task.training(0))
        assert trainer.starts[0][1] >= preparation + 0.1
        assert all(torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())
        assert all(parameter.grad is None for parameter in trainer.model.parameters())
        assert (trainer.losses, trainer.optimizer.state_dict()["state"]) == ([], {})
    monkeypatch.undo()
    assert training.advance() == other.advance()
    for trainer in training.trainers.values():
        assert trainer.compile_seconds == [trainer.starts[0][1]]


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
    shutil.copy(whole[0] / "step5.pt", tmp_path / CHECKPOINT)
    assert load_checkpoint(tmp_path / CHECKPOINT)["run"]["step"] == 5
    # Only --steps is new; the rest comes from the checkpoint.
    second = demo("--resume", "--steps", 12, "--out", tmp_path, tiny=ALONE)
    assert second.exit_code == 0, second.output
    same_run(whole[0], tmp_path)


def test_the_comparison_sees_one_bit(whole: tuple[Path, Result], tmp_path: Path) -> None:
    content = load_checkpoint(whole[0] / CHECKPOINT)
    weight = content["run"]["mhc"]["model"]["transformer.wte.weight"]
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(2.0))
    save_checkpoint(tmp_path / CHECKPOINT, content)
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
    saved = load_checkpoint(tmp_path / CHECKPOINT)["run"]["step"]
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
    step = load_checkpoint(tmp_path / CHECKPOINT)["run"]["step"]
    way_out = f"Continue with: mhc demo --resume --seeds 1 --out {tmp_path}"
    assert stderr.splitlines()[-1] == f"Interrupted after step {step}. {way_out}"
    assert "Traceback" not in stderr
    resumed = demo("--resume", "--steps", step + 1, "--out", tmp_path)
    assert resumed.exit_code == 0, resumed.output
    assert load_checkpoint(tmp_path / CHECKPOINT)["run"]["step"] == step + 1


def untrained(monkeypatch: pytest.MonkeyPatch, advance: Callable[[], None]) -> None:
    """Make the demo train something that has taken no step and takes one with `advance`."""
    model = SimpleNamespace(step=0, validation={0: {}}, trainers={}, advance=advance)
    monkeypatch.setattr("mhc_compile.tools.demo.session.PairedTraining", lambda *_: model)


def test_interrupt_before_the_first_step_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deterministic = []

    def interrupted() -> None:
        deterministic.append(torch.are_deterministic_algorithms_enabled())
        raise KeyboardInterrupt

    untrained(monkeypatch, interrupted)
    result = demo("--out", tmp_path)
    assert result.exit_code == 130
    assert deterministic == [True]
    assert not torch.are_deterministic_algorithms_enabled()
    assert result.stderr == "Interrupted before the first step was done: nothing was saved.\n"
    assert not (tmp_path / CHECKPOINT).exists()


@pytest.mark.slow
def test_half_a_step_is_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = Trainer.train

    def interrupted(self: Trainer, *args: torch.Tensor, seed: int, lr: float) -> float:
        if ".mhc." in "".join(self.model.state_dict()) and len(self.losses) == 2:  # plain did this step already
            os.kill(os.getpid(), signal.SIGINT)
        return train(self, *args, seed=seed, lr=lr)

    monkeypatch.setattr(Trainer, "train", interrupted)
    result = demo("--steps", 100, "--out", tmp_path)
    assert result.exit_code == 130, result.output
    content = load_checkpoint(tmp_path / CHECKPOINT)["run"]
    assert content["step"] == 3
    assert [len(content[name]["losses"]) for name in ("plain", "mhc")] == [3, 3]


def test_shield_defers_an_interrupt() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    reached = []

    def strike() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        reached.append(1)

    def strike_under_a_shield() -> None:
        with shield():
            strike()

    try:
        with pytest.raises(KeyboardInterrupt):
            strike_under_a_shield()
        assert reached == [1]
        with pytest.raises(KeyboardInterrupt):
            strike()
        assert reached == [1]
    finally:
        signal.signal(signal.SIGINT, before)


def test_resume_without_a_checkpoint(tmp_path: Path) -> None:
    result = demo("--resume", "--out", tmp_path)
    assert isinstance(result.exception, MhcError)
    assert f"there is no checkpoint {tmp_path / CHECKPOINT} to resume" in str(result.exception)


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "other"])
def test_resume_of_a_damaged_checkpoint(damage: str, whole: tuple[Path, Result], tmp_path: Path) -> None:
    path = tmp_path / CHECKPOINT
    good = (whole[0] / CHECKPOINT).read_bytes()
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
    content = load_checkpoint(whole[0] / CHECKPOINT)
    save_checkpoint(tmp_path / CHECKPOINT, {**content, "digest": "0" * 64})
    result = demo("--resume", "--out", tmp_path)
    assert result.exit_code == 2
    assert "other files" in result.stderr


def test_a_failed_save_keeps_the_old_checkpoint(whole: tuple[Path, Result], tmp_path: Path) -> None:
    path = tmp_path / CHECKPOINT
    content = load_checkpoint(whole[0] / CHECKPOINT)
    save_checkpoint(path, content)
    before = path.read_bytes()
    with pytest.raises((AttributeError, TypeError, RuntimeError)):
        save_checkpoint(path, {**content, "run": lambda: None})
    assert path.read_bytes() == before


# What is printed and written


def test_summary(whole: tuple[Path, Result]) -> None:
    out, result = whole
    figures = json.loads((out / RESULT).read_text())
    text = result.stdout
    assert "transformer.h.0" in text  # the site report
    for side in ("plain", "mhc"):
        assert f"{figures[side]['validation'][-1][1]:.4f}" in text
        assert f"{figures[side]['loss'][0]:.6f}" in text
    gap = figures["mhc"]["validation"][-1][1] - figures["plain"]["validation"][-1][1]
    assert f"mhc ends {abs(gap):.3f} nats {'below' if gap < 0 else 'above'} plain" in " ".join(text.split())
    for words in ("bytes per second", "compilation", "Gain of the composite H_res", "Streams:", "says nothing about"):
        assert words in text
    assert all(len(line) <= 80 for line in text.splitlines() if not line.startswith("Written:"))


@pytest.mark.slow
def test_json_and_a_note_about_other_conditions(whole: tuple[Path, Result], tmp_path: Path) -> None:
    content = load_checkpoint(whole[0] / CHECKPOINT)
    content["conditions"]["threads"] = 77
    save_checkpoint(tmp_path / CHECKPOINT, content)
    result = CliRunner().invoke(command, [*ALONE, "--resume", "--out", str(tmp_path), "--json"])
    assert result.exit_code == 0
    assert "written with threads 77" in result.stderr
    figures = json.loads(result.stdout)
    assert figures == json.loads((tmp_path / RESULT).read_text())
    assert figures["plain"] == json.loads((whole[0] / RESULT).read_text())["plain"]
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
    """Return the names on the left of the table in the docstring of `collect`."""
    rows = re.findall(rf"^{prefix}(\w[\w, ]*?)  +\S", inspect.cleandoc(collect.__doc__ or ""), re.MULTILINE)
    return {name for row in rows for name in row.split(", ")}


def test_other_seeds_run_at_the_same_time(tmp_path: Path) -> None:
    result = demo("--steps", "2", "--out", tmp_path, "--seeds", "2", tiny=[*TINY, "--seed", "3"])
    assert result.exit_code == 0, result.output
    figures, other = (json.loads((folder / RESULT).read_text()) for folder in (tmp_path, tmp_path / "seed-4"))
    assert (figures["settings"]["seed"], other["settings"]["seed"]) == (3, 4)
    assert other["settings"] == {**figures["settings"], "seed": 4}
    assert figures["seeds"] == [
        {"seed": one["settings"]["seed"], "plain": one["plain"]["validation"], "mhc": one["mhc"]["validation"]}
        for one in (figures, other)
    ]
    gaps = [one["mhc"]["validation"][-1][1] - one["plain"]["validation"][-1][1] for one in (figures, other)]
    assert gaps[0] != gaps[1]
    text = " ".join(result.stdout.split())
    assert f"the mean of 2 runs: {gaps[0]:+.3f} with seed 3, {gaps[1]:+.3f} with seed 4." in text
    assert f"{abs(sum(gaps) / 2):.3f} nats" in text
    assert "next to 1 run of another seed" in text
    gap = draw(figures).axes[1]
    drawn = {line.get_label(): list(line.get_data()[1]) for line in gap.lines}
    assert drawn["validation, seed 4"][-1] == gaps[1]


@pytest.mark.slow
def test_another_seed_that_fails_is_named(tmp_path: Path) -> None:
    demo("--steps", "4", "--out", tmp_path / "seed-1", tiny=[*TINY, "--seed", "1"])
    demo("--steps", "2", "--out", tmp_path)
    result = CliRunner().invoke(command, ["--resume", "--steps", "3", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "Seed 1 failed and is left out: " in result.stderr
    assert "is at step 4 already" in " ".join((tmp_path / "seed-1" / LOG).read_text().split())
    assert [run["seed"] for run in json.loads((tmp_path / RESULT).read_text())["seeds"]] == [0]


@pytest.mark.slow
def test_an_interrupt_reaches_other_seeds_and_all_of_them_resume(tmp_path: Path) -> None:
    process = start(tmp_path, "--seeds", "2", "--steps", "100000", "--save-every", "0")
    wait_for_steps(tmp_path, process, 1)
    wait_for_steps(tmp_path / "seed-1", process, 1)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1].splitlines()[-1].endswith(f"mhc demo --resume --out {tmp_path}")
    folders = (tmp_path, tmp_path / "seed-1")
    last = max(load_checkpoint(folder / CHECKPOINT)["run"]["step"] for folder in folders)
    time.sleep(0.5)
    assert max(load_checkpoint(folder / CHECKPOINT)["run"]["step"] for folder in folders) == last
    result = CliRunner().invoke(command, ["--resume", "--steps", str(last + 1), "--out", str(tmp_path), "--quiet"])
    assert result.exit_code == 0, result.output
    assert {load_checkpoint(folder / CHECKPOINT)["run"]["step"] for folder in folders} == {last + 1}


def test_png(whole: tuple[Path, Result]) -> None:
    image = (whole[0] / PICTURE).read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(image) > 20_000


def test_picture_shows_the_losses(whole: tuple[Path, Result]) -> None:
    figures = json.loads((whole[0] / RESULT).read_text())
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


def test_smoothing() -> None:
    assert smooth([4.0, 2.0, 0.0, 2.0], 2) == [4.0, 3.0, 1.0, 1.0]


def test_progress_in_a_log(whole: tuple[Path, Result]) -> None:
    lines = whole[1].stderr.splitlines()
    assert any(line.startswith("step 0 of 12: validation loss") for line in lines)
    assert not [line for line in lines if "arning" in line]


def test_quiet_and_an_earlier_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    untrained(monkeypatch, interrupted)
    (tmp_path / CHECKPOINT).write_text("an earlier run")
    loud = CliRunner().invoke(command, [*TINY, "--out", str(tmp_path)])
    assert "will be replaced" in loud.stderr
    assert len(loud.stderr.splitlines()) > 2
    assert len(demo("--out", tmp_path).stderr.splitlines()) == 1
    assert (tmp_path / CHECKPOINT).read_text() == "an earlier run"


def test_missing_dependency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = demo("--out", tmp_path)
    assert isinstance(result.exception, MhcError)
    assert str(result.exception) == 'the demo needs matplotlib: pip install "mhc-compile[demo]"'


def test_wrong_sizes() -> None:
    assert demo("--width", 40).exit_code == 2
    assert demo("--model", "vit", "--context", 5).exit_code == 2
    with pytest.raises(OptionError, match="square"):
        Settings(model="vit", context=5)


def test_help_is_fast_and_needs_no_torch() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from mhc_compile.cli.demo import command;"
        "r = CliRunner().invoke(command, ['--help']); assert r.exit_code == 0;"
        "print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
