"""Blocks that run as programs made by torch.compile, one for all blocks that are built alike; where none can be made
they run as before.

Only the call of a block is another one: the model's classes, weights and hooks stay as they are, and every program
belongs to its Compiler and goes with it. A compiled block rounds in another order: gradients differ from those without
by at most TOLERANCE of their size in fp32.
"""

from __future__ import annotations

import contextlib
import types
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

COMPILE_BACKEND = "inductor"  # torch's own; needs a C++ compiler on the CPU, triton on a GPU
COMPILED_GRADIENT_TOLERANCE = 1e-4  # norm of the difference over the norm, of a step's gradients in fp32
# of images and texts that one kind of block gets programs for; each takes seconds to make, so rarer ones run without
MAX_SHAPES_PER_BLOCK = 8


class CompilableAdapters(Protocol):
    """What a compiler asks adapters."""

    @property
    def compile_strength(self) -> float | None:
        """The strength that a program would be made for; None while none could follow."""
        ...

    def adapter_signature(self, layer) -> tuple | None:
        """Equal for layers whose adapters differ in their numbers only."""
        ...


@dataclass
class BlockCompiler:
    """Calls blocks through torch.compile. `normalize_call(args, kwargs)` gives the same call without what
    differs between blocks and changes nothing of their answer (a block's own number, say), so that they can share a
    program. `notify(text)` is called once with the reason why there are none."""

    adapters: CompilableAdapters
    normalize_call: Callable = lambda args, kwargs: (args, kwargs)
    notify: Callable[[str], None] = lambda text: None
    backend: str = field(default_factory=lambda: COMPILE_BACKEND)
    failure: str = ""  # why blocks run as before
    programs: dict = field(default_factory=dict)
    block_signatures: weakref.WeakKeyDictionary = field(
        default_factory=weakref.WeakKeyDictionary
    )  # block -> how it is built
    trained_strengths: set = field(default_factory=set)  # strengths that a gradient was asked for

    def bind_program(self, forward):
        """A function that calls a block as it was called the first time: what backward computes again must come from
        the same program."""
        chosen = None

        def call(module, *args, **kwargs):
            nonlocal chosen
            if chosen is None:
                program = self.find_program(forward, module, argument_shapes(args, kwargs))
                chosen = forward if program is None else self.call_normalized(program)
                if program is not None:
                    try:
                        return chosen(module, *args, **kwargs)
                    except Exception as error:
                        if not is_compile_error(error):
                            raise
                        chosen = forward
                        self.give_up(describe_compile_error(error))
            return chosen(module, *args, **kwargs)

        return call

    def call_normalized(self, program):
        def run(module, *args, **kwargs):
            args, kwargs = self.normalize_call(args, kwargs)
            return program(module, *args, **kwargs)

        return run

    def find_program(self, forward, module, shapes):
        """What to call in place of `forward`, or None. Strengths that are only looked at (a curve, a sweep) are not
        worth a program. Each
        shape has its own: a program for all shapes would take the place of one that a backward still needs."""
        strength, learning = self.adapters.compile_strength, torch.is_grad_enabled()
        if self.failure or strength is None:
            return None
        if learning:
            self.trained_strengths.add(strength)
        elif strength and strength not in self.trained_strengths:
            return None
        if module not in self.block_signatures:
            self.block_signatures[module] = block_signature(module, self.adapters)
        known = self.programs.setdefault((forward, self.block_signatures[module], strength, learning), {})
        if shapes not in known and len(known) < MAX_SHAPES_PER_BLOCK:
            try:
                known[shapes] = torch.compile(clone_function(forward), backend=self.backend, dynamic=False)
            except RuntimeError as error:  # of a Python that torch.compile does not know yet, for example
                self.give_up(describe_compile_error(error))
        return known.get(shapes)

    def give_up(self, why: str):
        self.failure = why
        self.programs.clear()
        self.notify(format_not_compiled(why))

    @contextlib.contextmanager
    def compile_context(self):
        """What torch must be told while blocks are compiled. Programs for backward are made in forward, where a block
        can still run without."""
        import torch._dynamo
        import torch._functorch.config

        dynamo = patch_torch_config(torch._dynamo.config, recompile_limit=64, suppress_errors=False)
        functorch = patch_torch_config(torch._functorch.config, force_non_lazy_backward_lowering=True)
        try:
            with dynamo, functorch, warnings.catch_warnings():
                for noise in (
                    r"The \.grad attribute of a Tensor that is not a leaf",
                    r"`?torch\.jit\.script_method",
                ):  # of torch about itself
                    warnings.filterwarnings("ignore", message=noise)
                yield self
        finally:
            self.programs.clear()
            self.block_signatures.clear()


def format_not_compiled(why: str) -> str:
    return f"Blocks are not compiled: {why}. Training goes on without, with the same result."


def patch_torch_config(config, **values):
    """These values of a config of torch while inside; those that this release does not know are left out."""
    return config.patch({name: value for name, value in values.items() if hasattr(config, name)})


def block_signature(module, adapters: CompilableAdapters) -> tuple:
    """Equal for blocks that may share a program. torch itself does not look whether a layer has hooks, or whose."""
    return (type(module), *(layer_signature(name, m, adapters) for name, m in module.named_modules()))


def layer_signature(name, m, adapters: CompilableAdapters) -> tuple:
    shapes = tuple((key, tuple(p.shape), p.dtype) for key, p in m._parameters.items() if p is not None)
    return name, type(m), shapes, len(m._forward_hooks), len(m._forward_pre_hooks), adapters.adapter_signature(m)


def argument_shapes(args, kwargs) -> tuple:
    return tuple(tuple(value.shape) for value in (*args, *kwargs.values()) if torch.is_tensor(value))


def clone_function(function):
    """The same function with code of its own: what torch.compile keeps by code is not found by those who call the
    original."""
    if not isinstance(function, types.FunctionType):
        return function
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return own


def is_compile_error(error: Exception) -> bool:
    """Whether a program could not be made, in contrast to one that failed at work (out of memory, say)."""
    return is_torch_error(error, "TorchDynamoException", "CppCompileError", "InvalidCxxCompiler")


def is_torch_error(error: BaseException, *names: str) -> bool:
    """By the names of torch's classes: not every release has all of them."""
    return any(cls.__name__ in names and cls.__module__.startswith("torch.") for cls in type(error).__mro__)


def describe_compile_error(error: Exception) -> str:
    """One phrase for a person."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(cause)
        cause = getattr(cause, "inner_exception", None) or cause.__cause__
    has = lambda name: any(is_torch_error(cause, name) for cause in causes)
    words = " ".join(map(str, causes))
    if has("InvalidCxxCompiler") or "No working C++ compiler" in words:
        return "this machine has no C++ compiler that torch finds (g++, clang, or cl on Windows)"
    if has("TritonMissing") or "working triton" in words.lower():
        return "the package triton is not there (triton-windows on Windows)"
    if has("GPUTooOldForTriton"):
        return "triton does not support a GPU as old as this one"
    if has("CppCompileError"):
        return "the C++ compiler of this machine failed"
    lines = [line.strip() for line in str(causes[-1]).splitlines() if line.strip()]
    return (
        f"torch.compile failed on this model ({type(causes[-1]).__name__}: {lines[0] if lines else 'no more is known'})"
    ).rstrip(".")
