"""Copies to the device: page-locked ones are counted on the pretend card (tests/comfy/test_pretend_card.py)."""

import torch
from trainyard.trainers.memory.transfer import copy_like, copy_to_device, supports_async_copies

CPU, META = torch.device("cpu"), torch.device("meta")  # meta: any device that copies cannot go on beside


def test_a_tensor_that_is_there_already_is_not_copied():
    x = torch.arange(3.0)
    assert copy_to_device(x, CPU) is x


def test_a_copy_has_the_device_and_dtype_of_another_tensor():
    like = torch.empty(1, dtype=torch.bfloat16, device=META)
    assert copy_like(torch.arange(3.0), like).dtype is torch.bfloat16
    assert copy_like(torch.arange(3.0), like).device == META


def test_float64_becomes_float32_before_it_leaves_the_cpu(monkeypatch):
    """MPS has no float64."""
    sent, to = [], torch.Tensor.to

    def recorded(tensor, *args, **kwargs):
        if META in args:
            sent.append(tensor.dtype)
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", recorded)
    assert copy_to_device(torch.ones(2, dtype=torch.float64), META, torch.float32).dtype is torch.float32
    assert sent == [torch.float32]


def test_a_gradient_comes_back_through_a_copy():
    x = torch.ones(2, requires_grad=True)
    copy_to_device(x, CPU, torch.float64).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1.0, 1.0]


def test_copies_go_on_beside_other_work_where_comfyui_lets_them():
    kinds = {kind: supports_async_copies(torch.device(kind)) for kind in ("cuda", "mps", "xpu", "cpu")}
    assert kinds == {"cuda": True, "mps": False, "xpu": False, "cpu": False}
