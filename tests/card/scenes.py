"""Runs to rehearse on the pretend card, at toy size: name -> what rehearsal.py takes."""

from trainyard.trainers.memory.plan import CHECKPOINTING_PLANS, PLAN_AUTO, PLAN_OFF, PLAN_OFFLOADED, PLAN_PER_BLOCK

PARTIAL = 1.0  # room for the weights alone, and adapters come on top: some of them stay in the CPU's memory
HALF_AWAY = "flux, kept away by a first estimate"
ALL = {
    **{f"flux, {plan}": dict(family="flux", plan=plan) for plan in CHECKPOINTING_PLANS},
    "sd15, partly loaded": dict(family="sd15", plan=PLAN_PER_BLOCK, room=PARTIAL),
    "sdxl, captions of several lengths": dict(family="sdxl", plan=PLAN_OFF, batch=2, captions="of several lengths"),
    "wan": dict(family="wan", plan=PLAN_AUTO),
    "wan, partly loaded": dict(family="wan", plan=PLAN_PER_BLOCK, room=PARTIAL, monitored=False),
    "auraflow": dict(family="auraflow", plan=PLAN_OFF, monitored=False),
    "sd3, fp16 without bf16": dict(family="sd3", plan=PLAN_OFF, dtype="float16", bf16=False),
    "sd3, fp8": dict(family="sd3", plan=PLAN_OFFLOADED, dtype="float8_e4m3fn"),
    "flux, LECO": dict(family="flux", plan=PLAN_OFF, method="leco", monitored=False),
    "sd15, score model": dict(family="sd15", plan=PLAN_AUTO, method="score", monitored=False),
    "sd15, LECO-Score": dict(family="sd15", plan=PLAN_PER_BLOCK, method="leco-score", monitored=False),
    "flux, image slider": dict(family="flux", plan=PLAN_PER_BLOCK, method="image slider", monitored=False),
    "flux, accumulated": dict(family="flux", plan=PLAN_PER_BLOCK, accumulate=2, monitored=False),
    "sd15, partly loaded with a LoRA on it": dict(
        family="sd15", plan=PLAN_PER_BLOCK, room=PARTIAL, patched=True, monitored=False
    ),
    "flux, without float64": dict(family="flux", plan=PLAN_OFF, fp64=False, monitored=False),
    "hunyuan video 1.5": dict(family="hunyuan_video_15", plan=PLAN_OFFLOADED, monitored=False),
    HALF_AWAY: dict(family="flux", plan=PLAN_AUTO, room=0.5, estimate=8),
    "flux, --gpu-only": dict(family="flux", plan=PLAN_OFFLOADED, vram="HIGH_VRAM", monitored=False, reference=True),
    "flux, the second of two cards": dict(family="flux", plan=PLAN_OFFLOADED, index=1),
}
QUICK = {
    name: ALL[name]
    for name in (
        f"flux, {PLAN_OFFLOADED}",
        "sd15, partly loaded",
        "wan",
        "wan, partly loaded",
        "sd3, fp16 without bf16",
        "flux, LECO",
        "sd15, score model",
        "flux, --gpu-only",
        "hunyuan video 1.5",
        HALF_AWAY,
    )
}
chosen = QUICK  # what tests/comfy/test_pretend_card.py takes; `make proofs` takes all
