"""FX graphs and operators: copies of nodes without loss, schemas, gradients inside, and FLOPs."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.fx import Graph
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map_only as tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch.fx import GraphModule, Node

#: Autograd, which is switched off inside operators.
_AUTOGRAD = (
    torch._C.DispatchKey.AutogradFunctionality,
    torch._C.DispatchKey.AutogradOther,
    torch._C.DispatchKey.AutogradNestedTensor,
)


def new_graph_like(graph: Graph, *, codegen: bool = True) -> Graph:
    """Return an empty graph of the same tracer as `graph`.

    With `codegen`, its code is generated alike: an exported program's graph flattens its inputs
    there, which the graph of a region inside it must not.
    """
    new = Graph(tracer_cls=graph._tracer_cls)
    if codegen:
        new.set_codegen(graph._codegen)
    return new


def copy_node(graph: Graph, node: Node, nodes: Mapping[Node, Node]) -> Node:
    """Copy `node` to the end of `graph`, with operands from `nodes` and a shallow copy of `meta`.

    Dynamo stores the source of every graph input on the node itself, where `Graph.node_copy` loses
    it; AOTAutograd asks for it later.
    """
    copy = graph.node_copy(node, nodes.__getitem__)
    if hasattr(node, "_dynamo_source"):
        copy._dynamo_source = node._dynamo_source
    return copy


def is_overload(target: object) -> TypeGuard[OpOverload]:
    """Return whether a node's target is an operator overload, as `torch.ops.aten.add.Tensor`."""
    return isinstance(target, OpOverload)


def is_higher_order(target: object) -> TypeGuard[HigherOrderOperator]:
    """Return whether a node's target is an operator that calls graphs, such as `cond`."""
    return isinstance(target, HigherOrderOperator)


def operator_name(target: object) -> str | None:
    """Return an operator's name, "aten::add", or None for any other function."""
    if isinstance(target, OpOverload):
        return str(target._schema.name)
    if isinstance(target, OpOverloadPacket):
        return str(target._qualified_op_name)
    return None


def overload_like(packet: Any, target: OpOverload) -> OpOverload | None:
    """Return the overload of `packet` with the name of the overload `target`, or None."""
    overload: OpOverload | None = getattr(packet, target._overloadname, None)
    return overload


def written_arguments(target: OpOverload) -> tuple[tuple[int, str], ...]:
    """Return position and name of every argument that the operator writes in place."""
    schema = target._schema
    if not schema.is_mutable:
        return ()
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def checkpoint_context(body: GraphModule) -> Callable[[], Any] | None:
    """Return the context function of a checkpointed region, which holds its policy, or None."""
    context: Callable[[], Any] | None = body.meta.get("_checkpoint_context_fn")
    return context


def storage_key(tensor: torch.Tensor) -> int | None:
    """Return the identity of a tensor's storage while the tensor lives, or None if it has none.

    Tensors that share memory have the same. Example values own no memory, and have no `data_ptr`.
    """
    try:
        return int(tensor.untyped_storage()._cdata)
    # sparse tensors, and tensors wrapped by vmap, have none
    except (RuntimeError, NotImplementedError):
        return None


@contextlib.contextmanager
def autograd_inside_operators() -> Iterator[None]:
    """Record gradients in this context, for `torch.autograd.grad` before its end.

    The tracer of a decomposition does not know the wrappers of `torch.func.vjp`.
    """
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD:
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield


def flop_counter() -> FlopCounterMode:
    """Return a context that counts the FLOPs of what runs in it."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={kernel: _attention_flops})


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:  # noqa: ARG001 - the counter's signature
    return sdpa_flop_count(query, key, value)  # type: ignore[no-any-return]
