"""Find private names of torch in Python source."""

from __future__ import annotations

import ast
import re
from functools import cache
from typing import NamedTuple

#: Private attributes that torch sets on objects of its own and of others, and private keys of
#: dictionaries that it fills.
SET_BY_TORCH = frozenset(
    "_backward_hooks _buffers _cdata _checkpoint_context_fn _codegen _compiled_call_impl _ddp_ignored _dynamo_source"
    " _get_fsdp_state _is_fsdp_managed_module _metadata _module_parameters _modules _numel_cache _orig_mod _overloadname"
    " _parameters _post_forward _pre_forward _qualified_op_name _root _schema _torchdynamo_orig_backend _tracer_cls"
    " _version".split()
)


class Use(NamedTuple):
    """One private name in a source."""

    line: int
    name: str


@cache
def attributes_of_torch() -> frozenset[str]:
    """Private attributes of objects that code of this kind handles: modules, tensors, graphs,
    nodes, operators, optimizers.
    """
    import torch
    from torch import fx, nn
    from torch._dynamo.eval_frame import OptimizedModule

    module = nn.Linear(1, 1)
    graph = fx.symbolic_trace(module)
    things = (
        module,
        module.weight,
        OptimizedModule,
        graph,
        graph.graph,
        next(iter(graph.graph.nodes)),
        torch.optim.SGD(module.parameters()),
        torch.ops.aten.add,
        torch.ops.aten.add.Tensor,
        torch.ops.aten.add.Tensor._schema,
    )
    return SET_BY_TORCH | {name for thing in things for name in dir(thing) if is_private(name)}


def is_private(name: str) -> bool:
    """Whether a name starts with one underscore."""
    return name.startswith("_") and not name.startswith("__") and len(name) > 1


def private_names(source: str) -> list[Use]:
    """Every use of a private name of torch in `source`, in order of lines.

    These are imports from private modules; private attributes of names that were imported from
    torch; attributes (`x._modules`) and overridden methods whose names are private ones of torch;
    and strings that name them, for `getattr`, `importlib.import_module`, `sys.modules`, `__dict__`.
    `self._modules` counts in subclasses of torch's classes.
    """
    tree = ast.parse(source)
    known, bound, found = attributes_of_torch(), _bound(tree), []
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    derived = [node for node in classes if any(_path(base, bound) for base in node.bases)]
    others = {id(node) for one in classes if one not in derived for node in ast.walk(one)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [Use(node.lineno, alias.name) for alias in node.names if _private_path(alias.name)]
        elif isinstance(node, ast.ImportFrom):
            paths = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [Use(node.lineno, path) for path in paths if not node.level and _private_path(path)]
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            path = _path(node, bound)
            own = isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"} and id(node) in others
            if path is not None:
                found.append(Use(node.lineno, path))
            elif node.attr in known and not own:
                found.append(Use(node.lineno, node.attr))
        elif isinstance(node, ast.ClassDef) and node in derived:
            methods = (item for item in node.body if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)))
            found += [Use(item.lineno, item.name) for item in methods if item.name in known]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            path = re.fullmatch(r"torch(\.\w+)+", node.value)
            if node.value in SET_BY_TORCH or (path and _private_path(node.value)):
                found.append(Use(node.lineno, node.value))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in {
            "getattr",
            "setattr",
            "hasattr",
            "delattr",
        }:
            name = node.args[1] if len(node.args) > 1 else None
            if isinstance(name, ast.Constant) and name.value in known - SET_BY_TORCH:
                found.append(Use(node.lineno, str(name.value)))
    return sorted(set(found))


def _bound(tree: ast.AST) -> dict[str, str]:
    """The names that a source binds to torch, its modules and what it imports from them, with their
    dotted paths.
    """
    bound: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    bound[alias.asname or "torch"] = alias.name if alias.asname else "torch"
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module = node.module or ""
            if module.split(".")[0] == "torch":
                bound.update({alias.asname or alias.name: f"{module}.{alias.name}" for alias in node.names})
            elif module == "mhc_compile._torch":  # what it exports may be torch's
                bound.update({alias.asname or alias.name: alias.name for alias in node.names})
    return bound


def _path(node: ast.expr, bound: dict[str, str]) -> str | None:
    """The dotted path of an attribute of something that was imported from torch, None for other
    expressions.
    """
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in bound:
        return None
    return ".".join([bound[node.id], *reversed(parts)])


def _private_path(path: str) -> bool:
    first, *rest = path.split(".")
    return first == "torch" and any(is_private(part) for part in rest)
