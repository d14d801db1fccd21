"""Weights that are fetched one block ahead, in any order that the blocks are called in. The order of the streams is
tested on the pretend card (tests/comfy/test_pretend_card.py)."""

import pytest
import torch
from torch import nn
from trainyard.trainers.memory.checkpointing import ActivationCounter, CheckpointPolicy, checkpoint_blocks
from trainyard.trainers.memory.plan import CHECKPOINTING_PLANS
from trainyard.trainers.memory.prefetch import FORWARD, RECOMPUTATION, Arrival, BlockPrefetcher


class InstantStream:
    """TransferStream without a device: what is fetched is there at once. Keeps what was fetched, by shape."""

    def __init__(self):
        self.arrivals, self.fetched = [], []

    def fetch(self, sources):
        arrival = Arrival(sources, [source.detach().clone() for source in sources], None)
        self.arrivals.append(arrival)
        self.fetched.append([tuple(source.shape) for source in sources])
        return arrival

    def receive(self, arrival):
        self.arrivals.remove(arrival)
        return arrival.copies

    def drop_arrivals(self):
        self.arrivals.clear()


class Block(nn.Module):
    """Takes its weight from the prefetcher, as the host's layers do, and says whether it was there."""

    def __init__(self, width, rng):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, generator=rng), requires_grad=False)
        self.prefetcher, self.found = None, []

    def forward(self, x):
        copy = None if self.prefetcher is None else self.prefetcher.take_weight(self.weight)
        self.found.append(copy is not None)
        return torch.tanh(x @ (self.weight if copy is None else copy))


class Adapters:
    """That change nothing."""

    def capture_context(self):
        import contextlib

        return contextlib.nullcontext


@pytest.fixture
def blocks():
    rng = torch.Generator().manual_seed(0)
    return [Block(8, rng) for _ in range(4)]


@pytest.fixture
def prefetcher(blocks):
    made = BlockPrefetcher(InstantStream(), lambda block: [block.weight])
    for block in blocks:
        block.prefetcher = made
    return made


def call_pass(prefetcher, blocks, phase=FORWARD):
    """Which of the blocks had their weight when they were called."""
    found = []
    for block in blocks:
        with prefetcher.calling_block(block, phase):
            found.append(prefetcher.take_weight(block.weight) is not None)
    return found


def test_the_second_pass_finds_all_weights_but_the_first_blocks(blocks, prefetcher):
    prefetcher.begin_pass()
    assert call_pass(prefetcher, blocks) == [False] * 4
    prefetcher.begin_pass()
    assert call_pass(prefetcher, blocks) == [False, True, True, True]
    assert prefetcher.stream.arrivals == []


def test_recomputation_has_an_order_of_its_own(blocks, prefetcher):
    for expected in ([False] * 4, [False, True, True, True]):
        prefetcher.begin_pass()
        assert call_pass(prefetcher, blocks) == expected
        assert call_pass(prefetcher, blocks[::-1], RECOMPUTATION) == expected


def test_what_was_fetched_for_another_block_is_dropped(blocks, prefetcher):
    first, second, third, _ = blocks
    call_pass(prefetcher, [first, second])
    prefetcher.begin_pass()
    assert call_pass(prefetcher, [first, third]) == [False, False]
    assert prefetcher.stream.arrivals == []


def test_a_weight_is_given_out_once(blocks, prefetcher):
    call_pass(prefetcher, blocks)
    prefetcher.begin_pass()
    call_pass(prefetcher, blocks[:1])
    with prefetcher.calling_block(blocks[1], FORWARD):
        assert prefetcher.take_weight(blocks[1].weight) is not None
        assert prefetcher.take_weight(blocks[1].weight) is None


def test_a_block_within_a_block_fetches_nothing_of_its_own(blocks, prefetcher):
    outer, inner, following, _ = blocks
    for _ in range(2):
        prefetcher.begin_pass()
        with prefetcher.calling_block(outer, FORWARD), prefetcher.calling_block(inner, FORWARD):
            pass
        call_pass(prefetcher, [following])
    assert len(prefetcher.stream.fetched) == 1


def test_an_error_within_a_block_leaves_nothing_behind(blocks, prefetcher):
    call_pass(prefetcher, blocks)
    prefetcher.begin_pass()
    with pytest.raises(KeyboardInterrupt), prefetcher.calling_block(blocks[0], FORWARD):
        raise KeyboardInterrupt
    prefetcher.begin_pass()
    assert prefetcher.stream.arrivals == []
    assert call_pass(prefetcher, blocks) == [False, True, True, True]


def test_a_block_that_is_measured_holds_its_own_weights_and_no_others(blocks, prefetcher):
    """Also where the next block is known."""
    call_pass(prefetcher, blocks)
    prefetcher.begin_pass()
    prefetcher.stream.fetched.clear()
    first = blocks[0]
    with prefetcher.holding_weights(first):
        assert torch.equal(prefetcher.take_weight(first.weight), first.weight)
        assert prefetcher.take_weight(blocks[1].weight) is None
    assert prefetcher.stream.fetched == [[(8, 8)]]
    with pytest.raises(KeyboardInterrupt), prefetcher.holding_weights(first):
        raise KeyboardInterrupt
    assert (prefetcher.weights, prefetcher.stream.arrivals) == ({}, [])
    assert call_pass(prefetcher, blocks) == [False, True, True, True], "the order is still known"


def count_blocks(blocks, prefetcher):
    """What a counted pass says of the blocks."""
    x = torch.ones(3, 8, requires_grad=True)
    counter = ActivationCounter([block.weight for block in blocks], x.device)
    with checkpoint_blocks([Block], Adapters(), CheckpointPolicy(counter=counter, prefetcher=prefetcher)), counter:
        out = x
        for block in blocks:
            out = block(out)
    return counter.step_memory(adapter_bytes=0)


def test_a_counted_pass_says_what_is_fetched_for_each_block(blocks, prefetcher):
    """A weight of 256 bytes, for which an allocator gives 512."""
    ahead = count_blocks(blocks, prefetcher)
    for block in blocks:
        block.prefetcher = None
    alone = count_blocks(blocks, None)
    assert (ahead.has_prefetch, alone.has_prefetch) == (True, False)
    assert [block.waiting_weights for block in ahead.blocks] == [512] * 4
    assert [block.waiting_weights for block in alone.blocks] == [0] * 4
    more = [there.passing - away.passing for there, away in zip(ahead.blocks, alone.blocks, strict=True)]
    assert more == [512] * 4, "beside the block's own values lies its fetched weight"


def run_steps(blocks, x, plan, prefetcher, steps=3):
    """The input's gradient in the last of some steps."""
    grad = None
    with checkpoint_blocks([Block], Adapters(), CheckpointPolicy(plan, prefetcher=prefetcher)):
        for _ in range(steps):
            if prefetcher is not None:
                prefetcher.begin_pass()
            leaf = x.clone().requires_grad_()
            out = leaf
            for block in blocks:
                out = block(out)
            out.square().sum().backward()
            grad = leaf.grad
    return grad


@pytest.mark.parametrize("plan", CHECKPOINTING_PLANS)
def test_gradients_are_the_same_with_fetched_weights_and_inputs(blocks, prefetcher, plan, monkeypatch):
    monkeypatch.setattr("trainyard.trainers.memory.checkpointing.MIN_OFFLOAD_BYTES", 0)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    ahead = run_steps(blocks, x, plan, prefetcher)
    assert ahead is not None
    assert any(blocks[-1].found)
    for block in blocks:
        block.prefetcher = None
    alone = run_steps(blocks, x, plan, None)
    assert alone is not None
    assert torch.equal(ahead, alone)


def test_saved_inputs_are_fetched_while_the_block_after_them_is_computed_again(blocks, prefetcher, monkeypatch):
    """Those of 3 blocks: nothing comes before the last one's."""
    monkeypatch.setattr("trainyard.trainers.memory.checkpointing.MIN_OFFLOAD_BYTES", 0)
    run_steps(blocks, torch.ones(3, 8), "per block + CPU", prefetcher, steps=1)
    assert [shapes for shapes in prefetcher.stream.fetched if (3, 8) in shapes] == [[(3, 8)]] * 3
    assert prefetcher.stream.arrivals == []
