"""In-place updates become new tensors in the code of a model, for as long as it trains.

Flux, Chroma, HunyuanVideo and every text encoder update their residual stream by `x += y`, LTX-Video and PixelDiT by
`x.addcmul_(y, z)`, some of them in a function beside their classes. That overwrites tensors which the backward pass
still needs: autograd refuses, or, under checkpointing, returns wrong gradients without a word. The functions' own
source is compiled again with the updates spelled out; nothing else in it changes, and all are put back.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import inspect
import sys
import textwrap
import types

import torch

FORWARD_METHODS = ("forward", "_forward", "forward_orig")
NO_GRAD_FILE = torch.no_grad()(lambda: None).__code__.co_filename  # of the function that the decorator makes
MADE = "_trainyard_made"  # a name that no code has
VIEWS = "view reshape transpose permute unsqueeze squeeze flatten unflatten narrow expand chunk split unbind T".split()


def is_update(node) -> bool:
    """Whether this is a call of a tensor's method that changes the tensor: x.mul_(y), x.addcmul_(y, z)."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    name = node.func.attr
    return name.endswith("_") and not name.startswith("_") and name not in ("requires_grad_", "copy_")


def find_updated(node):
    """What a chain of updates changes: x of x.mul_(y).add_(z); None where there is no update."""
    updated = None
    while is_update(node):
        node = updated = node.func.value
    return updated


def copy_of(node, context):
    """A name, or a part of one, to be read or to be written."""
    copied = copy.deepcopy(node)
    copied.ctx = context
    return copied


class OutOfPlaceTransformer(ast.NodeTransformer):
    """Updates of local names and of parts of them. Attributes are shared with others, and what is filled for the first
    time (`x[a:b] = y`) was not looked at before: both stay."""

    def __init__(self, local_names=()):
        self.local_names, self.rewritten_count = local_names, 0

    def is_local(self, node) -> bool:
        return isinstance(node, ast.Name) and node.id in self.local_names

    def visit_AugAssign(self, node):
        """x += y -> x = x + y; x[i] += y -> made = x[i] + y, x = x.clone(), x[i] = made"""
        self.generic_visit(node)
        value = ast.BinOp(copy_of(node.target, ast.Load()), node.op, node.value)
        if isinstance(node.target, ast.Name):
            self.rewritten_count += 1
            return ast.copy_location(ast.Assign([node.target], value), node)
        if not self.is_part_of_local(node.target):
            return node
        return self.write_into_copy(node.target, value, node)

    def visit_Assign(self, node):
        """x[i] = f(x) -> made = f(x), x = x.clone(), x[i] = made"""
        self.generic_visit(node)
        (target, *others) = node.targets
        if others or not self.is_part_of_local(target):
            return node
        reads = any(isinstance(n, ast.Name) and n.id == target.value.id for n in ast.walk(node.value))
        return self.write_into_copy(target, node.value, node) if reads else node

    def is_part_of_local(self, node) -> bool:
        return isinstance(node, ast.Subscript) and self.is_local(node.value)

    def write_into_copy(self, target: ast.Subscript, value, node) -> list:
        """Statements that write a value into a part of a name, which has become its own copy if it is a tensor. The
        value is made before: it may look at what is overwritten."""
        self.rewritten_count += 1
        name = target.value
        is_tensor = ast.Call(ast.Name("hasattr", ast.Load()), [name, ast.Constant("addcmul_")], [])
        clone = ast.Call(ast.Attribute(name, "clone", ast.Load()), [], [])
        made = [
            ast.Assign([ast.Name(MADE, ast.Store())], value),
            ast.Assign([copy_of(name, ast.Store())], ast.IfExp(is_tensor, clone, name)),
            ast.Assign([target], ast.Name(MADE, ast.Load())),
        ]
        return [ast.copy_location(statement, node) for statement in made]

    def visit_Expr(self, node):
        """x.mul_(y) -> x = x.mul(y); x[i].mul_(y) as x[i] *= y"""
        updated = find_updated(node.value)
        if updated is None:
            return self.generic_visit(node)
        if self.is_part_of_local(updated):
            return self.write_into_copy(copy_of(updated, ast.Store()), self.spell_out(node.value), node)
        if not self.is_local(updated):
            return node
        return ast.copy_location(ast.Assign([copy_of(updated, ast.Store())], self.spell_out(node.value)), node)

    def visit_Call(self, node):
        """Within an expression: f(x.mul_(y)) -> f(x := x.mul(y)); f(g(x).mul_(y)) -> f(g(x).mul(y))"""
        updated = find_updated(node)
        if self.is_local(updated):
            value = self.spell_out(node)
            return ast.copy_location(ast.NamedExpr(ast.Name(updated.id, ast.Store()), value), node)
        is_fresh = isinstance(updated, ast.Call) and getattr(updated.func, "attr", "") not in VIEWS
        return self.spell_out(node) if is_fresh else self.generic_visit(node)

    def visit_Lambda(self, node):
        return node  # names that are bound in it are others

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_Lambda

    def spell_out(self, node):
        """A chain of updates as one of new tensors."""
        if not is_update(node):
            return self.visit(node)
        self.rewritten_count += 1
        method = ast.Attribute(self.spell_out(node.func.value), node.func.attr.removesuffix("_"), ast.Load())
        keywords = [ast.keyword(word.arg, self.visit(word.value)) for word in node.keywords]
        return ast.copy_location(ast.Call(method, [self.visit(a) for a in node.args], keywords), node)


@functools.lru_cache(maxsize=None)
def compile_out_of_place(function):
    """The same function with out-of-place updates, or None when it has none (or its source cannot be had)."""
    if not inspect.isfunction(function):
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    rule = OutOfPlaceTransformer(function.__code__.co_varnames)
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


def list_rewritten(network):
    """[(class or module, name, function, the same out of place)]: the forward methods of the network's classes, the
    functions beside these classes that hand back what they update, and methods that `torch.no_grad` decorates (the
    experts of Hunyuan3D 2.1), which are part of the forward pass like any other."""
    classes = find_forward_classes(network)
    frozen = [
        (cls, name, value, compile_out_of_place(inner) or inner)
        for cls in classes
        for name, value in vars(cls).items()
        if (inner := find_without_no_grad(value)) is not None
    ]
    methods = [(cls, name, cls.__dict__[name]) for cls in classes for name in FORWARD_METHODS if name in cls.__dict__]
    names = {cls.__module__ for cls in classes}
    functions = [
        (module, name, value)
        for module in (sys.modules[name] for name in sorted(names) if name in sys.modules)
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ in names and returns_value(value)
    ]
    made = [(*found, compile_out_of_place(found[2])) for found in (*methods, *functions)]
    return [*frozen, *(found for found in made if found[3] is not None)]


def find_without_no_grad(function):
    """What torch.no_grad (or inference_mode) decorates; None for other functions."""
    is_decorated = inspect.isfunction(function) and function.__code__.co_filename == NO_GRAD_FILE
    return getattr(function, "__wrapped__", None) if is_decorated else None


@functools.lru_cache(maxsize=None)
def returns_value(function) -> bool:
    """Whether a function ends with the return of a value. One that does not is called for what it changes."""
    try:
        last = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0].body[-1]
    except (OSError, TypeError, SyntaxError, AttributeError):
        return False
    return isinstance(last, ast.Return) and last.value is not None


@contextlib.contextmanager
def disable_inplace_updates(network):
    """Every in-place update of a name in the network's code works out of place, until the way out."""
    rewritten = list_rewritten(network)
    try:
        for owner, name, _, new in rewritten:
            setattr(owner, name, new)
        yield [f"{owner.__name__}.{name}" for owner, name, _, _ in rewritten]
    finally:
        for owner, name, original, _ in rewritten:
            setattr(owner, name, original)
