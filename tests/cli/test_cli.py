"""The command line, through its real entry points."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

FACTORY = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))

def residual():
    return nn.Sequential(Block(), Block(), Block()), (torch.randn(2, 8),)

def plain():
    return nn.Linear(8, 8), (torch.randn(2, 8),)

def forgot_inputs():
    return nn.Linear(8, 8)

def fails():
    raise RuntimeError("no such data")
"""


def mhc(*arguments: str, cwd=None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-m", "mhc_compile", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=cwd,
        check=False,
    )


def inside(monkeypatch, folder, *arguments):
    """The exit code of the entry point, run in this process: there are many wrong targets, and
    torch takes seconds to import.
    """
    from mhc_compile.cli import main

    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["mhc", *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "models", raising=False)
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


@pytest.fixture
def factory(tmp_path):
    (tmp_path / "models.py").write_text(FACTORY)
    return tmp_path


def test_help_is_fast_because_torch_is_not_imported():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mhc_compile", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "explain" in done.stdout
    assert "demo" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "mhc_compile.config.options" in imported
    assert not {"torch", "transformers", "numpy", "rich"} & imported


def test_importing_the_package_does_not_import_torch():
    script = "import sys, mhc_compile; mhc_compile.Options(); assert 'torch' not in sys.modules; mhc_compile.HyperConnection(4)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_console_script_is_installed():
    import importlib.metadata

    scripts = importlib.metadata.entry_points(group="console_scripts", name="mhc")
    assert [script.value for script in scripts] == ["mhc_compile.cli:main"]


@pytest.mark.slow
def test_explain_a_factory_of_a_file(factory):
    done = mhc("explain", "models.py:residual", cwd=factory)
    assert done.returncode == 0, done.stderr
    assert "Sequential: 3 residual adds rewritten, 0 additions skipped\n1 graph, 1 chain;" in done.stdout
    assert "0 … 2  (3 × Block)" in done.stdout
    assert "x + down(x)  models.py:10" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_explain_json_of_a_factory_of_a_module(factory):
    done = mhc("explain", "models:residual", "--json", "--streams", "2", cwd=factory)
    data = json.loads(done.stdout)
    assert data["options"]["streams"] == 2
    assert [site["path"] for site in data["graphs"][0]["chains"][0]["sites"]] == [
        "0.mhc.down",
        "1.mhc.down",
        "2.mhc.down",
    ]


@pytest.mark.slow
def test_explain_a_transformers_architecture_without_its_weights():
    started = time.monotonic()
    done = mhc("explain", "hf:gpt2", "--set", "n_layer=3")
    assert done.returncode == 0, done.stderr
    assert "GPT2LMHeadModel: 6 residual adds rewritten" in done.stdout
    assert "124 M" not in done.stdout
    assert time.monotonic() - started < 120


def test_nothing_to_rewrite_is_exit_code_1(factory):
    done = mhc("explain", "models.py:plain", cwd=factory)
    assert done.returncode == 1
    assert "Nothing would be rewritten" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("models.py:residul",), "has no 'residul'; near names: residual"),
        (("nofile.py:residual",), "there is no file 'nofile.py' (looked in"),
        (("nomodule:residual",), "module 'nomodule' could not be imported"),
        (("models.py",), "is no target; expected package.module:factory, path/to/file.py:factory, hf:MODEL_TYPE"),
        (
            ("models.py:forgot_inputs",),
            "is a model alone (Linear), and nothing says how it is called; expected a function",
        ),
        (("models.py:residual", "--set", "x=1"), "--set is for hf: and zoo: targets"),
        (("models.py:residual", "--streams", "nine"), "option 'streams' is 'nine'"),
        (("hf:llamo",), "knows no model type 'llamo'; near names: llama"),
    ],
)
def test_a_wrong_target_is_one_readable_paragraph(factory, arguments, words, monkeypatch, capsys):
    assert inside(monkeypatch, factory, "explain", *arguments) == 2
    out, trouble = capsys.readouterr()
    assert words in trouble
    assert "Traceback" not in trouble
    assert out == ""


@pytest.mark.slow
def test_check_proves_a_model_for_a_script_that_reads_json(factory):
    done = mhc("check", "models.py:residual", "--inner-backend", "eager", "--dtype", "float64", "--json", cwd=factory)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert (data["ok"], data["sites"], data["live"], data["dtype"], data["mode"]) == (True, 3, 3, "float64", "train")
    assert {one["name"] for one in data["tensors"] if one["group"] == "outputs"} == {"output"}
    assert done.stderr == ""


def test_a_factory_that_fails_is_exit_code_1_with_its_line(factory):
    done = mhc("check", "models.py:fails", cwd=factory)
    assert done.returncode == 1
    assert done.stderr == "mhc: models.py:fails raised RuntimeError: no such data (models.py:22)\n"


def test_wrong_usage_is_exit_code_2():
    assert mhc("explain").returncode == 2
    assert mhc("explane", "hf:gpt2").returncode == 2


def test_a_command_that_does_not_exist_has_near_names():
    done = mhc("explane", "zoo:gpt2")
    assert done.returncode == 2
    assert "there is no command 'explane'; near names: explain" in done.stderr
    assert "known commands: bench, check, convert, demo" in mhc("frobnicate").stderr


def test_an_interrupted_command_says_so_and_exits_with_130(tmp_path):
    # The factory reports that it waits: a signal during the start of Python would end it silently.
    (tmp_path / "models.py").write_text(
        "import time\n\ndef waits():\n    print('waiting', flush=True)\n    time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "mhc_compile", "explain", "models:waits"]
    # A shell may make its background jobs ignore SIGINT, and children inherit that.
    restore = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    running = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=restore, cwd=tmp_path
    )
    assert running.stdout is not None
    assert running.stdout.readline() == "waiting\n"
    running.send_signal(signal.SIGINT)
    _, trouble = running.communicate(timeout=60)
    assert running.returncode == 130
    assert trouble.strip().endswith("mhc: interrupted")
    assert "Traceback" not in trouble


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m mhc_compile zoo --list | head -1"
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("family")
    assert done.stderr == ""


def test_debug_shows_the_traceback(factory, monkeypatch, capsys):
    said = []
    for flags in ((), ("--debug",)):
        assert inside(monkeypatch, factory, "explain", "nomodule:x", *flags) == 2
        said.append(capsys.readouterr().err)
    quiet, loud = said
    assert "Traceback" not in quiet
    assert "Traceback" in loud
    assert loud.splitlines()[-1] == quiet.splitlines()[-1]


def test_shell_completion_knows_commands_and_kinds_of_targets():
    def complete(words, index):
        environment = {**os.environ, "_MHC_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(index)}
        command = [sys.executable, "-c", "import sys; sys.argv = ['mhc']; from mhc_compile.cli import main; main()"]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False).stdout.split()

    assert complete("mhc ex", 1) == ["plain,explain"]
    assert complete("mhc explain z", 2) == ["plain,zoo:", "file,z"]
    assert "plain,--streams" in complete("mhc diff --str", 2)
