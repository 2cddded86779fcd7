"""Tensor subclasses as weights and as activations: the same numbers as plain tensors.

Jagged tensors, which have no streams, are in `tests/passes/planning/test_verdict.py`.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.builders import Pair, twin
from helpers.gates import scatter
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map

import mhc_compile


class Int8(Tensor):
    """A weight of int8 values and one scale, which `F.linear` dequantises."""

    def __new__(cls, values, scale):
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype, device=values.device)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    def __repr__(self):
        return f"Int8({self.values}, {self.scale})"

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, metadata, size, stride):
        return Int8(inner["values"], inner["scale"])

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            return F.linear(args[0], args[1].values.to(args[0].dtype) * args[1].scale, *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return return_and_correct_aliasing(function, args, kwargs or {}, Int8(args[0].values, args[0].scale))
        raise NotImplementedError(f"{function} of an int8 weight")


class Wrapped(Tensor):
    """An activation that passes every operation on to the tensor inside."""

    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device, requires_grad=inner.requires_grad
        )

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):  # torch's own reads values, which a fake tensor has not, and a log may ask for it
        return f"{type(self).__name__}({self.inner})"

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, metadata, size, stride):
        return Wrapped(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inner, named = tree_map(lambda x: x.inner if isinstance(x, Wrapped) else x, (args, kwargs))
        result = tree_map(lambda x: cls(x) if isinstance(x, Tensor) else x, function(*inner, **named))
        return return_and_correct_aliasing(function, args, kwargs, result)


class Opaque(Wrapped):
    """One that knows no operation of another library."""

    @staticmethod
    def __tensor_unflatten__(inner, metadata, size, stride):
        return Opaque(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function.namespace == "mhc":
            raise NotImplementedError(f"{function} of an opaque tensor")
        return super().__torch_dispatch__(function, types, args, kwargs)


def compile_(model, inner_backend="eager", **options):
    return torch.compile(model, backend="mhc", options={"inner_backend": inner_backend, **options})


def stir(model):
    torch.manual_seed(1)
    scatter(model, 0.5)


@pytest.mark.parametrize("inner_backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_weights_of_a_subclass_work(inner_backend):
    """The same model with the dequantised weights is the oracle."""
    model, x = Pair(8), torch.randn(3, 8)
    dequantised = twin(model)
    for linear, plain in ((model.first, dequantised.first), (model.second, dequantised.second)):
        scale = linear.weight.data.abs().amax() / 127
        weight = Int8((linear.weight.data / scale).round().to(torch.int8), scale)
        plain.weight.data.copy_(weight.values * scale)
        linear.weight = nn.Parameter(weight, requires_grad=False)
    results = []
    for each in (model, dequantised):
        mhc_compile.attach(each, x, options={"strict": True})
        stir(each)
        results.append(compile_(each, inner_backend, strict=True)(x))
        assert len(mhc_compile.connections(each)) == 2
    assert torch.allclose(*results, atol=1e-6)


@pytest.mark.parametrize("inner_backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_activations_of_a_subclass_work(inner_backend):
    model, x = Pair(8), torch.randn(3, 8)
    compiled = compile_(model, inner_backend, strict=True)
    compiled(Wrapped(x))
    assert len(mhc_compile.connections(model)) == 2
    stir(model)
    assert torch.allclose(compiled(Wrapped(x)).inner, compiled(x), atol=1e-6)


def test_activations_without_the_operators_of_streams_are_a_rejection():
    model, x = Pair(8), torch.randn(3, 8)
    want = twin(model)(x)
    mhc_compile.attach(model, x)
    stir(model)
    with pytest.warns(mhc_compile.MhcWarning, match=r"2 hyper-connections have no part .* 2 × tensor-subclass"):
        got = compile_(model)(Opaque(x))
    assert torch.allclose(got.inner, want, atol=1e-6)
    with pytest.raises(mhc_compile.errors.NothingRewrittenError, match="tensor-subclass"):
        compile_(model, strict=True)(Opaque(x))
