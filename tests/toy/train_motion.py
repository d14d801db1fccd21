"""Trains the toy world's video model (motion.py) and writes weights/motion.safetensors: half an hour of one core.

    OMP_NUM_THREADS=1 .venv/bin/python tests/toy/train_motion.py          # from the pack's root

Two frames of a shape that stands still; rectified flow, noise levels by a logit-normal of mean 0.3 and width 1.2.
"""

import pathlib
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
DRAWINGS, BATCH, STEPS, RATE = 800, 32, 2000, 2e-3


def drawn_latents(toy, model, vae, rng):
    """((DRAWINGS, 16, 2, 8, 8) as the network sees them, [(shape, colour)])"""
    from trainyard.tests.toy import motion

    about = motion.questions(rng, DRAWINGS)
    clips = [vae.encode(torch.stack([motion.pixels(f) for f in motion.draw_clip(rng, *one)]))[0] for one in about]
    return model.model.process_latent_in(torch.cat(clips)), about


def main():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import pack

    pack.boot()
    from safetensors.torch import save_file
    from trainyard.nodes import host
    from trainyard.tests.toy import motion, sampling, world

    toy, model, rng = sampling.load(world.cached()), motion.untrained(), torch.Generator().manual_seed(5)
    network, texts = model.model.diffusion_model, motion.WordTexts()
    with torch.no_grad():
        latents, about = drawn_latents(toy, model, motion.FrameVae(toy.vae), rng)
        print("std", float(latents.std()), flush=True)
    context = torch.cat([texts.cond(motion.still(*one))["cross_attn"] for one in about])
    with host.context.enable_gradients(), host.context.set_training_flag(), host.context.use_differentiable_rope():
        parameters = [p.requires_grad_() for p in network.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
        for step in range(STEPS):
            pick = torch.randint(DRAWINGS, (BATCH,), generator=rng)
            x0 = latents[pick]
            noise = torch.randn(x0.shape, generator=rng)
            sigma = torch.sigmoid(1.2 * torch.randn(BATCH, generator=rng) + 0.3)
            x = torch.lerp(x0, noise, sigma[:, None, None, None, None])
            guess = network(x, sigma * 1000, context[pick], transformer_options={})
            loss = (guess - (noise - x0)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            if step % 50 == 0:
                print(step, round(loss.item(), 4), flush=True)
            if step % 250 == 249 or step == STEPS - 1:
                state = {name: value.detach() for name, value in network.state_dict().items()}
                save_file({name: value.contiguous() for name, value in world.pack(state).items()}, str(motion.WEIGHTS))


if __name__ == "__main__":
    main()
