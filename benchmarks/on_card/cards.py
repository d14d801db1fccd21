"""The two cards that a case can run on: a real one, through torch.cuda, and the pretend card of tests/card/.

Everything here that only a real card can run is in CudaCard; it is tested against a stand-in for torch.cuda that takes
the arguments of the real functions and no others.
"""

from __future__ import annotations

import contextlib
import subprocess
import time

import torch

GIB = 2**30
MATMUL_SIDE = 8192  # numbers: 1.1 TFLOP in one product, far more than starting it costs
COPY_BYTES = 256 * 2**20
REPEATS = 20


class CudaCard:
    """The card that ComfyUI takes."""

    is_real = True

    def __init__(self):
        import comfy.model_management as mm

        self.device = mm.get_torch_device()

    def plugged_in(self):
        return contextlib.nullcontext()

    def describe(self) -> dict:
        about = torch.cuda.get_device_properties(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        return {
            "name": about.name,
            "capability": ".".join(map(str, torch.cuda.get_device_capability(self.device))),
            "memory": total,
            "free_memory": free,
            "multiprocessors": about.multi_processor_count,
            "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
            "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
            "cudnn": torch.backends.cudnn.version(),
            **query_driver(str(getattr(about, "uuid", ""))),
        }

    def synchronize(self):
        torch.cuda.synchronize(self.device)

    def allocated_bytes(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def reset_peak(self):
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> tuple[int, int]:
        """(allocated, reserved) at most since the last reset: what tensors took, and what the allocator took for them."""
        return torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)

    def measure_matmul_rate(self, dtype, side: int = MATMUL_SIDE) -> float:
        """FLOP/s of large square products, the best of some: what a step could reach if it were nothing else."""
        a, b = (torch.randn(side, side, device=self.device, dtype=dtype) for _ in range(2))
        return 2 * side**3 / self.best_seconds(lambda: a @ b)

    def measure_copy_rate(self, count: int = COPY_BYTES) -> float:
        """Bytes/s from page-locked memory to the card, the best of some."""
        source = torch.empty(count, dtype=torch.uint8, pin_memory=True)
        target = torch.empty(count, dtype=torch.uint8, device=self.device)
        return count / self.best_seconds(lambda: target.copy_(source, non_blocking=True))

    def best_seconds(self, work) -> float:
        seconds = []
        for _ in range(REPEATS):
            self.synchronize()
            start = time.perf_counter()
            work()
            self.synchronize()
            seconds.append(time.perf_counter() - start)
        return min(seconds)


class PretendedCard:
    """tests/card/device.py: bytes and placement are real, numbers and seconds are not."""

    is_real = False

    def __init__(self, gib: float):
        from trainyard.tests.card import device

        device.register_card()
        self.card = device.PretendCard(gib * GIB)

    def plugged_in(self):
        from trainyard.tests.card.host import plug_in

        return plug_in(self.card)

    def describe(self) -> dict:
        return {
            "name": f"pretend card of {self.card.total / GIB:g} GiB",
            "memory": self.card.total,
            "free_memory": self.card.free,
            "bf16": True,
        }

    @property
    def device(self):
        from trainyard.tests.card.host import CARD_NAME

        return torch.device(CARD_NAME)

    def synchronize(self): ...

    def allocated_bytes(self) -> int:
        return self.card.live

    def reset_peak(self):
        self.card.begin_part()

    def peak_bytes(self) -> tuple[int, None]:
        return self.card.current.peak, None


QUERIED = {
    "driver": "driver_version",
    "power_limit": "power.limit",
    "pcie_generation": "pcie.link.gen.max",
    "pcie_lanes": "pcie.link.width.max",
}


def query_driver(uuid: str = "") -> dict:
    """What nvidia-smi says of the card, or of the first one; nothing where there is no nvidia-smi."""
    chosen = [f"--id=GPU-{uuid}"] if uuid else []
    command = ["nvidia-smi", *chosen, f"--query-gpu={','.join(QUERIED.values())}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    lines = done.stdout.strip().splitlines()
    values = [value.strip() for value in lines[0].split(",")] if lines else []
    return dict(zip(QUERIED, values, strict=True)) if done.returncode == 0 and len(values) == len(QUERIED) else {}
