"""`x += y` becomes `x = x + y` in the methods of a model's classes, for as long as it trains.

Flux, Chroma, HunyuanVideo and every text encoder update their residual stream in place. That overwrites tensors which
the
backward pass still needs: autograd refuses, or, under checkpointing, returns wrong gradients without a word. The
method's own source is compiled again with the assignments spelled out; nothing else in it changes, and the class gets
its method back.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import textwrap
import types

FORWARD_METHODS = ("forward", "_forward", "forward_orig")


class OutOfPlaceTransformer(ast.NodeTransformer):
    """Plain names only: an update through an index or attribute writes into the object it names, and stays."""

    rewritten_count = 0

    def visit_AugAssign(self, node):
        self.generic_visit(node)
        if not isinstance(node.target, ast.Name):
            return node
        self.rewritten_count += 1
        value = ast.BinOp(ast.Name(node.target.id, ast.Load()), node.op, node.value)
        return ast.copy_location(ast.Assign([ast.Name(node.target.id, ast.Store())], value), node)


@functools.lru_cache(maxsize=None)
def compile_out_of_place(function):
    """The same function with out-of-place updates, or None when it has none (or its source cannot be had)."""
    if not inspect.isfunction(function):
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    rule = OutOfPlaceTransformer()
    tree.body[0] = rule.visit(tree.body[0])
    if not rule.rewritten_count or function.__closure__:
        return None
    tree.body[0].decorator_list = []
    module = compile(ast.fix_missing_locations(tree), inspect.getsourcefile(function) or "<rewritten>", "exec")
    code = next(c for c in module.co_consts if isinstance(c, types.CodeType) and c.co_name == function.__name__)
    new = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__)
    new.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(new, function)


def find_forward_classes(network):
    """Classes that define the network's own forward methods; torch's and the host's elementary layers have none to
    rewrite."""
    seen = {base for m in network.modules() for base in type(m).__mro__}
    return [cls for cls in seen if not cls.__module__.startswith(("torch", "builtins", "comfy.ops"))]


@contextlib.contextmanager
def disable_inplace_updates(network):
    """Every in-place update of a name in the network's forward methods works out of place, until the way out."""
    before = []
    try:
        for cls in find_forward_classes(network):
            for name in FORWARD_METHODS:
                original = cls.__dict__.get(name)
                new = compile_out_of_place(original) if original is not None else None
                if new is not None:
                    before.append((cls, name, original))
                    setattr(cls, name, new)
        yield [f"{cls.__name__}.{name}" for cls, name, _ in before]
    finally:
        for cls, name, original in reversed(before):
            setattr(cls, name, original)
