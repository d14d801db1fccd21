"""ComfyUI with the pretend card: its memory manager takes the device for a graphics card of a given size, and a driver
that is not there counts the memory that is page-locked.

Call `plug_in` after boot(), which starts ComfyUI on the CPU, and before any model is made."""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import dataclass, field

import comfy.model_management as mm
import torch
from trainyard.trainers.memory import transfer

from .device import CARD_TYPE, PretendCard

CARD_NAME = f"{CARD_TYPE}:0"
SUCCESS, ALREADY_REGISTERED, NOT_REGISTERED = 0, 712, 713  # of the CUDA runtime
MAX_PAGE_LOCKED_BYTES = 2**40


@dataclass
class PageLockDriver:
    """cudaHostRegister and its counterpart. `freed` counts memory that was given back while it was registered: the
    driver goes on reading pages that are somebody else's by then."""

    registered: dict[int, int] = field(default_factory=dict)  # address -> bytes
    freed: int = 0
    total: int = 0  # registrations so far

    def cudaHostRegister(self, address, size, flags):
        if address in self.registered:
            return ALREADY_REGISTERED
        self.registered[address] = size
        self.total += 1
        return SUCCESS

    def cudaHostUnregister(self, address):
        return NOT_REGISTERED if self.registered.pop(address, None) is None else SUCCESS

    def watch(self, tensor):
        weakref.finalize(tensor.untyped_storage(), self.notice_freed, tensor.data_ptr())

    def notice_freed(self, address):
        if self.registered.pop(address, None) is not None:
            self.freed += 1

    @property
    def bytes(self) -> int:
        return sum(self.registered.values())


@contextlib.contextmanager
def plug_in(card: PretendCard, bf16: bool = True, fp64: bool = True, vram: str = "NORMAL_VRAM", index: int = 0):
    """The host believes in the card, while it is open. Yields the PageLockDriver. `bf16`: whether the card computes in
    it; Turing and older do not. `fp64`: whether it knows float64; Apple's and Intel's do not. `vram`: of mm.VRAMState, as
    --lowvram, --novram and --gpu-only set it. `index`: the host's card among several."""
    card_name = f"{CARD_TYPE}:{index}"
    driver, before = PageLockDriver(), {}
    card.registered = driver.registered
    free, total, pin = mm.get_free_memory, mm.get_total_memory, mm.pin_memory

    def pin_memory(tensor):
        done = pin(tensor)
        if done:
            driver.watch(tensor)
        return done

    def both(value, twice):
        return (value, value) if twice else value

    def get_free_memory(dev=None, torch_free_too=False):
        return both(card.free, torch_free_too) if is_card(dev) else free(dev, torch_free_too)

    def get_total_memory(dev=None, torch_total_too=False):
        return both(card.total, torch_total_too) if is_card(dev) else total(dev, torch_total_too)

    believed = dict(
        get_torch_device=lambda: torch.device(card_name),
        unet_offload_device=lambda: torch.device(card_name if vram == "HIGH_VRAM" else "cpu"),
        get_free_memory=get_free_memory,
        get_total_memory=get_total_memory,
        should_use_bf16=lambda device=None, *_, **__: bf16 and is_card(device),
        should_use_fp16=lambda device=None, *_, **__: is_card(device),
        pin_memory=pin_memory,
        pytorch_attention_flash_attention=lambda: True,  # on it the host's estimates of memory depend
        MIN_WEIGHT_MEMORY_RATIO=0.0,  # as for NVIDIA, like the next
        NUM_STREAMS=2,
        supports_fp64=lambda device=None: fp64,
        vram_state=mm.VRAMState[vram],
        MAX_PINNED_MEMORY=MAX_PAGE_LOCKED_BYTES,
    )
    with contextlib.ExitStack() as stack:
        for name, value in believed.items():
            before[name] = getattr(mm, name)
            setattr(mm, name, value)
        cudart, torch.cuda.cudart = torch.cuda.cudart, lambda: driver
        stack.enter_context(card)
        transfer.ASYNC_DEVICE_TYPES.add(CARD_TYPE)
        try:
            yield driver
        finally:
            transfer.ASYNC_DEVICE_TYPES.discard(CARD_TYPE)
            torch.cuda.cudart = cudart
            for name, value in before.items():
                setattr(mm, name, value)


def is_card(device) -> bool:
    return device is None or torch.device(device).type == CARD_TYPE
