"""Configurations of the Triton kernels from a file, and the search that writes one."""

from __future__ import annotations

import importlib.util
import io
import json

import pytest
import torch
from helpers.gpu import CHOSEN, interpret

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if CHOSEN == "interpreter":
    interpret()

import triton
from click.testing import CliRunner
from rich.console import Console

from mhc_compile.cli.bench import command
from mhc_compile.config.options import Options
from mhc_compile.errors import OptionError
from mhc_compile.ops import fused_reference as reference
from mhc_compile.ops import triton as kernels
from mhc_compile.ops.triton import ahead, configs
from mhc_compile.ops.triton._shapes import Sizes
from mhc_compile.reporting.progress import Lines, Silent
from mhc_compile.tools.bench import tune as search
from mhc_compile.tools.bench.sites import Shape

FP32, BF16 = torch.float32, torch.bfloat16
OTHERS = {"num_warps": 2, "num_stages": 4, "maxnreg": 96}
FORWARD = {"block_tokens": 32, "block_channels": 64, "read_tokens": 32, "read_channels": 16, **OTHERS}
BACKWARD = {"block_tokens": 32, "block_channels": 16, "dot_tokens": 64, "dot_channels": 128, **OTHERS}
MIXING = {"block_tokens": 32, "block_channels": 16, **OTHERS}
STEP = "forward n=2 float32 C=40 sinkhorn"


@pytest.fixture
def use(monkeypatch, tmp_path):
    """Put configurations, or the whole content, into the file that the kernels use."""

    def write(found: dict | None = None, text: str | None = None, **content):
        path = tmp_path / "configs.json"
        entries = {name: {"config": config} for name, config in (found or {}).items()}
        path.write_text(text or json.dumps({**configs.head(), "kernels": entries, **content}))
        monkeypatch.setenv("MHC_TRITON_CONFIGS", str(path))
        configs.from_file.cache_clear()
        return path

    monkeypatch.delenv("MHC_TRITON_CONFIGS", raising=False)
    configs.from_file.cache_clear()
    yield write
    configs.from_file.cache_clear()


def launched(width=40, dtype=FP32, **how) -> dict[str, dict]:
    """The constants of the kernels of a chain of two streams, by operator."""
    noted = ahead.launches_of(dtype, dtype, 2, width, "sinkhorn", **how)
    names = {name for config in (FORWARD, BACKWARD) for name in config}
    found = {}
    for operator, launches in noted.items():
        (one,) = [launch for launch in launches if "block_tokens" in launch.constants]
        found[operator] = {name: value for name, value in one.constants.items() if name in names}
    return found


def test_launches_take_what_the_file_has(use):
    table = launched()
    use({STEP: FORWARD, STEP.replace("forward", "backward"): BACKWARD, STEP.replace("forward", "mixing_8"): MIXING})
    found = launched()
    assert found["read, m=1"] == found["step, m=1"] == found["step, m=2"] == FORWARD
    assert found["read backward, m=1"] == found["step backward, m=2"] == BACKWARD
    assert found["close backward, m=2"] == MIXING
    assert found["close, m=2"] == table["close, m=2"]


@pytest.mark.parametrize("how", [{"width": 41}, {"dtype": BF16}, {"norm": "rms"}, {"single_pass": True}])
def test_other_kernels_keep_the_table(use, how):
    table = launched(**how)
    use({STEP: FORWARD, STEP.replace("forward", "backward"): BACKWARD})
    assert launched(**how) == table


def test_a_norm_and_a_single_pass_have_entries_of_their_own(use):
    use({f"{STEP} layer": FORWARD, f"{STEP} shifted": FORWARD, f"{STEP} shifted rms": {**FORWARD, "num_warps": 16}})
    assert launched(norm="layer")["step, m=2"] == FORWARD
    assert launched(single_pass=True)["shifted step, m=2"] == FORWARD
    use({f"{STEP} shifted rms".replace("forward", "backward"): BACKWARD})
    assert launched(single_pass=True, norm="rms")["shifted step backward, m=2"] == BACKWARD


def test_the_file_is_read_once(use):
    path = use({STEP: FORWARD})
    first = launched()
    path.write_text("{}")
    assert launched() == first


@pytest.mark.parametrize("norm", ["", "layer"])
def test_results_under_a_file_are_those_of_the_composition(use, norm):
    if not triton.knobs.runtime.interpret:
        pytest.skip("needs the interpreter: TRITON_INTERPRET=1 before Triton is imported")
    name = f"{STEP} {norm}".strip()
    use({name: FORWARD, name.replace("forward", "backward"): BACKWARD, STEP.replace("forward", "mixing_8"): MIXING})
    torch.manual_seed(0)
    n, width, tokens = 2, 40, 70
    old = torch.randn(tokens, n, width), torch.randn(tokens, width), torch.rand(tokens, n), torch.rand(tokens, n, n)
    site = torch.randn(n * width, 8) / 9, torch.randn(8), torch.rand(3)
    kind = (norm, torch.randn(width), torch.randn(width)) if norm else ("", None, None)
    args = *old, *site, "sinkhorn", 3, 1e-6
    got, want = kernels.step(*args, *kind, 1e-6), reference.step(*args, *kind, 1e-6)
    new, h, pre, post, res, z, inverse, moments = want
    saved = *old, *site, pre, post, z, inverse, "sinkhorn", 3, 1e-6, *kind, moments
    grads = torch.randn_like(new), torch.randn_like(h), torch.randn_like(post), torch.randn_like(res)
    got += kernels.step_backward(*grads, *saved)
    want += reference.step_backward(*grads, *saved)
    got += kernels.close_backward(grads[1], *old)
    want += reference.close_backward(grads[1], *old)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-4, atol=2e-4)


WRONG = {
    "no JSON": ({"text": "block_tokens: 64"}, r"JSONDecodeError"),
    "a list": ({"text": "[64]"}, r"TypeError"),
    "no kernels": ({"text": json.dumps({k: v for k, v in configs.head().items() if k != "kernels"})}, r"'kernels'"),
    "another version": ({"schema": "mhc-compile/triton-configs/2"}, r"configs/2.*and here is.*configs/1"),
    "another card": ({"card": "NVIDIA H100"}, r"NVIDIA H100.*and here is"),
    "another Triton": ({"triton": "2.0.0"}, r"'triton': '2.0.0'.*and here is"),
    "an unknown key": ({"note": "mine"}, r"'note': 'mine'"),
    "no configuration": ({"kernels": {STEP: {}}}, r"KeyError\('config'\)"),
    "an unknown kernel": ({"found": {"foward n=2": FORWARD}}, r"foward n=2.*expected one of forward, backward, mixing_4"),
    "an unknown constant": ({"found": {STEP: {**FORWARD, "warps": 4}}}, r"'warps': 4.*expected"),
    "of another kernel": ({"found": {STEP: BACKWARD}}, r"'dot_tokens': 64.*read_tokens"),
    "a missing constant": ({"found": {STEP: MIXING}}, r"expected.*read_tokens"),
    "a string": ({"found": {STEP: {**FORWARD, "block_tokens": "32"}}}, r"'block_tokens': '32'"),
    "a boolean": ({"found": {STEP: {**FORWARD, "num_stages": True}}}, r"'num_stages': True"),
    "no power of two": ({"found": {STEP: {**FORWARD, "read_channels": 48}}}, r"'read_channels': 48.*16, 32, 64"),
    "too small a product": ({"found": {STEP: {**FORWARD, "block_channels": 8}}}, r"'block_channels': 8"),
    "too many registers": ({"found": {STEP: {**FORWARD, "maxnreg": 300}}}, r"'maxnreg': 300"),
    "no multiple": ({"found": {STEP: {**FORWARD, "read_tokens": 64}}}, r"'read_tokens': 64.*read_tokens <= block_tokens"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_an_error_that_names_the_way_out(use, case):
    content, words = WRONG[case]
    path = use(**content)
    with pytest.raises(OptionError, match=words) as caught:
        launched()
    assert f"MHC_TRITON_CONFIGS={path}" in str(caught.value)
    assert "unset it, or write it by mhc bench --tune" in str(caught.value)


def test_a_missing_file_is_an_error(monkeypatch, use):
    monkeypatch.setenv("MHC_TRITON_CONFIGS", "no/such/file.json")
    configs.from_file.cache_clear()
    with pytest.raises(OptionError, match=r"no/such/file\.json: FileNotFoundError"):
        launched()


@pytest.mark.parametrize("size", configs.SIZES)
def test_tiles_of_every_size_fit_the_groups_of_the_backward(use, size):
    use({STEP.replace("forward", "backward"): {**BACKWARD, "block_tokens": size, "dot_tokens": 16}})
    launches = ahead.launches_of(FP32, FP32, 2, 40, "sinkhorn")["step backward, m=2"]
    (one,) = (launch for launch in launches if "dot_tokens" in launch.constants)
    given = dict(zip(one.kernel.arg_names, one.arguments, strict=False))
    assert one.constants["block_tokens"] == size
    assert given["group_tokens"] % size == 0
    assert given["group_tokens"] >= 320


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("width", [8, 48, 64, 4096])
def test_the_table_has_constants_that_a_file_may_have(n, width):
    for dtype in (FP32, BF16, torch.float16):
        sizes = Sizes.of(torch.empty(1, n, width, dtype=dtype, device="meta"), n)
        for name, config in (("forward", configs.forward(sizes)), ("backward", configs.backward(sizes))):
            assert configs.checked(name, config.constants) == config
        for warps in (4, 8):
            assert configs.checked(f"mixing_{warps}", configs.mixing(sizes, warps)).constants == configs.mixing(
                sizes, warps
            )


def searched(answer):
    """What a search finds, and says, for an operator that computes `answer(configuration)`."""
    trial, said = {}, io.StringIO()
    config = configs.checked("mixing_4", MIXING)
    user = config, [(lambda: answer(trial["mixing_4"]), torch.ones(3))]
    found = search._search("mixing_4", user, trial, "cpu", Lines(Console(file=said)))
    return found, said.getvalue()


def test_failing_and_wrong_candidates_are_skipped_and_counted():
    def answer(config):
        if config.num_warps == 4:
            raise MemoryError("too much shared memory")
        return torch.full((3,), float("nan")) if config.num_stages == 5 else torch.ones(3) * (1 + config.maxnreg - 96)

    found, said = searched(answer)
    # One step in each of two blocks, warps, stages and registers; 8 is no size of a block.
    assert (found["tried"], found["timed"]) == (1 + 3 + 2 + 2 + 2, 1 + 3 + 1 + 1)
    assert found["config"]["num_warps"] in (1, 2)
    assert found["config"]["maxnreg"] == 96
    assert said.count("skipped") == 4
    assert "'num_warps': 4, 'num_stages': 4, 'maxnreg': 96}: MemoryError: too much shared memory" in said.replace(
        "\n", " "
    )
    assert said.count("ArithmeticError: other results") == 3


def test_the_configuration_in_use_must_work():
    def answer(config):
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        searched(answer)


def test_results_that_differ_in_rounding_agree():
    exact = torch.randn(1000)
    assert search._agree(exact + 1e-5 * torch.randn(1000), exact)
    assert not search._agree(exact + 1e-2 * torch.randn(1000), exact)
    assert search._agree((exact.bfloat16(), exact[:0]), (exact.bfloat16() * 1.001, exact[:0]))
    assert not search._agree((exact, exact), (exact, -exact))


def test_the_search_writes_a_file_that_the_kernels_take(use):
    """The whole search, with the clock of the CPU."""
    if not triton.knobs.runtime.interpret:
        pytest.skip("needs the interpreter: TRITON_INTERPRET=1 before Triton is imported")
    options = Options.parse({"streams": 1, "mapping": "identity"})
    written = search.tune([Shape(width=16, tokens=5)], options, Silent(), norms=("",))
    site = "n=1 float32 C=16 identity"
    assert set(written["kernels"]) == {
        f"forward {site}", f"backward {site}", *(f"mixing_{k} {site.replace('identity', 'sinkhorn')}" for k in (4, 8))
    }  # fmt: skip
    for one in written["kernels"].values():
        assert one["tokens"] == 5
        assert one["tried"] == one["timed"] > 5
        assert 0 < one["ms"] <= one["before"]
    assert configs.CHOOSER is None
    use(text=json.dumps(written))
    (_, launch) = ahead.launches_of(FP32, FP32, 1, 16, "identity")["step, m=1"]
    assert written["kernels"][f"forward {site}"]["config"].items() <= launch.constants.items()


def test_the_command_writes_the_file(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        search, "tune", lambda shapes, options, progress: seen.append((shapes, options)) or {"found": 1}
    )
    file = tmp_path / "new" / "configs.json"
    flags = ("--streams", "2", "--preset", "deepseek-v4.1", "--width", "512", "--tokens", "64", "--dtype", "float32")
    done = CliRunner().invoke(command, ["--device", "cuda", "--tune", str(file), *flags, "--quiet"])
    assert done.exit_code == 0, done.output
    assert json.loads(file.read_text()) == {"found": 1}
    (((shape,), options),) = seen
    assert (shape.width, shape.tokens, shape.streams, shape.real, shape.device) == (512, 64, 2, FP32, "cuda")
    assert (options.streams, options.single_pass, options.spec) == (
        2,
        True,
        "sinkhorn;pre_eps=1e-06;sinkhorn_eps=1e-06",
    )
