"""Trains the toy world's edit model (edits.py) and writes weights/edits.safetensors: half an hour of one core.

    OMP_NUM_THREADS=1 .venv/bin/python tests/toy/train_edits.py          # from the pack's root

Every drawing of 400 is known in six colours; a step shows one and asks for another or the same: rectified flow, with
noise levels by a logit-normal of mean -0.3 and width 1.2.
"""

import pathlib
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
DRAWINGS, BATCH, STEPS, RATE = 400, 48, 2500, 1.5e-3


def drawn_latents(toy, model, rng):
    """(DRAWINGS, 6 colours, 16, 8, 8) as the network sees them."""
    from trainyard.tests.toy import edits, shapes

    found = []
    for _ in range(DRAWINGS):
        shape, ground = (names[shapes.below(rng, len(names))] for names in (shapes.SEEN, edits.GROUNDS))
        state = rng.get_state()
        images = []
        for colour in edits.COLOURS:
            rng.set_state(state)
            images.append(edits.pixels(edits.draw_pair(rng, shape, colour, ground, ground)[0]))
        found.append(model.model.process_latent_in(toy.vae.encode(torch.stack(images)).float().cpu()))
    return torch.stack(found)


def main():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import pack

    pack.boot()
    from safetensors.torch import save_file
    from trainyard.nodes import host
    from trainyard.tests.toy import edits, sampling, world

    toy, model, rng = sampling.load(world.cached()), edits.untrained(), torch.Generator().manual_seed(5)
    network, texts = model.model.diffusion_model, edits.SeededTexts()
    with torch.no_grad():
        latents = drawn_latents(toy, model, rng)
    told = [texts.cond(text) for text in (*(f"make it {colour}" for colour in edits.COLOURS), "keep it")]
    context, pooled = (torch.cat([cond[name] for cond in told]) for name in ("cross_attn", "pooled_output"))
    with (
        host.context.enable_gradients(),
        host.context.set_training_flag(),
        host.context.use_differentiable_rope(),
        host.out_of_place.disable_inplace_updates(network),
    ):
        parameters = [p.requires_grad_() for p in network.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
        for step in range(STEPS):
            pick, colour = (torch.randint(most, (BATCH,), generator=rng) for most in (DRAWINGS, len(edits.COLOURS)))
            text = torch.randint(len(told), (BATCH,), generator=rng)
            wanted = torch.where(text == len(edits.COLOURS), colour, text)
            shown, x0 = latents[pick, colour], latents[pick, wanted]
            noise = torch.randn(x0.shape, generator=rng)
            sigma = torch.sigmoid(1.2 * torch.randn(BATCH, generator=rng) - 0.3)
            x = torch.lerp(x0, noise, sigma[:, None, None, None])
            guess = network(x, sigma, context[text], pooled[text], None, ref_latents=[shown], transformer_options={})
            loss = (guess - (noise - x0)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            if step % 100 == 0:
                print(step, round(loss.item(), 4), flush=True)
    state = {name: value.detach() for name, value in network.state_dict().items()}
    save_file({name: value.contiguous() for name, value in world.pack(state).items()}, str(edits.WEIGHTS))


if __name__ == "__main__":
    main()
