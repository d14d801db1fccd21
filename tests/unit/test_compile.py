"""Compiled blocks on a small network: the same gradients, programs that are shared where blocks are alike, and none
left behind."""

import shutil
import sys

import pytest
import torch
from torch import nn
from trainyard.trainers.adapters.adapters import Adapters
from trainyard.trainers.memory import compile
from trainyard.trainers.memory.checkpointing import CheckpointPolicy, checkpoint_blocks
from trainyard.trainers.memory.compile import COMPILED_GRADIENT_TOLERANCE, BlockCompiler, clone_function
from trainyard.trainers.memory.plan import PLAN_OFF, PLAN_PER_BLOCK, PLAN_PER_BLOCK_CPU
from trainyard.trainers.settings import AdapterSettings

RANK_2 = AdapterSettings(rank=2, targets="all linear")


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.one, self.two = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x, options):
        return x + self.two(torch.nn.functional.silu(self.one(x))) * options["scale"] + options.get("place", 0) * 0


class Net(nn.Module):
    def __init__(self, depth=3, width=16):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Layer(width) for _ in range(depth)).requires_grad_(False)

    def forward(self, x):
        for place, block in enumerate(self.blocks):
            x = block(x, {"scale": 0.5, "place": place})
        return x


def placeless(args, kwargs):
    return tuple({"scale": value["scale"]} if isinstance(value, dict) else value for value in args), kwargs


def shaken(net, settings=RANK_2):
    adapters = Adapters(net, settings, torch.Generator().manual_seed(1))
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in adapters.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * 0.3)
    return adapters


def rows(count):
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(3))


def gradients(net, adapters, x, strength=1.0):
    adapters.zero_grad()
    with adapters.at_strength(strength):
        loss = net(x).square().mean()
    loss.backward()
    return torch.cat(
        [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten().clone() for p in adapters.parameters()]
    )


def away(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


def both(backend, plan=PLAN_OFF, settings=RANK_2):
    """(distance of the gradients with and without, Compiler after the fact)."""
    net = Net()
    adapters = shaken(net, settings)
    compiler = BlockCompiler(adapters, placeless, backend=backend)
    with adapters.attached(), compiler.compile_context():
        for strength in (1.0, -1.0):
            plain = gradients(net, adapters, rows(5), strength)
            with checkpoint_blocks({Layer}, adapters, CheckpointPolicy(plan, compiler=compiler)):
                distance = away(gradients(net, adapters, rows(5), strength), plain)
            assert distance <= COMPILED_GRADIENT_TOLERANCE, f"{distance:.1e} at strength {strength:+}"
        count = programs(compiler)
    return distance, compiler, count


def programs(compiler):
    return sum(len(known) for known in compiler.programs.values())


@pytest.mark.parametrize("plan", [PLAN_OFF, PLAN_PER_BLOCK, PLAN_PER_BLOCK_CPU])
@pytest.mark.parametrize("settings", [RANK_2, AdapterSettings(rank=2, targets="all linear", algorithm="DoRA"),
                                      AdapterSettings(rank=2, targets="all linear", algorithm="LoKr", factor=4)], ids=["LoRA", "DoRA", "LoKr"])  # fmt: skip
def test_compiled_blocks_give_the_same_gradients_within_the_tolerance(plan, settings):
    """At +1 and at -1: one program for each, and none more for the three blocks, which differ in their numbers only."""
    _, compiler, count = both("aot_eager", plan, settings)
    assert not compiler.failure and count == 2


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")) or sys.platform == "win32",
    reason="INDUCTOR NOT TESTED: no C++ compiler here",
)
def test_the_compiler_that_users_get_keeps_the_tolerance_too():
    distance, compiler, _ = both("inductor")
    assert not compiler.failure, compiler.failure
    assert distance <= COMPILED_GRADIENT_TOLERANCE


def test_blocks_with_and_without_an_adapter_share_no_program():
    """torch does not look whether a layer has hooks: with a program of the bare block, the second block's adapter would
    learn nothing."""
    net = Net(depth=2)
    adapters = shaken(net, AdapterSettings(rank=2, targets="regex", pattern="blocks.1"))
    compiler = BlockCompiler(adapters, placeless, backend="aot_eager")
    with adapters.attached(), compiler.compile_context():
        plain = gradients(net, adapters, rows(5))
        with checkpoint_blocks({Layer}, adapters, CheckpointPolicy(PLAN_OFF, compiler=compiler)):
            assert away(gradients(net, adapters, rows(5)), plain) <= COMPILED_GRADIENT_TOLERANCE
        assert plain.any() and programs(compiler) == 2


def test_each_shape_has_its_program_up_to_a_limit_and_backward_finds_the_one_of_its_forward(monkeypatch):
    """Two shapes in one step, computed again in backward: a program for all shapes would keep other tensors than the
    first one did."""
    monkeypatch.setattr(compile, "MAX_SHAPES_PER_BLOCK", 2)
    net = Net()
    adapters = shaken(net)
    compiler = BlockCompiler(adapters, placeless, backend="aot_eager")

    def step():
        adapters.zero_grad()
        sum(net(rows(count)).square().mean() for count in (5, 6, 7)).backward()
        return torch.cat([p.grad.flatten() for p in adapters.parameters()])

    with adapters.attached(), compiler.compile_context():
        plain = step()
        with checkpoint_blocks({Layer}, adapters, CheckpointPolicy(PLAN_PER_BLOCK, compiler=compiler)):
            assert away(step(), plain) <= COMPILED_GRADIENT_TOLERANCE
        assert programs(compiler) == 2


def test_strengths_that_are_only_looked_at_get_no_program():
    net = Net()
    adapters = shaken(net)
    compiler = BlockCompiler(adapters, placeless, backend="eager")
    with (
        adapters.attached(),
        compiler.compile_context(),
        checkpoint_blocks({Layer}, adapters, CheckpointPolicy(PLAN_OFF, compiler=compiler)),
    ):
        gradients(net, adapters, rows(5))
        with torch.no_grad(), adapters.at_strength(0.7):
            net(rows(5))
        assert programs(compiler) == 1, compiler.failure
        with torch.no_grad(), adapters.at_strength(0):
            net(rows(5))
        assert programs(compiler) == 2, "the frozen model is asked at every step"


def test_where_no_program_can_be_made_it_says_so_once_and_goes_on_with_the_same_gradients():
    def broken(graph, inputs):
        raise RuntimeError(
            "Cannot find a working triton installation. Either the package is not installed\nor it is too old"
        )

    said, net = [], Net()
    adapters = shaken(net)
    compiler = BlockCompiler(adapters, placeless, said.append, backend=broken)
    with adapters.attached(), compiler.compile_context():
        plain = gradients(net, adapters, rows(5))
        with checkpoint_blocks({Layer}, adapters, CheckpointPolicy(PLAN_PER_BLOCK, compiler=compiler)):
            for _ in range(2):
                assert torch.equal(gradients(net, adapters, rows(5)), plain)
    assert said == [
        "Blocks are not compiled: the package triton is not there (triton-windows on Windows). Training goes on "
        "without, with the same result."
    ]


def test_a_machine_without_a_c_compiler_is_told_so():
    def broken(graph, inputs):
        from torch._inductor.exc import InvalidCxxCompiler

        raise InvalidCxxCompiler

    said, net = [], Net()
    adapters = shaken(net)
    compiler = BlockCompiler(adapters, placeless, said.append, backend=broken)
    with (
        adapters.attached(),
        compiler.compile_context(),
        checkpoint_blocks({Layer}, adapters, CheckpointPolicy(PLAN_OFF, compiler=compiler)),
    ):
        net(rows(5))
    assert "no C++ compiler" in said[0] and len(said) == 1


def test_a_backward_that_cannot_be_compiled_is_known_in_forward():
    from torch._dynamo.backends.common import aot_autograd

    def nope(graph, inputs):
        raise RuntimeError("no program for backward")

    said, net = [], Net()
    adapters = shaken(net)
    compiler = BlockCompiler(
        adapters,
        placeless,
        said.append,
        backend=aot_autograd(fw_compiler=lambda graph, inputs: graph.forward, bw_compiler=nope),
    )
    with adapters.attached(), compiler.compile_context():
        plain = gradients(net, adapters, rows(5))
        with checkpoint_blocks({Layer}, adapters, CheckpointPolicy(PLAN_OFF, compiler=compiler)):
            assert torch.equal(gradients(net, adapters, rows(5)), plain)
    assert "RuntimeError: no program for backward" in said[0]


def test_an_error_at_work_is_no_trouble_of_the_compiler():
    net = Net()
    adapters = shaken(net)
    compiler = BlockCompiler(adapters, placeless, backend=lambda graph, inputs: full)

    def full(*inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with (
        adapters.attached(),
        compiler.compile_context(),
        checkpoint_blocks({Layer}, adapters, CheckpointPolicy(PLAN_OFF, compiler=compiler)),
    ):
        with pytest.raises(torch.OutOfMemoryError):
            net(rows(5))
    assert not compiler.failure


def test_dropout_is_followed_by_no_program():
    net = Net()
    adapters = shaken(net, AdapterSettings(rank=2, targets="all linear", dropout=0.5))
    assert adapters.has_dropout and adapters.compile_strength == 1.0
    with adapters.dropout_active(torch.Generator().manual_seed(0)):
        assert adapters.compile_strength is None


def test_nothing_is_left_behind_also_after_an_error():
    before = Layer.forward
    limit = torch._dynamo.config.recompile_limit
    net = Net()
    adapters = shaken(net)
    compiler = BlockCompiler(adapters, placeless, backend="eager")
    with (
        pytest.raises(KeyboardInterrupt),
        adapters.attached(),
        compiler.compile_context(),
        checkpoint_blocks({Layer}, adapters, CheckpointPolicy(PLAN_OFF, compiler=compiler)),
    ):
        net(rows(5))
        raise KeyboardInterrupt
    assert Layer.forward is before and not compiler.programs and torch._dynamo.config.recompile_limit == limit
    assert not any(adapters.slot_name in m.__dict__ or m._forward_hooks for m in net.modules())


def test_a_copied_function_answers_as_the_original():
    def f(a, b=2, *, c=3):
        return a, b, c, COMPILED_GRADIENT_TOLERANCE

    assert clone_function(f)(1, c=4) == f(1, c=4) and clone_function(f).__code__ is not f.__code__
    assert clone_function(len) is len
