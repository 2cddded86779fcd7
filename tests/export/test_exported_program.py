"""Exported programs: everything that the program says about itself is kept, and the result is plain
ATen on streams.
"""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
import textwrap
from collections import Counter

import pytest
import torch
from helpers.builders import Block, Decoder, build, relative, tokens, twin, without_dropout
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import InputKind, OutputKind

import mhc_compile
import mhc_compile.errors
from mhc_compile.export import exported_program
from mhc_compile.export.exported_program import plan_program

#: Of the default start, by which bias and scale are multiplied in logits.
SPEEDS = {"bias": 32, "scale": 1 / 128}
PATHS = [f"blocks.{i}.mhc.{branch}" for i in range(2) for branch in ("attn", "mlp")]
NEW = [f"{path}.{part}" for path in PATHS for part in ("phi", "bias", "scale")]


class Residual(nn.Module):
    """A ResNet's block: ReLU after the add, in place or not, and perhaps another norm on the
    trunk.
    """

    def __init__(self, width: int, inplace: bool = False, trunk_norm: bool = False) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace)
        self.trunk = nn.BatchNorm2d(width) if trunk_norm else nn.Identity()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x))


class Stack(nn.Module):
    """Blocks of one's choice between nothing and a norm."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Convolutional(nn.Module):
    def __init__(self, **settings: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(*(Residual(4, **settings) for _ in range(3)))
        self.head = nn.Linear(4, 5)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - a name that a copied graph must spell differently
        return self.head(self.blocks(torch.relu(self.stem(input))).mean((2, 3)))


def programs(model: nn.Module, *args: Tensor, **kwargs) -> list[ExportedProgram]:
    """The training program and the core ATen program of a model."""
    program = export(model, args, **kwargs)
    return [program, program.run_decompositions()]


@functools.cache
def exported(index: int, dtype: torch.dtype) -> ExportedProgram:
    """Return the training program (0) or the core ATen program (1) of one decoder, which tests must
    not change.
    """
    torch.manual_seed(0)
    program = export(Decoder().to(dtype), (tokens(),))
    return program.run_decompositions() if index else program


@functools.cache
def rewritten(index: int, dtype: torch.dtype) -> ExportedProgram:
    """Return `exported`, rewritten."""
    return mhc_compile.rewrite(exported(index, dtype))


def namespaces(program: ExportedProgram) -> set[str]:
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    return {getattr(target, "namespace", getattr(target, "__module__", "")) for target in targets}


def randomise(program: ExportedProgram) -> None:
    with torch.no_grad():
        for name, parameter in program.named_parameters():
            if ".mhc." in name:
                parameter.normal_().div_(SPEEDS.get(name.rpartition(".")[2], 1))


def outcome(program: ExportedProgram, *args: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients by parameter name."""
    module = program.module()
    module.zero_grad(set_to_none=True)
    out = module(*args)
    (out * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_preserved(plain: ExportedProgram, rewritten: ExportedProgram, tolerance: float, *args: Tensor) -> None:
    want, gradients = outcome(plain, *args)
    got, also = outcome(rewritten, *args)
    assert relative(got, want) < tolerance
    floor = 1e-3 * max(gradient.abs().max().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert relative(also[name], gradient, floor) < tolerance, name


# --- the signature
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [pytest.param(0, id="training", marks=pytest.mark.slow), pytest.param(1, id="core")])
def test_new_parameters_are_entries_of_the_signature_and_all_else_is_kept(index):
    program, result = exported(index, torch.float32), rewritten(index, torch.float32)
    assert list(result.graph_signature.parameters) == [*program.graph_signature.parameters, *NEW]
    assert list(result.state_dict) == [*program.state_dict, *NEW]
    assert all(isinstance(result.state_dict[name], nn.Parameter) for name in NEW)
    assert all(result.state_dict[name] is tensor for name, tensor in program.state_dict.items())
    specs = result.graph_signature.input_specs
    kinds = [spec.kind for spec in specs]
    assert kinds == [InputKind.PARAMETER] * (len(kinds) - 1) + [InputKind.USER_INPUT]
    assert [node.name for node in result.graph.nodes if node.op == "placeholder"] == [spec.arg.name for spec in specs]
    assert specs[-2].arg.name == "p_blocks_1_mhc_mlp_scale"
    assert result.call_spec == program.call_spec
    assert result.example_inputs is program.example_inputs
    assert [entry.fqn for entry in result.module_call_graph] == [entry.fqn for entry in program.module_call_graph]
    assert result.verifiers == program.verifiers
    result.validate()


def test_the_program_given_is_not_mutated():
    program = export(Decoder(), (tokens(),), dynamic_shapes=({0: Dim.DYNAMIC},))
    text, signature, state = str(program), copy.deepcopy(program.graph_signature), dict(program.state_dict)
    metadata = [dict(node.meta) for node in program.graph.nodes]
    mhc_compile.rewrite(program)
    assert str(program) == text
    assert program.graph_signature == signature
    assert program.state_dict.keys() == state.keys()
    assert [node.meta.keys() for node in program.graph.nodes] == [meta.keys() for meta in metadata]


@pytest.mark.slow
@pytest.mark.parametrize("index", [pytest.param(0, id="training", marks=pytest.mark.slow), pytest.param(1, id="core")])
def test_dynamic_shapes_stay_dynamic(index):
    program = programs(Decoder(), tokens(), dynamic_shapes=({0: Dim("batch", max=64), 1: Dim("time")},))[index]
    result = mhc_compile.rewrite(program)
    assert result.range_constraints == program.range_constraints
    assert len(result.range_constraints) == 2
    for ids in (tokens(2, 5), tokens(3, 9)):
        assert_preserved(program, result, 1e-5, ids)
    with pytest.raises(AssertionError, match="64"):
        result.module()(tokens(65, 5))


@pytest.mark.parametrize("index", [pytest.param(0, id="training", marks=pytest.mark.slow), pytest.param(1, id="core")])
def test_a_buffer_that_is_mutated_is_mutated_still(index):
    """BatchNorm in training counts batches and keeps running statistics."""
    model, x = Convolutional(), torch.randn(2, 3, 8, 8)
    plain = programs(twin(model), x)[index]
    result = mhc_compile.rewrite(programs(model, x)[index])
    assert sum(".mhc." in name for name in result.state_dict) == 3 * 3
    mutations = [spec for spec in result.graph_signature.output_specs if spec.kind is OutputKind.BUFFER_MUTATION]
    assert len(mutations) == [0, 18][index]
    assert list(result.graph_signature.buffers) == list(plain.graph_signature.buffers)
    modules = [plain.module(), result.module()]
    for module in modules:
        module(x)
        module(2 * x)
    want, got = (dict(module.named_buffers()) for module in modules)
    assert want.keys() == got.keys()
    assert want["blocks.0.bn1.num_batches_tracked"] == 2
    for name, buffer in want.items():
        assert torch.allclose(got[name].double(), buffer.double(), atol=1e-5), name


def test_a_batch_norm_on_the_trunk_runs_on_streams():
    model = Convolutional(trunk_norm=True, inplace=True).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    plain = export(twin(model), (x,))
    result = mhc_compile.rewrite(export(model, (x,)))
    assert sum(name.endswith(".phi") for name in result.state_dict) == 3
    assert_preserved(plain, result, 1e-9, x)
    modules = [plain.module(), result.module()]
    for module in modules:
        module(3 * x)
    want, got = (dict(module.named_buffers()) for module in modules)
    for name, buffer in want.items():
        assert torch.allclose(got[name].double(), buffer.double(), atol=1e-9), name


def test_constants_are_kept():
    class Constants(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Stack(Block(8), Block(8))
            self.register_buffer("mask", torch.ones(8), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * self.mask + torch.tensor([2.0])

    x = torch.randn(2, 5, 8)
    program = export(Constants(), (x,))
    result = mhc_compile.rewrite(program)
    assert result.constants.keys() == program.constants.keys()
    assert len(result.constants) == 2
    assert_preserved(program, result, 1e-5, x)


def test_module_calls_with_a_signature_keep_it_where_their_values_exist():
    model, ids = Decoder(), tokens()
    program = export(model, (ids,), preserve_module_call_signature=("blocks.0", "blocks.1.mlp", "head"))
    result = mhc_compile.rewrite(program)
    signatures = {entry.fqn: entry.signature for entry in result.module_call_graph}
    assert signatures["blocks.0"] is None  # what it returns are streams now
    assert signatures["blocks.1.mlp"].outputs[0].name in {node.name for node in result.graph.nodes}
    assert signatures["head"].inputs[0].name in {node.name for node in result.graph.nodes}
    assert signatures[""] == next(entry.signature for entry in program.module_call_graph)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr:UserWarning")
def test_unflatten_puts_the_modules_back():
    ids = tokens()
    result = mhc_compile.rewrite(export(Decoder(), (ids,)))
    randomise(result)
    module = torch.export.unflatten(result)
    assert torch.equal(module(ids), result.module()(ids))
    assert isinstance(module.get_submodule("blocks.0.mhc.attn"), nn.Module)


# --- the numbers
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [pytest.param(0, id="training", marks=pytest.mark.slow), pytest.param(1, id="core")])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), pytest.param(torch.float64, 1e-9, marks=pytest.mark.slow)]
)
def test_default_start_preserves_output_and_gradients(dtype, tolerance, index):
    program, result = exported(index, dtype), rewritten(index, dtype)
    assert {result.state_dict[name].dtype for name in NEW} == {dtype}
    assert_preserved(program, result, tolerance, tokens())


def test_forward_and_every_gradient_are_those_of_the_mhc_graph():
    """Random hyper-connections, float64: unrolled ATen under autograd against the operators with
    their hand-derived backwards.
    """
    model, ids = Decoder().double(), tokens()
    result = mhc_compile.rewrite(export(twin(model), (ids,)), options={"iterations": 7})
    randomise(result)
    mhc_compile.attach(model, ids, options={"iterations": 7})
    model.load_state_dict(result.state_dict)
    got, gradients = outcome(result, ids)
    want = torch.compile(model, backend="mhc", options={"inner_backend": "eager", "iterations": 7})(ids)
    (want * torch.linspace(0.5, 1.5, want.numel(), dtype=want.dtype).view_as(want)).sum().backward()
    assert relative(got, want) < 1e-9
    parameters = dict(model.named_parameters())
    assert gradients.keys() == parameters.keys()
    floor = 1e-3 * max(gradient.abs().max().item() for gradient in gradients.values())
    for name, parameter in parameters.items():
        assert relative(gradients[name], parameter.grad, floor) < 1e-9, name
    assert relative(want, twin_output(model, ids)) > 1e-3  # and it is another function than the plain one


def twin_output(model: nn.Module, ids: Tensor) -> Tensor:
    plain = twin(model)
    mhc_compile.detach(plain)
    return plain(ids)


def test_it_trains():
    ids = tokens()
    result = mhc_compile.rewrite(export(Decoder(), (ids,)))
    module = result.module()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    moved = dict(module.named_parameters())
    assert all(moved[name].count_nonzero() for name in NEW if name.endswith("phi"))


def test_bfloat16():
    model = Decoder().to(torch.bfloat16)
    program = export(model, (tokens(),))
    result = mhc_compile.rewrite(program)
    assert {result.state_dict[name].dtype for name in NEW} == {torch.float32}
    want, got = program.module()(tokens()), result.module()(tokens())
    assert got.dtype == torch.bfloat16
    assert relative(got, want) < 2e-2


@pytest.mark.parametrize(
    "options",
    [{"mapping": "identity"}, pytest.param({"streams": 1}, marks=pytest.mark.slow), {"streams": 3, "iterations": 2}],
)
def test_options(options):
    program = exported(0, torch.float32)
    result = mhc_compile.rewrite(program, options=options)
    n = options.get("streams", 4)
    columns = 2 * n + (0 if "mapping" in options else n * n)
    assert list(result.state_dict["blocks.0.mhc.attn.phi"].shape) == [n * 8, columns]
    assert_preserved(program, result, 1e-5, tokens())


# --- plain ATen
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [pytest.param(0, id="training", marks=pytest.mark.slow), pytest.param(1, id="core")])
def test_nothing_but_aten(index):
    program, result = exported(index, torch.float32), rewritten(index, torch.float32)
    assert namespaces(result) == {"aten", "_operator"}
    assert len(result.graph.nodes) > 2 * len(program.graph.nodes)  # and there is something to lower
    decomposed = result.run_decompositions()
    assert set(decomposed.graph_signature.parameters) == set(result.graph_signature.parameters)
    assert torch.allclose(decomposed.module()(tokens()), result.module()(tokens()), atol=1e-6)
    if index:  # a core ATen program stays one
        assert operations(decomposed) == operations(result)


def operations(program: ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.slow
def test_a_process_that_has_never_heard_of_us_loads_and_trains_it(tmp_path):
    ids = tokens()
    result = mhc_compile.rewrite(export(Decoder(), (ids,), dynamic_shapes=({0: Dim.DYNAMIC},)))
    randomise(result)
    torch.export.save(result, tmp_path / "program.pt2")
    torch.save((ids, *outcome(result, ids)), tmp_path / "expected.pt")
    script = """
        import sys

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "mhc_compile":
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, Blocker())
        import torch

        ids, want, gradients = torch.load(sys.argv[2])
        module = torch.export.load(sys.argv[1]).module()
        out = module(ids)
        (out * torch.linspace(0.5, 1.5, out.numel()).view_as(out)).sum().backward()
        assert torch.allclose(out, want, atol=1e-6)
        parameters = dict(module.named_parameters())
        assert parameters.keys() == gradients.keys() and any(".mhc." in name for name in parameters)
        for name, gradient in gradients.items():
            assert torch.allclose(parameters[name].grad, gradient, rtol=1e-4, atol=1e-5), name
        assert module(ids[:1].repeat(5, 1)).shape[0] == 5
        assert not [name for name in sys.modules if name.startswith("mhc_compile")]
        print("fine")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "program.pt2"), str(tmp_path / "expected.pt")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    assert done.stdout.strip() == "fine", done.stderr


def test_a_loaded_program_is_rewritten_as_well(tmp_path):
    program = exported(0, torch.float32)
    torch.export.save(program, tmp_path / "program.pt2")
    result = mhc_compile.rewrite(torch.export.load(tmp_path / "program.pt2"))
    assert list(result.graph_signature.parameters)[-len(NEW) :] == NEW
    assert_preserved(program, result, 1e-5, tokens())


@pytest.mark.slow
def test_aot_inductor_packages_it(tmp_path):
    model, ids = Decoder(layers=1).eval(), tokens()
    result = mhc_compile.rewrite(export(model, (ids,)))
    randomise(result)
    package = torch._inductor.aoti_compile_and_package(result, package_path=str(tmp_path / "model.pt2"))
    assert torch.allclose(torch._inductor.aoti_load_package(package)(ids), result.module()(ids), atol=1e-5)


def test_a_rewritten_graph_module_is_exported_in_plain_aten():
    model, x = Stack(*(Residual1d() for _ in range(2))), torch.randn(2, 5, 8)
    module = mhc_compile.rewrite(torch.fx.symbolic_trace(model), x)
    with torch.no_grad():
        for connection in mhc_compile.connections(module).values():
            connection.phi.normal_()
    program = export(module, (x,))
    assert "mhc" not in namespaces(program)
    assert torch.allclose(program.module()(x), module(x), atol=1e-5)


class Residual1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x))


def test_the_module_of_a_program_is_a_graph_module():
    model, x = Stack(Residual1d(), Residual1d()), torch.randn(2, 5, 8)
    module = mhc_compile.rewrite(export(model, (x,)).module(), x)
    assert list(mhc_compile.connections(module)) == ["blocks.0.mhc.linear", "blocks.1.mhc.linear"]
    assert torch.allclose(module(x), model(x), atol=1e-5)


# --- what is found
# --------------------------------------------------------------------------------------------------


def t5():
    import transformers as t

    sizes = {"vocab_size": 31, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    config = t.T5Config(use_cache=False, decoder_start_token_id=0, dropout_rate=0.0, **sizes)
    ids = torch.arange(14).reshape(2, 7) * 5 % 31
    return t.T5ForConditionalGeneration(config), {"input_ids": ids, "decoder_input_ids": ids[:, :5]}


def encoder(norm_first: bool, batch_first: bool):
    layer = nn.TransformerEncoderLayer(16, 2, 32, norm_first=norm_first, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), {"src": torch.randn(2, 7, 16)}


def family(name: str):
    case = build(name)
    return without_dropout(case.model), case.inputs


MODELS = {
    "decoder": lambda: (Decoder(), {"tokens": tokens()}),
    "pre-norm encoder": lambda: encoder(True, True),
    "post-norm encoder": lambda: encoder(False, True),
    "post-norm encoder, tokens first": lambda: encoder(False, False),
    "convolutional": lambda: (Convolutional(), {"input": torch.randn(2, 3, 8, 8)}),
    "convolutional, eval": lambda: (Convolutional().eval(), {"input": torch.randn(2, 3, 8, 8)}),
    "convolutional, in place": lambda: (Convolutional(inplace=True), {"input": torch.randn(2, 3, 8, 8)}),
    "gpt2": lambda: family("gpt2"),
    "llama": lambda: family("llama"),
    "vit": lambda: family("vit"),
    "t5": t5,
}


#: What the default run compares with what Dynamo sees.
DYNAMO = ("decoder", "post-norm encoder", "convolutional, eval", "convolutional, in place", "gpt2")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DYNAMO else pytest.mark.slow) for name in MODELS]
)
def test_sites_and_chains_are_those_that_dynamo_sees(name):
    model, inputs = MODELS[name]()
    explanation = mhc_compile.explain(model, **inputs)
    want = [[f"{site.owner}.mhc.{site.branch}" for site in chain.sites] for chain in explanation.chains]
    assert sum(map(len, want)) >= 3
    program = export(model, (), inputs)
    plans = [plan_program(program, mhc_compile.Options().resolved).plan]
    if name != "gpt2":  # torch 2.13 cannot decompose it: a view of attention's result does not fit its strides
        plans.append(plan_program(program.run_decompositions(), mhc_compile.Options().resolved).plan)
    for plan in plans:
        assert [[site.path for site in chain.sites] for chain in plan.chains] == want
    reasons = Counter(rejection.reason.value for rejection in plans[0].rejections)
    assert reasons == explanation.reasons


@pytest.mark.parametrize(
    "name", ["post-norm encoder, tokens first", "convolutional, eval", pytest.param("llama", marks=pytest.mark.slow)]
)
def test_other_models_are_preserved(name):
    model, inputs = MODELS[name]()
    program = export(without_dropout(model), (), inputs)
    result = mhc_compile.rewrite(program)
    want, got = (p.module()(**inputs) for p in (program, result))
    want, got = (out if isinstance(out, Tensor) else out.logits for out in (want, got))
    assert any(".mhc." in target for target in result.graph_signature.parameters)
    assert relative(got, want) < 1e-5


@pytest.mark.parametrize(
    ("names", "strict"),
    [(2, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, False), (1, True), (2, False)))],
)
def test_a_shared_module_shares_its_parameters(names, strict):
    block, x = Block(8), torch.randn(2, 5, 8, dtype=torch.float64)
    model = (Stack(block, block, Block(8)) if names == 2 else Stack(Repeated(block), Block(8))).double()
    program = export(model, (x,), strict=strict)
    result = mhc_compile.rewrite(program)
    new = [target for target in result.graph_signature.parameters if ".mhc." in target]
    assert len(new) == 3 * 4
    assert_preserved(program, result, 1e-9, x)
    # The same state dict as that of the model with hyper-connections attached.
    mhc_compile.attach(model, x)
    assert result.state_dict.keys() == model.state_dict().keys()
    randomise(result)
    model.load_state_dict(result.state_dict)
    compiled = torch.compile(model, backend="mhc", options={"inner_backend": "eager"})
    assert torch.allclose(compiled(x), result.module()(x), atol=1e-9)


class Repeated(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_program_of_an_attached_model_uses_the_parameters_it_has(strict, monkeypatch):
    """As it is before `torch.export.export` hands it over rewritten."""
    monkeypatch.setattr(exported_program, "rewrite_attached", lambda model, program: program)
    model, ids = Decoder(), tokens()
    mhc_compile.attach(model, ids)
    program = export(model, (ids,), strict=strict)
    result = mhc_compile.rewrite(program)
    assert result.state_dict.keys() == model.state_dict().keys()
    assert all(result.state_dict[name] is program.state_dict[name] for name in NEW)
    assert namespaces(result) == {"aten", "_operator"}
    randomise(result)
    assert relative(result.module()(ids), program.module()(ids)) > 1e-3
    with pytest.raises(mhc_compile.errors.AttachError, match=r"blocks.0.mhc.attn.*phi \[32, 24\].*streams=2"):
        mhc_compile.rewrite(program, options={"streams": 2})
    with pytest.warns(
        mhc_compile.MhcWarning, match="4 × chain-too-short"
    ):  # it has the parameters, but it does not use them
        mhc_compile.rewrite(program, options={"min_chain_length": 5})


# --- the edges
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [pytest.param(0, id="training", marks=pytest.mark.slow), pytest.param(1, id="core")])
def test_a_rewritten_program_comes_back_unchanged(index):
    result = rewritten(index, torch.float32)
    again = mhc_compile.rewrite(result, options={"strict": True})  # nothing to complain about
    assert again is not result
    assert str(again.graph) == str(result.graph)
    assert again.graph_signature == result.graph_signature
    assert again.state_dict == result.state_dict


def test_program_without_sites_warns_and_is_copied_unchanged():
    program = export(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (torch.randn(2, 4),))
    with pytest.warns(mhc_compile.MhcWarning, match="nothing was rewritten: what Dynamo traced has no addition"):
        result = mhc_compile.rewrite(program)
    assert result is not program
    assert str(result) == str(program)
    with pytest.raises(mhc_compile.errors.NothingRewrittenError):
        mhc_compile.rewrite(program, options={"strict": True})


def test_chains_shorter_than_min_chain_length_are_rejected():
    program = exported(0, torch.float32)
    with pytest.warns(mhc_compile.MhcWarning, match="4 × chain-too-short"):
        result = mhc_compile.rewrite(program, options={"min_chain_length": 5})
    assert str(result) == str(program)
    assert ".mhc." not in str(result.state_dict.keys())


def test_wrong_inputs_are_named():
    program = exported(0, torch.float32)
    with pytest.raises(
        mhc_compile.errors.CaptureError, match=r"GraphModule or a torch.export.ExportedProgram, got Decoder"
    ):
        mhc_compile.rewrite(Decoder(), tokens())
    with pytest.raises(mhc_compile.errors.CaptureError, match="takes no example inputs with an ExportedProgram, got 1"):
        mhc_compile.rewrite(program, tokens())
    with pytest.raises(mhc_compile.errors.OptionError, match="did you mean 'streams'"):
        mhc_compile.rewrite(program, options={"stream": 2})


def test_a_joint_program_is_rejected():
    from torch.export.experimental import _export_forward_backward

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = Decoder()

        def forward(self, ids: Tensor) -> Tensor:
            return self.decoder(ids).square().mean()

    joint = _export_forward_backward(export(Loss(), (tokens(),)))
    with pytest.raises(mhc_compile.errors.CaptureError, match="also computes gradients"):
        mhc_compile.rewrite(joint)


def test_an_entry_called_mhc_is_in_the_way():
    model = Decoder()
    model.blocks[0].mhc = nn.Linear(2, 2)
    program = export(model, (tokens(),))
    with pytest.raises(mhc_compile.errors.AttachError, match=r"entry 'blocks.0.mhc.weight' of its own"):
        mhc_compile.rewrite(program)


def test_a_module_that_is_called_with_two_widths_serves_one():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = Shift()
            self.down = nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.shift(self.shift(self.down(self.shift(self.shift(x)))))

    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Conv1d(5, 5, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mix(nn.functional.layer_norm(x, (x.shape[-1],)))

    x = torch.randn(2, 5, 8)
    program = export(Both(), (x,))
    plan = plan_program(program, mhc_compile.Options().resolved).plan
    assert [[site.width for site in chain.sites] for chain in plan.chains] == [[8, 8]]
    assert Counter(rejection.reason.value for rejection in plan.rejections) == {"width-conflict": 2}
    assert_preserved(program, mhc_compile.rewrite(program), 1e-5, x)
