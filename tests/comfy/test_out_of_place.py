"""In-place updates of a model's code, spelled out."""

import sys

import pytest
import torch
from trainyard.nodes.host.out_of_place import compile_out_of_place, disable_inplace_updates


def scaled(x, scale):
    return x.addcmul_(x, scale).add_(1.0)


def changes_its_argument(x):
    x.mul_(2.0)


class Block(torch.nn.Module):
    """Every kind of update that models of the host make, of a tensor that is looked at before and after."""

    @torch.no_grad()
    def expert(self, x):
        x = torch.sin(x)
        x.mul_(x)
        return x

    def forward(self, x, y):
        y = y + self.expert(x)
        x = torch.addcmul(x, x, y)
        h = torch.tanh(x)
        x += h
        h.mul_(y).sub_(0.5)
        for start in (0, 2):
            x[start : start + 2].addcmul_(h[start : start + 2], torch.sin(x[start : start + 2].clone()))
        x[1:3] = x[1:3] + torch.sin(x[1:3].clone()) * h[1:3]
        shown = torch.sin(x)
        x[:2] *= h[:2].exp()
        counts = {"seen": 1}
        counts["seen"] += 1
        total = counts["seen"] * shown + scaled(torch.exp(x * 0.1), y).mul_(x)
        z = y * 1.0
        seen = torch.sin(z)
        both = z.mul_(seen) + z
        return total + both + seen + x


def arguments():
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, generator=rng, dtype=torch.float64, requires_grad=True) for _ in range(2)]


def test_what_a_forward_gives_stays_the_same_bits():
    block, given = Block(), [tensor.detach() for tensor in arguments()]
    wanted = block(*given)
    with disable_inplace_updates(block) as names:
        assert f"{__name__}.scaled" in names and not any("changes_its_argument" in name for name in names)
        assert torch.equal(block(*given), wanted)


def test_gradients_are_right_where_they_could_not_be_had():
    block, given = Block(), arguments()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        block(*given).sum().backward()
    with disable_inplace_updates(block):
        assert torch.autograd.gradcheck(block, given)


def test_all_is_put_back():
    block, before = Block(), (Block.forward, scaled)
    with pytest.raises(KeyError), disable_inplace_updates(block):
        assert Block.forward is not before[0] and sys.modules[__name__].scaled is not before[1]
        raise KeyError
    assert (Block.forward, sys.modules[__name__].scaled) == before


def test_what_others_may_look_at_stays():
    """Tensors of the module or of an object, what a view shows, and names of a comprehension's own."""
    assert compile_out_of_place(lambda x: x.mul_(2)) is None

    def of_the_module(x):
        SHARED.add_(x)
        x.view(-1).add_(1.0)
        SHARED.grad.add_(x)
        return [part.mul_(2) for part in x]

    assert compile_out_of_place(of_the_module) is None


SHARED = torch.zeros(1)
