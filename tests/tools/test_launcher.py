"""`mhc run`, through its real entry point: a script must not notice anything but the backend."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.builders import LAYERS, Decoder, tokens

import mhc_compile
from mhc_compile import Options
from mhc_compile._torch.default_backend import patch_compile
from mhc_compile.errors import OptionError
from mhc_compile.tools.launcher.activation import DefaultBackend
from mhc_compile.tools.launcher.command import interpreter_flags
from mhc_compile.tools.launcher.run_config import find_options

ROOT = Path(mhc_compile.__file__).parents[1]
PYTHON = [sys.executable]
MHC = [sys.executable, "-m", "mhc_compile", "run"]
#: What a script sees of how it was started.
LOOK = """
import os, sys
main = sys.modules["__main__"]
print(sys.argv, __name__, globals().get("__file__"), __package__, main.__spec__ and main.__spec__.name, sys.path)
print(sys.flags, sys.warnoptions, sorted(vars(main)), sys.stdin.read())
"""
#: A residual model, beside the scripts as `model.py`.
MODEL = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x

model = Net

def sites(model):
    return sum(name.endswith(".phi") for name, _ in model.named_parameters())

x = torch.randn(2, 8)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(MODEL)
    return tmp_path


def execute(*command: str, given: str = "", **settings) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, input=given, **settings)


def run(script: str, *flags: str, arguments: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """`mhc run` of a script with this text, with the quick inner compiler."""
    Path("train.py").write_text(script)
    return execute(*MHC, "--inner-backend", "eager", *flags, "train.py", *arguments)


def sent(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# What the script sees


def test_script_sees_the_same_process_state_as_under_python(folder):
    Path("look.py").write_text(LOOK)
    arguments = ["look.py", "--streams", "7", "-m", "--", "-h", ""]
    plain, ours = execute(*PYTHON, *arguments, given="typed"), execute(*MHC, "--quiet", *arguments, given="typed")
    assert "'--streams', '7', '-m', '--', '-h', ''] __main__ " in plain.stdout
    assert ours.stdout == plain.stdout
    assert ours.stderr == plain.stderr == ""


def test_module_sees_the_same_process_state_as_under_python(folder):
    Path("package").mkdir()
    Path("package/__init__.py").touch()
    Path("package/helper.py").write_text("print('helper', __name__)\n")
    Path("package/train.py").write_text(f"from . import helper\n{LOOK}")
    plain = execute(*PYTHON, "-m", "package.train", "--lr", "1")
    ours = execute(*MHC, "--quiet", "-m", "package.train", "--lr", "1")
    assert plain.stdout.startswith("helper package.helper\n")
    assert ours.stdout == plain.stdout
    assert execute(*MHC, "-m", "package.trian").returncode == execute(*PYTHON, "-m", "package.trian").returncode == 1


def test_flags_of_python_are_kept(folder):
    Path("look.py").write_text(LOOK)
    flags = ["-u", "-OW", "error", "-X", "utf8"]
    plain = execute(*PYTHON, *flags, "look.py")
    ours = execute(*PYTHON, *flags, "-m", "mhc_compile", "run", "--quiet", "look.py")
    assert "optimize=1" in plain.stdout
    assert ours.stdout == plain.stdout


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("python /usr/bin/mhc run x.py -u", ""),
        ("python -m mhc_compile run -u", ""),
        ("python -um mhc_compile run", "-u"),
        ("python -u -mmhc_compile run", "-u"),
        ("python -Wd -W error -X dev -Xutf8 -OO -m mhc_compile", "-Wd -W error -X dev -Xutf8 -OO"),
        ("python -BW error --check-hash-based-pycs never -P mhc", "-BW error --check-hash-based-pycs never -P"),
    ],
)
def test_flags_of_python_end_where_its_program_begins(command, flags):
    assert interpreter_flags(command.split()) == flags.split()


def test_files_next_to_the_script_shadow_the_standard_library_as_under_python(folder):
    Path("own").mkdir()
    for name in ("json", "dataclasses", "ast", "inspect"):
        Path(f"own/{name}.py").write_text(f"print('mine: {name}')\n")
    Path("own/script.py").write_text("import ast, dataclasses, inspect, json\n")
    plain, ours = execute(*PYTHON, "own/script.py"), execute(*MHC, "own/script.py")
    assert plain.stdout == "mine: ast\nmine: dataclasses\nmine: inspect\nmine: json\n"
    assert ours.stdout == plain.stdout
    assert ours.stderr.startswith("mhc run: nothing was rewritten")


def test_the_user_s_sitecustomize_is_loaded(folder, monkeypatch):
    Path("site").mkdir()
    Path("site/sitecustomize.py").write_text("import builtins\nbuiltins.customized = __file__\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["site", *filter(None, [os.environ.get("PYTHONPATH")])]))
    Path("script.py").write_text("import sys; print(customized, sys.modules['sitecustomize'].__file__)")
    plain, ours = execute(*PYTHON, "script.py"), execute(*MHC, "--quiet", "script.py")
    assert plain.stdout == ours.stdout != ""


# How it ends


@pytest.mark.parametrize(
    "end",
    [
        "sys.exit(3)",
        "sys.exit('words')",
        "def f(): raise ValueError('mine')\nf()",
        "os._exit(7)",
        "os.kill(os.getpid(), signal.SIGTERM)",
        "os.kill(os.getpid(), signal.SIGKILL)",
        "import ctypes; ctypes.string_at(0)",
        "raise KeyboardInterrupt",
        "1 +",
    ],
)
def test_it_ends_as_below_python(folder, end):
    Path("script.py").write_text(f"import os, signal, sys\n{end}\n")
    plain, ours = execute(*PYTHON, "script.py"), execute(*MHC, "--quiet", "script.py")
    assert plain.returncode != 0
    assert (ours.returncode, ours.stdout, ours.stderr) == (plain.returncode, plain.stdout, plain.stderr)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_script_itself(folder, number):
    Path("script.py").write_text("import os, time\nprint(os.getpid(), flush=True); time.sleep(60)\n")

    def interrupted(command):
        def heed() -> None:  # a shell's background jobs ignore SIGINT, and so would what they start
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, preexec_fn=heed, **pipes) as process:
            assert int(process.stdout.readline()) == process.pid  # nobody stands between
            time.sleep(0.5)  # until it sleeps: the trace says where it was
            process.send_signal(number)
            _, said = process.communicate(timeout=30)
        return process.returncode, said

    plain = interrupted([*PYTHON, "script.py"])
    assert plain[0] == -number
    assert interrupted([*MHC, "--quiet", "script.py"]) == plain


def test_the_exit_handlers_of_the_script_come_first(folder):
    done = run("import atexit, sys\natexit.register(lambda: print('mine', file=sys.stderr))")
    assert done.returncode == 0
    assert done.stderr.splitlines()[0] == "mine"
    assert done.stderr.splitlines()[1].startswith("mhc run: nothing was rewritten: train.py ran no model")


def test_a_script_that_closed_its_stderr_ends_well(folder):
    done = run("import sys\nsys.stderr.close()")
    assert (done.returncode, done.stderr) == (0, "")


def test_after_an_exception_nothing_is_added(folder):
    assert run("raise ValueError('mine')").stderr.endswith("ValueError: mine\n")


# The backend

FORMS = """
import importlib.util, json, sys, warnings
importlib.util.find_spec("torch")  # as transformers asks before it imports
from model import model, nn, sites, torch, x

def count(compile):
    made = model()
    compile(made)(x).sum().backward()
    return sites(made)

@torch.compile
def loss(a, b):
    return ((a - b) ** 2).mean() + a.abs().sum()

@torch.compile(fullgraph=True)
def helper(a, weight):
    return torch.relu(a @ weight) + a

def decorated(made):
    @torch.compile
    def step(x):
        return made(x)
    return step

def given(made):
    @torch.compile(dynamic=True)
    def step(model, x):
        return model(x)
    return lambda x: step(made, x)

class Compiled:
    def __init__(self, made):
        made.compile(fullgraph=True)
        self.made = made
    def __call__(self, x):
        return self.made(x)

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    functions = [loss(x, x).item(), *helper(x, torch.eye(8)).shape, torch.compile(nn.CrossEntropyLoss())(x, torch.tensor([1, 2])).item()]
    weight = nn.Parameter(torch.ones(8))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    step = torch.compile(optimizer.step)
    for _ in range(2):
        weight.sum().backward()
        step()
    functions.append(weight.sum().item())
    found = {
        "model": count(torch.compile),
        "keywords": count(lambda m: torch.compile(m, fullgraph=True, dynamic=False)),
        "decorator without arguments": count(decorated),
        "decorator with arguments": count(given),
        "model.compile": count(Compiled),
        "eager": count(lambda m: torch.compile(m, backend="eager")),
        "aot_eager": count(lambda m: torch.compile(m, backend="aot_eager")),
    }
warned = [str(w.message) for w in caught if w.category.__name__ == "MhcWarning"]
print(json.dumps({"found": found, "warned": warned, "functions": functions, "weight": weight.tolist()}))
raise KeyboardInterrupt
"""


def test_every_compile_without_a_backend_uses_mhc(folder):
    done = run(FORMS, "--streams", "2")
    assert done.returncode == -signal.SIGINT, done.stderr
    data = json.loads(done.stdout)
    assert data["found"] == {
        "model": 3,
        "keywords": 3,
        "decorator without arguments": 3,
        "decorator with arguments": 3,
        "model.compile": 3,
        "eager": 0,
        "aot_eager": 0,
    }
    assert data["warned"] == []  # functions, losses and optimizers are nobody's models
    assert data["weight"] == pytest.approx([0.7] * 8)
    said = [line for line in done.stderr.splitlines() if line.startswith("mhc run")]
    first = "3 hyper-connections, 0 additions skipped (streams 2, mapping sinkhorn)"
    assert said[0] == f"mhc run: Net: {first}"
    assert said[-1] == "mhc run: in all 15 hyper-connections (5 × Net), 0 additions skipped"


SETTINGS = """
import json
from model import model, sites, torch, x

made, seen = model(), []
compiled = torch.compile(made, options={"post-grad-custom-post-pass": seen.append, "max_autotune": False})
compiled(x)
print(json.dumps([sites(made), len(seen)]))
"""


@pytest.mark.slow
def test_options_without_a_backend_reach_inductor(folder):
    Path("train.py").write_text(SETTINGS)
    assert sent(execute(*MHC, "train.py")) == [3, 1]


def compile_model(ours, **settings):
    model = Decoder()
    torch.compile(model, backend=DefaultBackend(ours), **settings)(tokens())
    return model


def test_options_without_a_backend_are_never_dropped():
    with pytest.raises(OptionError, match=r"'max_autotun' is none\. Did you mean 'max_autotune'\?"):
        compile_model({}, options={"max_autotun": True})
    with pytest.raises(OptionError, match=r"'streams' is none\..* mhc run takes it as a flag: --streams"):
        compile_model({}, options={"streams": 2})
    with pytest.warns(mhc_compile.MhcWarning, match="is for Inductor; with inner_backend='eager' it has no effect"):
        model = compile_model({"inner_backend": "eager"}, options={"max_autotune": True})
    assert len(mhc_compile.connections(model)) == 2 * LAYERS
    with pytest.warns(mhc_compile.MhcWarning, match="mode='max-autotune'"):
        compile_model({"inner_backend": "eager"}, mode="max-autotune")


@pytest.mark.slow
def test_a_torch_without_a_default_backend(monkeypatch):
    monkeypatch.setattr(torch, "compile", torch.compile)  # put back afterwards
    patch_compile(torch, DefaultBackend({"inner_backend": "eager"}))
    models = [Decoder() for _ in range(4)]
    torch.compile(models[0])(tokens())
    models[1].compile(dynamic=False)
    models[1](tokens())

    @torch.compile(fullgraph=True)
    def step(model, batch):
        return model(batch)

    step(models[2], tokens())
    torch.compile(models[3], backend="eager")(tokens())
    assert [len(mhc_compile.connections(model)) for model in models] == [2 * LAYERS] * 3 + [0]
    assert torch.compile.__doc__.lstrip().startswith("Optimizes given model")


def test_the_patch_of_torch_compile_is_installed_once(monkeypatch):
    plain, seen = torch.compile, []
    monkeypatch.setattr(torch, "compile", plain)
    for name in ("first", "second"):
        patch_compile(torch, lambda graph, inputs, name=name: seen.append(name) or graph)
    assert torch.compile.__wrapped__ is plain
    torch.compile(torch.nn.Linear(2, 2))(torch.ones(2))
    assert seen == ["second"]


def test_scripts_without_a_model_for_us_hear_why(folder):
    assert run("print('hello')").stderr == (
        "mhc run: nothing was rewritten: train.py ran no model that torch.compile made."
        " Write model = torch.compile(model), without a backend, in front of the training loop, or add --compile\n"
    )
    assert run("print('hello')", "--quiet").stderr == ""


@pytest.mark.slow
def test_scripts_that_compile_without_a_model_for_us_hear_why(folder):
    named = run("from model import *\ntorch.compile(model(), backend='eager')(x)")
    assert "nothing was rewritten: train.py names a backend in every torch.compile(...)" in named.stderr
    function = run("from model import *\ntorch.compile(torch.relu)(x)")
    assert "nothing was rewritten: train.py compiled 1 graph with mhc, and none has residual adds" in function.stderr
    strict = run("from model import *\ntorch.compile(nn.Linear(8, 8))(x)", "--strict")
    assert strict.returncode == 1
    assert "NothingRewrittenError: nothing was rewritten: what Dynamo traced has no addition" in strict.stderr
    assert "mhc run:" not in strict.stderr


SPAWN = """
import pickle, sys
import torch.multiprocessing as multiprocessing
from model import model, sites, torch, x

class Mine:
    pass

def work(_, queue):
    made = model()
    torch.compile(made)(x)
    queue.put((sites(made), Mine()))

if __name__ == "__main__":
    assert type(pickle.loads(pickle.dumps(Mine()))) is Mine
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    context = multiprocessing.spawn(work, (queue,), nprocs=1, join=False)
    count, mine = queue.get()
    while not context.join():
        pass
    print([count, type(mine) is Mine])
"""


@pytest.mark.slow
def test_spawned_children_have_the_backend_and_the_script_counts_them(folder):
    done = run(SPAWN)
    assert done.stdout == "[3, True]\n", done.stderr
    assert [line for line in done.stderr.splitlines() if "mhc run" in line] == [
        "mhc run: Net: 3 hyper-connections, 0 additions skipped (streams 4, mapping sinkhorn)"
    ]


def test_interpreters_of_other_environments_are_unchanged(folder):
    script = """
import os, sys
pid, prefix, *rest = os.environ["MHC_RUN"].split("\\n")
if prefix == sys.prefix:
    os.environ["MHC_RUN"] = "\\n".join([pid, "/elsewhere", *rest])
    os.execv(sys.executable, [sys.executable, *sys.argv])
print("the other one")
"""
    done = run(script)
    assert (done.stdout, done.stderr) == ("the other one\n", "")


# Options

CONFIG = "import json, os\nprint(json.dumps(json.loads(os.environ['MHC_RUN'].splitlines()[-1])['options']))"


def test_every_option_is_a_flag(folder):
    said = execute(*MHC, "--help").stdout
    assert [name for name in Options.names() if f"--{name.replace('_', '-')} " not in said] == []
    flags = (
        "--streams 2 --min-chain-length 3 --strict --mapping identity --init-gain .5 --inductor a.b=True --inductor c=x"
    )
    assert sent(run(CONFIG, *flags.split())) == {
        "inner_backend": "eager",
        "streams": 2,
        "min_chain_length": 3,
        "strict": True,
        "mapping": "identity",
        "init_gain": 0.5,
        "inductor": {"a.b": True, "c": "x"},
    }
    assert sent(run(CONFIG, "--no-strict"))["strict"] is False


def test_the_table_of_the_script_comes_before_the_one_of_the_current_directory(folder):
    Path("pyproject.toml").write_text("[tool.mhc]\nstreams = 2\n[tool.other]\nx = 1\n")
    Path("project/scripts").mkdir(parents=True)
    Path("project/scripts/train.py").write_text(CONFIG)
    command = [*MHC, "--quiet"]
    assert sent(execute(*command, "project/scripts/train.py")) == {"streams": 2}
    table = '[tool.mhc]\nmin-chain-length = 3\ninit = "random"\n[tool.mhc.inductor]\ntriton.cudagraphs = true\nmax_autotune = true\n'
    Path("project/pyproject.toml").write_text(table)
    settings = {"triton.cudagraphs": True, "max_autotune": True}
    assert sent(execute(*command, "project/scripts/train.py")) == {
        "min_chain_length": 3,
        "init": "random",
        "inductor": settings,
    }
    flags = ["--init", "preserve", "--inductor", "max_autotune=False"]
    assert sent(execute(*command, *flags, "project/scripts/train.py")) == {
        "min_chain_length": 3,
        "init": "preserve",
        "inductor": {**settings, "max_autotune": False},
    }
    Path("package").mkdir()
    Path("package/train.py").write_text(CONFIG)
    assert sent(execute(*command, "-m", "package.train")) == {"streams": 2}
    assert find_options(Path("project"), folder)["min_chain_length"] == 3
    Path("project/pyproject.toml").write_text("[project]\n")
    assert sent(execute(*command, "train.py", cwd="project/scripts")) == {"streams": 2}


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("[tool.mhc]\nsteams = 4", "pyproject.toml, [tool.mhc]: option 'steams' is unknown; did you mean 'streams'?"),
        ("[tool.mhc]\nstreams = 9", "pyproject.toml, [tool.mhc]: option 'streams' is 9; expected an integer from 1"),
        (
            "[tool.mhc]\nmin-chain-length = '3'",
            "[tool.mhc]: option 'min_chain_length' is '3' (str); expected a positive integer",
        ),
        ("[tool]\nmhc = 4", "pyproject.toml: tool.mhc is 4; expected a table"),
        ("[tool.mhc", "pyproject.toml may have a table [tool.mhc], but it is no TOML"),
    ],
)
def test_a_wrong_table_is_an_error_that_names_the_file(folder, table, words):
    Path("pyproject.toml").write_text(table)
    done = run("raise AssertionError('the script ran')")
    assert done.returncode == 2
    assert f"{folder}" in " ".join(done.stderr.split())
    assert words in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian.py"], "there is no file 'trian.py' (looked in"),
        ([], "Missing argument 'SCRIPT'"),
        (["--steams", "4", "model.py"], "No such option"),
        (["--streams", "9", "model.py"], "option 'streams' is 9; expected an integer from 1 to 8"),
        (["--mapping", "sinkhorm", "model.py"], "did you mean 'sinkhorn'?"),
        (["--inductor", "max_autotune", "model.py"], "'max_autotune' is no setting; expected NAME=VALUE"),
    ],
)
def test_wrong_usage_is_exit_code_2(folder, arguments, words):
    done = execute(*MHC, *arguments)
    assert done.returncode == 2
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("flag", ["-E", "-I", "-S"])
def test_below_a_python_without_an_environment(folder, flag):
    code = "import sys; sys.path[:0] = sys.argv.pop(1).split(':'); from mhc_compile.cli import main; main()"
    done = execute(*PYTHON, flag, "-c", code, ":".join([str(ROOT), *sys.path]), "run", "model.py")
    assert done.returncode == 1
    assert "mhc run cannot set a default backend below python -I, -E or -S" in done.stderr


def test_torch_is_imported_only_by_the_script(folder):
    Path("script.py").write_text(
        "import sys; print([name for name in ('torch', 'mhc_compile') if name in sys.modules])"
    )
    done = execute(*PYTHON, "-X", "importtime", "-m", "mhc_compile", "run", "script.py")
    assert done.stdout == "[]\n"
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "mhc_compile.tools.launcher.command" in imported
    assert not {"torch", "numpy", "rich"} & imported


# Processes of torchrun

WORKER = """
import os
from model import model, sites, torch, x
torch.distributed.init_process_group("gloo")
made = model()
torch.compile(made)(x)
total = torch.tensor(sites(made))
torch.distributed.all_reduce(total)
print(f"{total.item()}\\n", end="")  # in one piece
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("outside", [True, False])
def test_torchrun_around_and_inside(folder, outside):
    Path("train.py").write_text(WORKER)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    ours = ["run", "--inner-backend", "eager"]
    command = (
        [*torchrun, "-m", "mhc_compile", *ours, "train.py"]
        if outside
        else ["-m", "mhc_compile", *ours, *torchrun, "train.py"]
    )
    done = execute(*PYTHON, *command)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "6\n6\n"
    said = [line for line in done.stderr.splitlines() if line.startswith("mhc run")]
    first = "mhc run: Net: 3 hyper-connections, 0 additions skipped (streams 4, mapping sinkhorn)"
    last = "mhc run: in all 6 hyper-connections (2 × Net) in 2 processes, 0 additions skipped"
    assert said == ([first] if outside else [first, last])
