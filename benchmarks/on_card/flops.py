"""FLOPs that a step cannot do without, counted on meta tensors: the frozen model with our adapters on it, forward and
backward, nothing checkpointed."""

from __future__ import annotations

import torch
from trainyard.benchmarks import contenders
from trainyard.benchmarks.meters import flop_counter
from trainyard.nodes import host
from trainyard.trainers.adapters.adapters import Adapters


def count_useful_flops(shape, batch: int) -> tuple[int, int]:
    """(forward alone, forward and backward)."""
    plan = contenders.Plan(shape, batch, dtype=torch.bfloat16, device="meta")
    meta = contenders.Meta(plan, to_input=False)
    adapters = Adapters(meta.network, plan.adapter(contenders.DEFAULT_TARGETS)).to("meta")
    with (
        host.out_of_place.disable_inplace_updates(meta.network),
        host.context.set_training_flag(),
        host.context.use_differentiable_rope(),
        adapters.attached(),
        flop_counter() as counter,
    ):
        loss = meta.loss().mean()
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops()
