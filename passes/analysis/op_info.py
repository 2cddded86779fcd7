"""Facts about single operations. The only place that knows operations by name.

A graph may say `a + b`, `torch.add(a, b)`, `a.add(b)`, `aten.add.Tensor(a, b)` or call a leaf
module; `op_name` gives one name for all spellings, and the tables below classify that name.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mhc_compile._torch import is_higher_order, is_overload, operator_name, written_arguments

if TYPE_CHECKING:
    from torch.fx import Node

ADDS = frozenset({"add", "__add__", "__radd__"})
PRODUCTS = frozenset({"mul", "multiply", "__mul__", "__rmul__"})
QUOTIENTS = frozenset({"div", "true_divide", "truediv", "__truediv__"})
CASTS = frozenset("to float type type_as double bfloat16 half _to_copy".split())
INPLACE_ADDS = frozenset({"iadd", "add_", "__iadd__"})

_MATRIX_PRODUCTS = frozenset(
    "linear addmm addbmm baddbmm mm bmm matmul __matmul__ __rmatmul__ einsum tensordot bilinear mv addmv chain_matmul"
    " _grouped_mm grouped_mm _scaled_mm _scaled_grouped_mm _int_mm spmm".split()
)
#: A Fourier transform is a product with a fixed matrix.
_FOURIER = frozenset(
    f"fft_{inverse}{real}fft{axes}" for inverse in ("", "i") for real in ("", "r", "h") for axes in ("", "2", "n")
) | {"stft", "istft"}
_CONVOLUTIONS = frozenset(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution _convolution conv_tbc".split()
)
_ATTENTIONS = frozenset(
    "scaled_dot_product_attention multi_head_attention_forward flex_attention _flex_attention_hop"
    # What PyTorch's own attention becomes where a program is decomposed.
    " _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention"
    " _scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math".split()
)
#: torch's own fused encoder layer, which holds its residual adds where no pass can see them.
_FUSED_LAYERS = frozenset({"_transformer_encoder_layer_fwd"})
_PRODUCTS = _MATRIX_PRODUCTS | _FOURIER | _FUSED_LAYERS
_RECURRENCES = frozenset("lstm gru rnn_tanh rnn_relu".split())

#: Results share storage with the first operand.
_VIEWS = frozenset(
    "view reshape flatten unflatten view_as reshape_as squeeze unsqueeze transpose swapaxes permute movedim t T mT getitem select"
    " narrow slice chunk split split_with_sizes unbind expand expand_as diagonal unfold as_strided contiguous detach alias".split()
)

#: No value flows through these: the result depends on a shape, dtype or place, or is detached.
_NO_VALUE = frozenset(
    "size shape dim numel ones_like zeros_like full_like empty_like rand_like randn_like randint_like new_ones new_zeros new_full"
    " new_empty new_tensor detach detach_ sym_size is_floating_point".split()
)

_MODULE_CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_CONTRACTING_MODULES = (nn.Linear, nn.Bilinear, *_MODULE_CONVOLUTIONS, nn.MultiheadAttention, nn.RNNBase)
_CONTRACTIONS = _PRODUCTS | _CONVOLUTIONS | _ATTENTIONS | _RECURRENCES
_INPLACE_OPERATORS = frozenset(
    getattr(operator, name) for name in "iadd isub imul itruediv ifloordiv ipow setitem".split()
)
_INPLACE_DUNDERS = frozenset("__iadd__ __isub__ __imul__ __itruediv__ __ipow__ __setitem__".split())
#: Where the functional form takes its `inplace` flag: Dynamo passes such flags by position.
INPLACE_FLAG = {
    "relu": 1, "relu6": 1, "silu": 1, "mish": 1, "selu": 1, "hardswish": 1, "hardsigmoid": 1, "elu": 2, "celu": 2, "leaky_relu": 2,
    "dropout": 3, "alpha_dropout": 3, "hardtanh": 3, "threshold": 3,
}  # fmt: skip


def op_name(node: Node) -> str:
    """Return one name for every spelling of an operation; "" if the node calls none.

    `+`, `torch.add`, `Tensor.add` and `aten.add.Tensor` are all "add".
    """
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    qualified = operator_name(node.target)
    if qualified is not None:
        return qualified.split("::")[-1]
    return getattr(node.target, "__name__", type(node.target).__name__)


def leaf_module(node: Node) -> nn.Module | None:
    """Return the module that a `call_module` node calls, None for every other node."""
    if node.op != "call_module":
        return None
    owner = node.graph.owning_module
    return owner.get_submodule(str(node.target)) if owner is not None else None


def is_convolution(node: Node) -> bool:
    """Return whether the node is a convolution, whose features lie on axis 1."""
    return op_name(node) in _CONVOLUTIONS or isinstance(leaf_module(node), _MODULE_CONVOLUTIONS)


def is_attention(node: Node) -> bool:
    """Return whether the node is a fused attention."""
    return op_name(node) in _ATTENTIONS or isinstance(leaf_module(node), nn.MultiheadAttention)


def is_recurrence(node: Node) -> bool:
    """Return whether the node is a whole LSTM, GRU or plain recurrent network."""
    return op_name(node) in _RECURRENCES or isinstance(leaf_module(node), nn.RNNBase)


def is_fused_layer(node: Node) -> bool:
    """Return whether the node is a whole transformer layer, residual adds included."""
    return op_name(node) in _FUSED_LAYERS


def is_region(node: Node) -> bool:
    """Return whether the node calls graphs that the passes do not read: `cond`.

    Regions of activation checkpointing are inlined before (`InlineRegions`), and the graphs of
    flexible attention only change scores.
    """
    return is_higher_order(node.target) and not is_attention(node)


def is_contraction(node: Node) -> bool:
    """Return whether the node is a matrix product, convolution, attention or recurrence."""
    if node.op == "call_module":
        return isinstance(leaf_module(node), _CONTRACTING_MODULES)
    return op_name(node) in _CONTRACTIONS


def is_view(node: Node) -> bool:
    """Return whether the result may share storage with the first operand."""
    return op_name(node) in _VIEWS


def is_inplace(node: Node) -> bool:
    """Return whether the node writes into its first operand, or into `out`."""
    if node.op == "call_module":
        return bool(getattr(leaf_module(node), "inplace", False))
    if node.op == "call_function" and (node.target in _INPLACE_OPERATORS or node.kwargs.get("out") is not None):
        return True
    name = op_name(node)
    if (name.endswith("_") and not name.endswith("__")) or name in _INPLACE_DUNDERS:
        return True
    flag = INPLACE_FLAG.get(name)
    return node.kwargs.get("inplace") is True or (
        flag is not None and len(node.args) > flag and node.args[flag] is True
    )


def written_operands(node: Node) -> tuple[Node, ...]:
    """Return the operands that the node writes in place."""
    if is_overload(node.target):
        given = (
            node.args[position] if position < len(node.args) else node.kwargs.get(name)
            for position, name in written_arguments(node.target)
        )
        return tuple(operand for operand in given if isinstance(operand, torch.fx.Node))
    if not is_inplace(node):
        return ()
    written = node.kwargs.get("out", node.args[0] if node.args else node.kwargs.get("input"))
    return (written,) if isinstance(written, torch.fx.Node) else ()


def sets_grad_mode(node: Node) -> bool | None:
    """Return whether gradients are recorded from `node` on, None if it does not change that."""
    if op_name(node) in {"_set_grad_enabled", "set_grad_enabled"} and node.args:
        return node.args[0] is True
    return False if op_name(node) == "_enter_inference_mode" else None


def is_update(node: Node) -> bool:
    """Return whether the node is the end of a rewritten site, `mhc::update`."""
    return is_overload(node.target) and operator_name(node.target) == "mhc::update"


def is_random(node: Node) -> bool:
    """Return whether the result depends on random numbers."""
    parts = ("rand", "dropout", "bernoulli", "normal_", "uniform_", "multinomial", "rrelu")
    return any(part in op_name(node) for part in parts)


def runs_once(node: Node) -> bool:
    """Return whether a second run would change the model: random numbers, running statistics."""
    return is_random(node) or op_name(node) == "batch_norm"


def example_value(node: Node) -> Any:
    """Return the recorded example value of a node (a fake tensor, a tuple, a size), or None."""
    return node.meta.get("example_value", node.meta.get("val"))


def tensor_value(node: Node) -> torch.Tensor | None:
    """Return the example tensor of a node, or None if its value is unknown or no tensor."""
    value = example_value(node)
    return value if isinstance(value, torch.Tensor) else None


def known_tensor(node: Node) -> torch.Tensor:
    """Return the example tensor of a node that must have one."""
    value = tensor_value(node)
    assert value is not None, f"{node} has no example tensor"
    return value


def cast_of(node: Node) -> torch.dtype | None:
    """Return the dtype to which a node of AOTAutograd's graphs casts, if it does nothing else."""
    if op_name(node) not in ("_to_copy", "convert_element_type") or node.kwargs.get("memory_format") is not None:
        return None
    source, result = known_tensor(node.all_input_nodes[0]), known_tensor(node)
    moved = (source.device, source.layout) != (result.device, result.layout)
    return None if moved else result.dtype


def passes_value(node: Node) -> bool:
    """Return whether a differentiable value of an operand can reach the result.

    Integers, masks, shapes and detached tensors carry none.
    """
    if op_name(node) in _NO_VALUE:
        return False
    value = example_value(node)
    if isinstance(value, torch.Tensor):
        return value.dtype.is_floating_point or value.dtype.is_complex
    # Tuples of tensors and unknown values pass; sizes and Python numbers do not.
    return not isinstance(value, (bool, int, float, torch.Size, torch.SymInt, torch.SymFloat, torch.SymBool))
