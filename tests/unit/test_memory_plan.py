"""Plans of keeping activations: their arithmetic, and blocks that keep less and give the same gradients."""

import contextlib
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from trainyard.trainers.memory.block_peak import LiveByteCounter, measure_block_peak
from trainyard.trainers.memory.checkpointing import (
    ActivationCounter,
    CheckpointPolicy,
    CountedPassError,
    CpuOffloadHooks,
    checkpoint_blocks,
)
from trainyard.trainers.memory.plan import (
    CHECKPOINTING_PLANS,
    PLAN_OFF,
    PLAN_OFFLOADED,
    PLAN_PER_BLOCK,
    PLAN_PER_BLOCK_CPU,
    SMALL_PIECES_BYTES,
    BlockMemory,
    RunForecast,
    StepMemory,
    choose_checkpointing_plan,
    largest_fitting_batch,
    largest_fitting_microbatch,
    make_run_forecast,
    next_cheaper_plan,
)

MIB = 2**20
FOUR = StepMemory(
    total=440 * MIB,
    outside_blocks=20 * MIB,
    blocks=(
        BlockMemory(10 * MIB, 100 * MIB, 20 * MIB, fetched=10 * MIB),
        *[BlockMemory(10 * MIB, 100 * MIB, fetched=10 * MIB)] * 3,
    ),
    ending=20 * MIB,
    adapter_bytes=MIB,
)
WEIGHTY = replace(FOUR, weights=200 * MIB, largest_block_weights=50 * MIB)


def kept(measured, plan):
    """Bytes kept for backward at its worst moment."""
    only_kept = replace(measured, ending=0, adapter_bytes=0)
    return max(kept for kept, _ in only_kept.backward_profile(plan))


def test_each_plan_keeps_less_than_the_one_before():
    assert kept(FOUR, PLAN_OFF) == 440 * MIB
    assert kept(FOUR, PLAN_PER_BLOCK) == (20 + 100 + 4 * 10) * MIB
    assert kept(FOUR, PLAN_PER_BLOCK_CPU) == (20 + 100 + 10) * MIB


def test_a_large_first_block_is_computed_again_when_nothing_else_waits_any_more():
    """A UNet's: 100 inside with 10 given at first, then three small ones that are given 20 each."""
    unet = StepMemory(total=1000, outside_blocks=0, blocks=(BlockMemory(10, 100), *[BlockMemory(20, 30)] * 3))
    assert kept(unet, PLAN_PER_BLOCK) == 110
    unet = StepMemory(total=1000, outside_blocks=0, blocks=(*[BlockMemory(20, 30)] * 3, BlockMemory(10, 100)))
    assert kept(unet, PLAN_PER_BLOCK) == 170


def test_the_peak_adds_what_passes_within_a_block_and_the_optimizers_numbers():
    """100 MiB are worst in the first block, with three quarters of the gradients made by then, and two moments."""
    passing = replace(FOUR, blocks=(replace(FOUR.blocks[0], passing=100 * MIB), *FOUR.blocks[1:]))
    for plan in (PLAN_OFF, PLAN_PER_BLOCK):
        first = passing.backward_profile(plan)[1]
        assert first == ((20 + 10 + 100 + 100) * MIB, 0.75)
    assert (
        passing.peak_bytes(PLAN_PER_BLOCK_CPU) == (20 + 10 + 100 + 100) * MIB + round(2.75 * MIB) + SMALL_PIECES_BYTES
    )


def test_the_optimizers_step_makes_a_list_as_long_as_the_adapters_beside_gradients_and_moments():
    empty = StepMemory(total=0, outside_blocks=0, blocks=(BlockMemory(0, 0),), adapter_bytes=MIB)
    assert empty.peak_bytes(PLAN_PER_BLOCK) == 4 * MIB + SMALL_PIECES_BYTES


def test_the_adapters_gradients_come_one_after_the_other_from_the_last_block_on_unless_those_of_a_batch_before_are_there():
    """The first block is the worst moment here, when three of four blocks have theirs."""
    first = StepMemory(
        total=10**9, outside_blocks=0, blocks=(BlockMemory(0, 1000), *[BlockMemory(0, 10)] * 3), adapter_bytes=400
    )
    peak = lambda measured: measured.peak_bytes(PLAN_PER_BLOCK) - SMALL_PIECES_BYTES
    assert peak(first) == 1000 + 300 + 2 * 400
    assert peak(replace(first, has_accumulated_gradients=True)) == 1000 + 400 + 2 * 400
    assert peak(replace(first, blocks=first.blocks[::-1])) == 1000 + 2 * 400
    twice = replace(first, blocks=first.blocks * 2, different_blocks=4)
    assert peak(twice) == 1000 + 400 + 2 * 400, "the second prediction's backward pass comes first and made them all"


def test_what_is_kept_behind_a_block_is_free_when_its_turn_comes():
    late = StepMemory(
        total=10**9, outside_blocks=150, blocks=(BlockMemory(10, 300, outside_before=50), BlockMemory(10, 100))
    )
    assert kept(late, PLAN_PER_BLOCK) == 50 + 10 + 300
    early = StepMemory(
        total=10**9,
        outside_blocks=150,
        blocks=(BlockMemory(10, 100, outside_before=50), BlockMemory(10, 300, outside_before=100)),
    )
    assert kept(early, PLAN_PER_BLOCK) == 150 + 20 + 300
    small = StepMemory(total=10**9, outside_blocks=900, blocks=(BlockMemory(10, 100),))
    assert kept(small, PLAN_PER_BLOCK) == 910, "before the first block's turn all of it is there"


@pytest.mark.parametrize(
    ("plan", "has_prefetch", "second", "first"),
    [
        (PLAN_PER_BLOCK, False, 10 + 12 + 60 + 5, 10 + 100),
        (PLAN_PER_BLOCK, True, 10 + 12 + 60 + 5 + 30, 10 + 100),
        (PLAN_PER_BLOCK_CPU, False, 15 + 60 + 5, 11 + 100),
        (PLAN_PER_BLOCK_CPU, True, 15 + 60 + 5 + 30 + 11, 11 + 100),
    ],
)
def test_what_has_come_for_the_block_before_lies_beside_a_block(plan, has_prefetch, second, first):
    """Its 30 of weights, and its 11 of inputs where these wait in the CPU's memory. Nothing comes before the first."""
    measured = StepMemory(
        total=10**9,
        outside_blocks=0,
        blocks=(
            BlockMemory(10, 100, fetched=11, waiting_weights=30),
            BlockMemory(12, 60, passing=5, fetched=15, waiting_weights=40),
        ),
        has_prefetch=has_prefetch,
    )
    assert measured.backward_profile(plan)[1:3] == [(first, 0.5), (second, 0.0)]
    assert measured.peak_bytes(plan) == max(first, second) + SMALL_PIECES_BYTES


def test_twice_the_batch_needs_twice_the_activations_and_the_same_adapters():
    twice = FOUR.scaled(2)
    assert kept(twice, PLAN_PER_BLOCK) == 2 * kept(FOUR, PLAN_PER_BLOCK)
    assert twice.adapter_bytes == FOUR.adapter_bytes
    assert BlockMemory(1, 2, 3, 4, 5, waiting_weights=6).scaled(2) == BlockMemory(2, 4, 6, 8, 10, waiting_weights=6)


@pytest.mark.parametrize(
    ("free", "plan"),
    [(1000, PLAN_OFF), (400, PLAN_PER_BLOCK), (175, PLAN_PER_BLOCK_CPU), (60, PLAN_OFFLOADED), (10, PLAN_OFFLOADED)],
)
def test_the_fastest_plan_that_fits_is_chosen_and_else_the_smallest(free, plan):
    assert choose_checkpointing_plan(WEIGHTY, free * MIB) == plan


def test_weights_that_leave_make_room_for_activations_but_two_blocks_come_back():
    """The one that is computed, and the one that comes next."""
    assert WEIGHTY.peak_bytes(PLAN_OFFLOADED) == WEIGHTY.peak_bytes(PLAN_PER_BLOCK_CPU) + 2 * 50 * MIB
    assert WEIGHTY.fits(PLAN_OFFLOADED, 100 * MIB) and not WEIGHTY.fits(PLAN_PER_BLOCK_CPU, 100 * MIB)
    assert replace(WEIGHTY, weights=0).fits(PLAN_OFFLOADED, 60 * MIB) is False, (
        "nothing is gained where they are away already"
    )


@pytest.mark.parametrize("free", [0, 10, 60])
def test_a_plan_fits_once_what_is_missing_has_left_and_not_a_byte_before(free):
    missing = FOUR.missing_bytes(PLAN_PER_BLOCK_CPU, free * MIB)
    assert FOUR.fits(PLAN_PER_BLOCK_CPU, free * MIB + missing) and not FOUR.fits(
        PLAN_PER_BLOCK_CPU, free * MIB + missing - 1
    )
    assert RunForecast(PLAN_PER_BLOCK_CPU, FOUR.peak_bytes(PLAN_PER_BLOCK_CPU), free * MIB + missing).fits
    assert FOUR.missing_bytes(PLAN_PER_BLOCK_CPU, 10**12) == 0


def test_an_open_batch_is_the_largest_that_fits_and_never_more_than_eight():
    fits = lambda batch, free: FOUR.scaled(batch).peak_bytes(PLAN_OFF) <= 0.9 * free
    for free in (100 * MIB, 600 * MIB, 1500 * MIB, 2800 * MIB, 10**12):
        batch = largest_fitting_batch(FOUR, free, PLAN_OFF)
        assert batch == 1 or fits(batch, free)
        assert batch == 8 or not fits(batch + 1, free)
    assert (largest_fitting_batch(FOUR, 100 * MIB, PLAN_OFF), largest_fitting_batch(FOUR, 10**12, PLAN_OFF)) == (1, 8)


@pytest.mark.parametrize(("free", "part"), [(10000, 12), (3200, 6), (2300, 4), (700, 1), (1, 1)])
def test_a_batch_is_split_into_equal_parts_as_large_as_fit(free, part):
    assert largest_fitting_microbatch(FOUR.scaled(12), free * MIB, PLAN_OFF, 12) == part


def test_a_model_without_blocks_has_only_one_need():
    bare = StepMemory(total=10, outside_blocks=10, blocks=())
    assert {kept(bare, plan) for plan in CHECKPOINTING_PLANS} == {10}


def test_the_next_cheaper_plan_and_none_after_the_last():
    assert [next_cheaper_plan(plan) for plan in CHECKPOINTING_PLANS] == [
        PLAN_PER_BLOCK,
        PLAN_PER_BLOCK_CPU,
        PLAN_OFFLOADED,
        None,
    ]
    assert next_cheaper_plan("auto") is None


def test_the_room_for_a_larger_batch_is_what_the_forecast_says_fits():
    told = make_run_forecast(FOUR.scaled(2), PLAN_PER_BLOCK, 2000 * MIB, batch=2)
    grown = lambda batch: FOUR.scaled(batch).peak_bytes(PLAN_PER_BLOCK)
    assert grown(told.max_batch) <= 0.9 * 2000 * MIB < grown(told.max_batch + 1)


def test_what_a_real_step_took_beyond_the_count_is_part_of_the_forecast():
    assert make_run_forecast(FOUR, PLAN_OFF, MIB, extra=7).peak_bytes == FOUR.peak_bytes(PLAN_OFF) + 7


def test_the_line_says_memory_time_and_finish():
    line = RunForecast(PLAN_PER_BLOCK, 1300 * MIB, 8 * 1024 * MIB, seconds=0.42, max_batch=4).format_line(1000, now=0)
    assert line.startswith("per block, batch 1: 1.3 of 8 GiB free, 0.42 s a step, 7 min, until ")
    assert line.endswith("batch up to 4 fits")


def test_the_line_says_what_left_the_device():
    assert "2 GiB of weights wait in the CPU's memory" in RunForecast(
        PLAN_OFFLOADED, 100, 2**30, offloaded_bytes=2 * 2**30
    ).format_line(10)
    assert "weights" not in RunForecast(PLAN_PER_BLOCK, 100, 2**30).format_line(10)


def test_room_for_a_batch_that_is_used_already_is_no_news():
    assert "fits" not in RunForecast(PLAN_OFF, 100, 2**30, max_batch=4, batch=4).format_line(10)


def test_a_forecast_that_does_not_fit_says_what_to_do():
    assert "lower batch or resolution" in RunForecast(PLAN_PER_BLOCK_CPU, 100 * MIB, 50 * MIB).format_line(10)


# -- blocks ------------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Two products and a nonlinearity: what autograd keeps of it is known."""

    def __init__(self, width=256):
        super().__init__()
        self.one, self.two = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x, options, *, shift):
        options["calls"] = options.get("calls", 0) + 1
        return x + self.two(torch.sin(self.one(x) + shift)) * options["scale"]


class Net(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Layer() for _ in range(depth))

    def forward(self, x):
        shift, options = x.mean(1, keepdim=True).expand_as(x) * 1.0, {"scale": 0.5}
        for block in self.blocks:
            x = block(x, options, shift=shift)
        return x


class Strength:
    """Stands in for adapters, whose strength a recomputed block must see as it was."""

    now = 1.0

    def capture_context(self):
        now = self.now

        @contextlib.contextmanager
        def again():
            before, self.now = self.now, now
            try:
                yield
            finally:
                self.now = before

        return again


def gradients(plan):
    net, x = Net(), torch.randn(300, 256, generator=torch.Generator().manual_seed(1), requires_grad=True)
    with checkpoint_blocks({Layer}, Strength(), CheckpointPolicy(plan)):
        net(x).square().mean().backward()
    return [x.grad, *(p.grad for p in net.parameters())]


@pytest.mark.parametrize("plan", CHECKPOINTING_PLANS[1:])
def test_gradients_are_the_same_bit_for_bit_under_every_plan(plan):
    for got, wanted in zip(gradients(plan), gradients(PLAN_OFF), strict=True):
        assert torch.equal(got, wanted)


def test_the_blocks_class_is_as_before_after_an_error():
    before = Layer.forward
    with pytest.raises(KeyError), checkpoint_blocks({Layer}, Strength()):
        raise KeyError
    assert Layer.forward is before


def test_a_pass_that_is_counted_keeps_nothing_and_has_no_backward():
    net, x = Net().requires_grad_(False), torch.randn(300, 256, requires_grad=True)
    blocks = CheckpointPolicy(counter=ActivationCounter(net.parameters(), x.device))
    with checkpoint_blocks({Layer}, Strength(), blocks), blocks.counter:
        loss = net(x).square().mean()
    with pytest.raises(CountedPassError):
        loss.backward()


def test_the_count_equals_what_autograd_keeps():
    """Of a frozen layer, sin keeps its argument; the products keep only weights. The loss keeps the last output."""
    net, x = Net().requires_grad_(False), torch.randn(300, 256, requires_grad=True)
    one = 300 * 256 * 4
    blocks = CheckpointPolicy(counter=ActivationCounter(net.parameters(), x.device))
    with checkpoint_blocks({Layer}, Strength(), blocks), blocks.counter:
        net(x).square().mean()
    measured = blocks.counter.step_memory(adapter_bytes=0)
    assert [b.inside for b in measured.blocks] == [one] * 3
    assert [b.inputs for b in measured.blocks] == [2 * one, one, one], "the shift is given to all and counts once"
    assert measured.total == 4 * one


def test_a_block_is_measured_alone_with_its_gradients_in_flight():
    """Beside the input: sin keeps its argument; in backward there are the gradient of the output, that of sin, the
    cosine and their product at once, and two numbers. The output is free by then, and the gradient of the input is that
    of the output, not a copy."""
    net, x = Layer().requires_grad_(False), torch.randn(300, 256, requires_grad=True)
    peak = measure_block_peak(lambda inputs: net(inputs[0], {"scale": 1.0}, shift=0.5), [x])
    assert peak == 5 * 300 * 256 * 4 + 2 * 512
    assert x.grad is None
    untrained = measure_block_peak(lambda inputs: net(inputs[0], {"scale": 1.0}, shift=0.5), [x.detach()])
    assert untrained <= peak, "a block before all adapters has no backward pass"


@pytest.mark.parametrize("plan", [PLAN_OFF, PLAN_PER_BLOCK])
def test_the_forecast_is_what_a_step_takes_and_never_less(plan):
    """Under the other plans the copies would be counted too, since they wait on the same device here."""
    net, x = Net(depth=6).requires_grad_(False), torch.randn(300, 256, requires_grad=True)
    blocks = CheckpointPolicy(plan)
    with checkpoint_blocks({Layer}, Strength(), blocks):
        blocks.counter = ActivationCounter(net.parameters(), x.device)
        with blocks.counter:
            net(x * 1.0).square().mean()
        forecast, blocks.counter = blocks.counter.step_memory(adapter_bytes=0).peak_bytes(plan), None
        with LiveByteCounter(x.device) as counter:
            net(x * 1.0).square().mean().backward()
    assert counter.peak <= forecast <= 1.1 * counter.peak, f"{forecast} foretold, {counter.peak} taken"


def test_blocks_inputs_leave_the_device_while_they_wait():
    net, x = Net(), torch.randn(300, 256, requires_grad=True)
    alive = []
    for layer in net.blocks:
        layer.register_forward_hook(lambda layer, args, out: alive.append(weakref.ref(out.untyped_storage())))
    with checkpoint_blocks({Layer}, Strength(), CheckpointPolicy(PLAN_PER_BLOCK_CPU)):
        loss = net(x).sin().sum()
    assert [ref() is not None for ref in alive] == [False, False, True], "the last one is sin's, and no block's"
    loss.backward()


@pytest.mark.parametrize("first", [True, False])
def test_a_piece_that_is_kept_outside_and_given_to_a_block_counts_once(first):
    """It stays on the device in any case: whatever is done with the inputs of blocks saves nothing of it."""
    net, x = Layer().requires_grad_(False), torch.randn(300, 256, requires_grad=True)
    one, blocks = 300 * 256 * 4, CheckpointPolicy(counter=ActivationCounter(net.parameters(), x.device))
    with checkpoint_blocks({Layer}, Strength(), blocks), blocks.counter:
        early = x.sin().sum() if first else 0
        out = net(x, {"scale": 1.0}, shift=torch.zeros(()))
        (out.sum() + early + (0 if first else x.sin().sum())).square()
    measured = blocks.counter.step_memory(adapter_bytes=0)
    (block,) = measured.blocks
    assert (block.inputs, block.inside) == (512, one), "the shift takes the least that an allocator gives"
    assert block.outside_before == (one if first else 0)
    assert one <= measured.outside_blocks <= one + 2 * 512
    assert kept(measured, PLAN_PER_BLOCK_CPU) >= (2 * one if first else one)


def test_an_input_that_all_blocks_share_makes_one_trip(monkeypatch):
    trips = []
    original = CpuOffloadHooks.pack

    def pack(self, tensor):
        saved = original(self, tensor)
        trips.append(saved)
        return saved

    net, x = Net(), torch.randn(300, 256, requires_grad=True)
    monkeypatch.setattr(CpuOffloadHooks, "pack", pack)
    with checkpoint_blocks({Layer}, Strength(), CheckpointPolicy(PLAN_PER_BLOCK_CPU)):
        net(x)
    large = [t for t in trips if not torch.is_tensor(t)]
    assert len(large) == 6, "x and shift of three blocks"
    assert len({id(t) for t in large}) == 4, "three x and one shift"


def test_no_copy_outlives_the_tensor_it_was_made_of():
    before = len(CpuOffloadHooks.copies)
    gradients(PLAN_PER_BLOCK_CPU)
    gc.collect()
    assert len(CpuOffloadHooks.copies) == before


def test_strength_in_backward_is_that_of_the_forward():
    adapters, seen = Strength(), []

    class Asking(nn.Module):
        def forward(self, x):
            seen.append(adapters.now)
            return x.sin()

    with checkpoint_blocks({Asking}, adapters):
        adapters.now = -1.0
        y = Asking()(torch.ones(3, requires_grad=True))
        adapters.now = 1.0
        y.sum().backward()
    assert seen == [-1.0, -1.0]
