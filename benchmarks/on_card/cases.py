"""What gpu.py measures, in the order in which it is measured while there is time. Imports no torch: the process that
starts the cases must not take memory of the card."""

from __future__ import annotations

from dataclasses import dataclass

CARD, CHECK, OURS, CORE, LECO, SCORE = "card", "check", "ours", "core", "LECO", "score model"

WARM_STEPS = 2  # in which kernels are chosen, memory is taken and the optimizer makes its numbers


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row. It runs in a process of its own, which is ended after `limit_s`."""

    name: str
    kind: str  # who trains what; CARD measures the card alone, CHECK compares with the CPU
    about: str  # in words, for the report
    model: str = ""  # a key of published.PUBLISHED, or of tests/comfy/families.py when it is tiny
    batch: int = 1
    depth: int = 1  # core's checkpoint_depth
    is_tiny: bool = False
    is_quick: bool = False  # also measured by --quick
    is_default: bool = True  # measured unless others are asked for by name
    limit_s: int = 75

    @property
    def trains(self) -> bool:
        return self.kind not in (CARD, CHECK)


def compared(name: str, about: str, model: str, **more) -> list[Case]:
    """Ours, and ComfyUI's own Train LoRA on the same."""
    return [
        Case(name=name, kind=OURS, about=about, model=model, **more),
        Case(name=f"{name} core", kind=CORE, about=about, model=model, **more),
    ]


SDXL = "SDXL, 1024 px"
CASES = (
    Case(name="card", kind=CARD, about="the card itself", is_quick=True, limit_s=120),
    Case(name="check", kind=CHECK, about="loss and gradients against the CPU, toy models", model="sd15 sdxl sd3 flux",
         is_tiny=True, is_quick=True, limit_s=60),
    *compared("sdxl", SDXL, "sdxl", is_quick=True),
    *compared("sd15", "SD1.5, 512 px", "sd15", is_quick=True),
    Case(name="check blocks", kind=CHECK, about="loss and gradients against the CPU, one block of Flux of each kind at full width",
         model="flux block", limit_s=90),
    Case(name="leco", kind=LECO, about="LECO, SDXL, 1024 px", model="sdxl"),
    Case(name="score", kind=SCORE, about="score model (latent ResNet) on SDXL latents of 1024 px", model="sdxl", batch=32),
    *compared("sdxl b4", f"{SDXL}, batch 4", "sdxl", batch=4),
    *compared("flux", "Flux.1-dev, 1024 px", "flux", limit_s=100),
    *compared("qwen", "Qwen-Image, 1024 px", "qwen", limit_s=120),
    *compared("tiny", "toy SD1.5", "sd15", is_tiny=True, is_default=False),
    Case(name="tiny leco", kind=LECO, about="LECO, toy SD1.5", model="sd15", is_tiny=True, is_default=False),
    Case(name="tiny score", kind=SCORE, about="score model on toy latents", model="sd15", batch=8, is_tiny=True, is_default=False),
)  # fmt: skip
BY_NAME = {case.name: case for case in CASES}


def choose_cases(names, quick: bool) -> list[Case]:
    """Those of these names, else all of a run. The card comes first: what it is and can is asked once."""
    if names:
        return [BY_NAME["card"], *(BY_NAME[name] for name in dict.fromkeys(names) if name != "card")]
    return [case for case in CASES if case.is_default and (case.is_quick or not quick)]
