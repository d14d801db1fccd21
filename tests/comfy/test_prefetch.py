"""Which weights are fetched ahead, and who gets them."""

import comfy.model_management as mm
import comfy.ops
import pytest
import torch
from trainyard.nodes.host.prefetch import list_waiting_weights, prefetch_offloaded, take_before_casting
from trainyard.tests.comfy import families
from trainyard.trainers.memory import transfer

ELSEWHERE = torch.device("meta")  # a device that the weights are not on


class ForeignLinear(comfy.ops.manual_cast.Linear):
    """A layer of another node, which fetches its weight by itself."""

    def forward_comfy_cast_weights(self, x):
        return x @ self.weight.to(x.device).T


class FetchedWeights:
    """A prefetcher that holds these copies."""

    def __init__(self, copies):
        self.copies = copies
        self.stream = self
        self.device = ELSEWHERE

    def take_weight(self, weight):
        return self.copies.pop(id(weight), None)


def test_the_layers_of_a_block_wait_where_they_are_not_on_the_device():
    block = families.make("flux").model.diffusion_model.double_blocks[0]
    waiting = list_waiting_weights(block, ELSEWHERE)
    assert {id(p) for p in waiting} == {id(p) for p in block.parameters()}
    assert list_waiting_weights(block, torch.device("cpu")) == []


def test_layers_of_other_nodes_are_left_to_themselves():
    assert list_waiting_weights(ForeignLinear(2, 2), ELSEWHERE) == []
    assert len(list_waiting_weights(comfy.ops.manual_cast.Linear(2, 2), ELSEWHERE)) == 2


def test_a_fetched_weight_takes_the_place_of_the_hosts_copy_once():
    weight, copy = torch.ones(2), torch.full((2,), 7.0)
    cast_to = take_before_casting(FetchedWeights({id(weight): copy}), mm.cast_to)
    assert cast_to(weight, None, ELSEWHERE) is copy
    assert cast_to(weight, None, ELSEWHERE).device == ELSEWHERE, "the host's own"


@pytest.mark.parametrize(
    ("device", "more"), [("cpu", {}), ("meta", {"r": torch.empty(2, device="meta")})], ids=["is there", "has a place"]
)
def test_other_casts_are_the_hosts(device, more):
    weight, copies = torch.ones(2), {}
    copies[id(weight)] = torch.zeros(2)
    cast_to = take_before_casting(FetchedWeights(copies), mm.cast_to)
    assert cast_to(weight, torch.float16, torch.device(device), **more) is not copies[id(weight)]


@pytest.mark.parametrize("streams", [0, 2])
def test_nothing_is_fetched_ahead_where_the_host_has_no_streams_or_the_device_no_copies_beside(monkeypatch, streams):
    """--disable-async-offload; and the CPU."""
    monkeypatch.setattr(mm, "NUM_STREAMS", streams)
    before = mm.cast_to
    monkeypatch.setattr(transfer, "ASYNC_DEVICE_TYPES", {"cuda"} if streams else {"cpu"})
    with prefetch_offloaded(torch.nn.Identity(), torch.device("cpu")) as prefetcher:
        assert prefetcher is None
        assert mm.cast_to is before
