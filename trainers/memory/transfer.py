"""Copies from the CPU to the device that nothing waits for."""

from __future__ import annotations

import torch
from torch import Tensor

# CUDA and ROCm. On MPS and Intel's XPU ComfyUI waits for its copies, too: one does not support them, the other is
# slower with them.
ASYNC_DEVICE_TYPES = {"cuda"}


def supports_async_copies(device: torch.device) -> bool:
    """Whether a copy can go on while the device and the CPU do other work."""
    return device.type in ASYNC_DEVICE_TYPES


def copy_to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on the device, in `dtype` where one is given.

    From the CPU it goes through page-locked memory: a copy from other memory waits until the device has done all that
    was asked of it before. torch keeps the page-locked memory until the copy is done. A tensor with a gradient is
    copied as autograd can follow it. The dtype is changed on the CPU: float64 exists on no MPS device."""
    dtype = dtype or tensor.dtype
    if tensor.device.type != "cpu" or device.type == "cpu":
        return tensor.to(device, dtype)
    tensor = tensor.to(dtype)
    if tensor.requires_grad or not supports_async_copies(device):
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def copy_like(tensor: Tensor, like: Tensor) -> Tensor:
    """`copy_to_device` to the device and dtype of `like`."""
    return copy_to_device(tensor, like.device, like.dtype)
