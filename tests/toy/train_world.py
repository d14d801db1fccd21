"""Trains the toy world's VAE and transformer with ComfyUI's own modules, and writes tests/toy/weights/. An hour and a
half on two busy cores.

    python -m tests.toy.train_world vae      # TAESD-shaped, 16 channels
    python -m tests.toy.train_world polish   # its decoder alone, on latents that stay as they are; may run beside or
    after the next python -m tests.toy.train_world dit      # SD3-shaped, depth 3; needs the VAE's file python -m
    tests.toy.train_world pack     # both as 8-bit files in weights/ python -m tests.toy.train_world check    # samples
    with ComfyUI's own sampler and counts what came out right

Run from the root of the repository. ComfyUI is found through COMFYUI_PATH (default ~/comfy/ComfyUI). Every draw comes
from a seed; bits differ between machines, figures hardly.
"""

import math
import os
import pathlib
import sys
import time

import torch
from safetensors.torch import load_file, save_file

from . import shapes, world

sys.path.insert(0, os.environ.get("COMFYUI_PATH", os.path.expanduser("~/comfy/ComfyUI")))
NOUNS = (*shapes.SEEN, "shape")  # "a red shape" leaves the shape open
WORK = pathlib.Path(os.environ.get("TOY_WORK", "/tmp/toy_world"))  # float32 weights between the two parts


def pixels(images):
    """PIL images -> (N, 3, H, W) uint8."""
    flat = (torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).view(p.height, p.width, 3) for p in images)
    return torch.stack([p.permute(2, 0, 1) for p in flat])


def jumble(rng):
    """An image of two to four shapes of any colour and angle on any ground: the VAE must serve more than the captions
    can say."""

    def any_colour():
        return tuple(torch.randint(256, (3,), generator=rng).tolist())

    image = shapes.Image.new("RGB", (shapes.FINE * shapes.PX,) * 2, any_colour())
    for _ in range(2 + shapes.below(rng, 3)):
        radius, x, y, turn = (
            torch.rand(4, generator=rng) * torch.tensor([14, 48, 48, 360]) + torch.tensor([4, 8, 8, 0])
        ).tolist()
        shapes.paint(image, shapes.SHAPES[shapes.below(rng, len(shapes.SHAPES))], any_colour(), radius, (x, y), turn)
    return image.resize((shapes.PX,) * 2, shapes.Image.Resampling.BOX)


def vae_images(n, seed, every_nth=3):
    """(n, 3, 64, 64) uint8: images of the world, unseen shapes included, and every third (or nth) a jumble."""
    rng = torch.Generator().manual_seed(seed)
    turns = [shapes.SHAPES[shapes.below(rng, len(shapes.SHAPES))] for _ in range(n)]
    return pixels(
        [jumble(rng) if i % every_nth == every_nth - 1 else shapes.sample(rng, shape=s)[0] for i, s in enumerate(turns)]
    )


def he_init(module, rng):
    """Seeded weights for every layer, because the host's layers start as uninitialised memory; residual branches start
    small."""
    for name, p in module.named_parameters():
        if p.ndim == 4:
            p.data.copy_(torch.randn(p.shape, generator=rng) * math.sqrt(2 / p[0].numel()))
            if name.endswith("conv.4.weight"):
                p.data.mul_(0.2)
        else:
            p.data.zero_()


def pace(step, steps, warmup=100, decay=0.4):
    """Learning-rate factor: up from 0 during the warmup, level, then down to 0 in the last part of the steps."""
    return min(1, (step + 1) / warmup, (steps - step) / (decay * steps))


def step_rng(seed, step):
    """A generator for one step, so that a training that was stopped goes on as the same training."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def keep(name, **state):
    """Write a training's state to WORK, all or nothing."""
    WORK.mkdir(parents=True, exist_ok=True)
    torch.save(state, WORK / f"{name}.part")
    os.replace(WORK / f"{name}.part", WORK / f"{name}.pt")


def kept(name):
    """The state that `keep` wrote, or None."""
    return torch.load(WORK / f"{name}.pt") if (WORK / f"{name}.pt").exists() else None


def train_vae(steps=2000, batch=16, rate=1.2e-3, seed=1):
    """A TAESD in float32 whose latents have about mean 0 and std 1 in every channel, written to
    WORK/vae.safetensors."""
    from comfy.taesd.taesd import TAESD

    rng, vae = torch.Generator().manual_seed(seed), TAESD(latent_channels=world.CHANNELS)
    he_init(vae, rng)
    vae.taesd_decoder[-1].bias.data.fill_(0.5)
    vae.taesd_encoder[-1].weight.data.mul_(0.5)
    vae.to(memory_format=torch.channels_last).train()
    data, unseen = vae_images(9000, seed), vae_images(300, seed + 1).float() / 255
    weights = [p for n, p in vae.named_parameters() if n.startswith("taesd")]
    opt, start, before = (
        torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.99), weight_decay=1e-4),
        time.time(),
        kept("vae"),
    )
    if before:
        vae.load_state_dict(before["weights"])
        opt.load_state_dict(before["opt"])
    for step in range(before["step"] if before else 0, steps):
        rng = step_rng(seed, step)
        x = (data[torch.randint(len(data), (batch,), generator=rng)].float() / 255).contiguous(
            memory_format=torch.channels_last
        )
        jitter = torch.rand((batch, 1, 1, 1), generator=rng) * 0.25  # the decoder must forgive what a sampler leaves
        with torch.autocast("cpu", torch.bfloat16):
            z = vae.taesd_encoder(x)
            y = vae.taesd_decoder(z + jitter * torch.randn(z.shape, generator=rng))
        y, z = y.float(), z.float()
        spread = (z.mean((0, 2, 3)).square() + (z.std((0, 2, 3)) - 1).square()).mean()
        loss = (y - x).square().mean() + 0.1 * (y - x).abs().mean() + 0.02 * spread
        for group in opt.param_groups:
            group["lr"] = rate * pace(step, steps)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        opt.step()
        if step % 100 == 99 or step == steps - 1:
            print(
                f"vae {step + 1:5d}  loss {loss.item():.5f}  {vae_figures(vae, unseen)}  {time.time() - start:.0f} s",
                flush=True,
            )
            keep("vae", step=step + 1, weights=vae.state_dict(), opt=opt.state_dict())
    save_file(
        {k: v.contiguous() for k, v in vae.state_dict().items() if k.startswith("taesd")}, str(WORK / "vae.safetensors")
    )


def polish(steps=1000, batch=16, rate=8e-4, seed=5):
    """Train the decoder alone on the latents of the encoder as it will be stored, and write it into
    WORK/vae.safetensors.

    Half the cost of a VAE step, and the transformer's latents do not move. Edges of faint shapes need it: more weight
    on absolute error.
    """
    from comfy.taesd.taesd import TAESD

    stored, vae, before = (
        load_file(str(WORK / "vae.safetensors")),
        TAESD(latent_channels=world.CHANNELS),
        kept("polish"),
    )
    vae.load_state_dict(before["weights"] if before else stored, strict=False)
    decoder = vae.taesd_decoder.to(memory_format=torch.channels_last)
    data = vae_images(9000, seed, 6)
    latents, unseen = encode_images(data), vae_images(300, seed + 1).float() / 255
    opt, start = torch.optim.AdamW(decoder.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-4), time.time()
    if before:
        opt.load_state_dict(before["opt"])
    for step in range(before["step"] if before else 0, steps):
        rng = step_rng(seed, step)
        pick, jitter = (
            torch.randint(len(data), (batch,), generator=rng),
            torch.rand((batch, 1, 1, 1), generator=rng) * 0.2,
        )
        x, z = data[pick].float() / 255, latents[pick]
        with torch.autocast("cpu", torch.bfloat16):
            y = decoder(
                (z + jitter * torch.randn(z.shape, generator=rng)).contiguous(memory_format=torch.channels_last)
            )
        loss = (y.float() - x).square().mean() + 0.2 * (y.float() - x).abs().mean()
        for group in opt.param_groups:
            group["lr"] = rate * pace(step, steps, decay=0.8)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        opt.step()
        if step % 100 == 99 or step == steps - 1:
            print(
                f"polish {step + 1:5d}  loss {loss.item():.5f}  {vae_figures(vae, unseen)}  {time.time() - start:.0f} "
                "s",
                flush=True,
            )
            keep("polish", step=step + 1, weights=vae.state_dict(), opt=opt.state_dict())
    save_file(
        stored | {f"taesd_decoder.{k}": v.contiguous() for k, v in decoder.state_dict().items()},
        str(WORK / "vae.safetensors"),
    )


@torch.no_grad()
def vae_figures(vae, images):
    """Squared error on images in [0, 1] and spread of the latents, as one line."""
    z = vae.taesd_encoder(images)
    error = (vae.taesd_decoder(z).clamp(0, 1) - images).square().mean((1, 2, 3))
    named = error[torch.arange(len(error)) % 3 != 2].mean()
    channel = z.std((0, 2, 3))
    spread = f"latent std {z.std():.3f} ({channel.min():.2f}-{channel.max():.2f}) mean {z.mean():.3f}"
    return f"mse {error.mean():.5f} of the world {named:.5f}  {spread}"


# --- the transformer


def captions():
    """Every caption that training uses, "" first."""
    parts = [
        (n, c, s, g)
        for n in NOUNS
        for c in (None, *shapes.COLOURS)
        for s in (None, *shapes.SIZES)
        for g in (None, *shapes.GROUNDS)
    ]
    return ["", *(shapes.caption(*p) for p in parts)]


def said(rng, attributes):
    """A caption for an image: all of it, or with a word or two left out, or nothing (one in ten, for guidance)."""
    empty, noun, colour, size, ground = torch.rand(5, generator=rng).tolist()
    if empty < 0.1:
        return ""
    return shapes.caption(
        "shape" if noun < 0.08 else attributes["shape"],
        attributes["colour"] if colour > 0.15 else None,
        attributes["size"] if size > 0.25 else None,
        attributes["ground"] if ground > 0.25 else None,
    )


@torch.no_grad()
def encode_texts(texts, length=77):
    """(N, length, 768) hidden states and (N, 768) pooled, float16, by the host's tokenizer and CLIP with the seeded
    weights. The encoder looks back only, so padding that is cut off changes nothing before it; ValueError for a text
    that is longer."""
    import comfy.sd1_clip
    from comfy.text_encoders.sd3_clip import sd3_clip

    clip, tokenizer = sd3_clip(clip_l=True, clip_g=False, t5=False)(dtype=torch.float32), comfy.sd1_clip.SDTokenizer()
    clip.load_state_dict({f"clip_l.{k}": v.half().float() for k, v in world.text_encoder().items()})
    places = clip.clip_l.transformer.text_model.embeddings.position_embedding
    places.weight = torch.nn.Parameter(places.weight[:length], requires_grad=False)
    told = [tokenizer.tokenize_with_weights(t) for t in texts]
    if long := [t for t, (tokens, *_) in zip(texts, told, strict=True) if tokens[length - 1][0] != tokens[-1][0]]:
        raise ValueError(f"{long[0]!r} needs more than {length} tokens.")
    out = [clip.encode_token_weights({"l": [part[:length] for part in parts], "g": [], "t5xxl": []}) for parts in told]
    return torch.cat([o[0][..., : world.CLIP] for o in out]).half(), torch.cat(
        [o[1][..., : world.CLIP] for o in out]
    ).half()


@torch.no_grad()
def encode_images(images):
    """Model-space latents (N, 16, 8, 8), by the VAE as it will be stored: in 8 bits."""
    from comfy.taesd.taesd import TAESD

    vae = TAESD(latent_channels=world.CHANNELS)
    vae.load_state_dict(world.unpack(world.pack(load_file(str(WORK / "vae.safetensors")))), strict=False)
    vae.to(memory_format=torch.channels_last)
    parts = images.contiguous(memory_format=torch.channels_last).split(64)
    return torch.cat([vae.taesd_encoder(part.float() / 255) for part in parts]).contiguous()


def blank_transformer(rng):
    """The host's MMDiT with the CLIP-L columns only, seeded; what modulates and the last layer start at zero, so it
    begins as identity."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    words = {"target": "torch.nn.Linear", "params": {"in_features": world.CLIP, "out_features": world.WIDTH}}
    model = OpenAISignatureMMDITWrapper(
        in_channels=world.CHANNELS,
        out_channels=world.CHANNELS,
        patch_size=world.PATCH,
        depth=world.DEPTH,
        input_size=None,
        adm_in_channels=world.CLIP,
        context_embedder_config=words,
        num_patches=world.SIDE**2,
        pos_embed_max_size=world.SIDE,
        dtype=torch.float32,
        device="cpu",
        operations=comfy.ops.disable_weight_init,
    )
    model.pos_embed.copy_(world.position_table(world.WIDTH, world.SIDE))
    for name, p in model.named_parameters():
        still = p.ndim == 1 or "adaLN" in name or name.startswith("final_layer.linear")
        p.data.copy_(torch.zeros(p.shape) if still else torch.randn(p.shape, generator=rng) / math.sqrt(p[0].numel()))
    return model


def sigmas(rng, n):
    """Half of them uniform, half as the host's schedule spaces its steps (shift 3): most of a shape is decided at high
    noise."""
    u = (torch.arange(n) + torch.rand(n, generator=rng)) / n
    u = u[torch.randperm(n, generator=rng)]
    return torch.where(torch.rand(n, generator=rng) < 0.5, u, 3 * u / (1 + 2 * u)).clamp(0.001, 1)


def training_set(n, seed):
    """Attributes of n images, caption -> index, latents, and the encoded captions' hidden states and pooled."""
    rng = torch.Generator().manual_seed(seed)
    drawn = [shapes.sample(rng) for _ in range(n)]
    latents = encode_images(pixels([d[0] for d in drawn]))
    return [d[2] for d in drawn], {t: i for i, t in enumerate(captions())}, latents, *texts()


def texts():
    """What encode_texts makes of every caption; kept in WORK, because it takes minutes and a rerun needs the same."""
    path = WORK / "texts.pt"
    if not path.exists():
        WORK.mkdir(parents=True, exist_ok=True)
        torch.save(encode_texts(captions()), path)
    return torch.load(path)


def flow_loss(model, x0, noise, sigma, context, pooled):
    """Flow matching: x = (1 - sigma) x0 + sigma noise, the model answers noise - x0. Mean square of what it is off
    by."""
    s = sigma.view(-1, 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        answer = model((1 - s) * x0 + s * noise, sigma * 1000, context=context.float(), y=pooled.float())
    return (answer.float() - (noise - x0)).square().mean()


def learn(name, model, losses, steps, rate, seed):
    """Trains on the mean of losses(step, rng), a list, and writes the averaged weights: WORK/{name}.safetensors. A
    stopped run goes on."""
    weights, mean = list(model.parameters()), [p.detach().clone() for p in model.parameters()]
    opt, start, recent, before = (
        torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.99), weight_decay=0.01),
        time.time(),
        [],
        kept(name),
    )
    if before:
        model.load_state_dict(before["weights"])
        opt.load_state_dict(before["opt"])
        mean = before["mean"]
    for step in range(before["step"] if before else 0, steps):
        parts = losses(step, step_rng(seed, step))
        for group in opt.param_groups:
            group["lr"] = rate * pace(step, steps, 200)
        opt.zero_grad(set_to_none=True)
        for loss in parts:
            (loss / len(parts)).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        opt.step()
        torch._foreach_lerp_(mean, [p.detach() for p in weights], 1 - min(0.998, (step + 1) / (step + 10)))
        recent.append([loss.item() for loss in parts])
        if step % 200 == 199 or step == steps - 1:
            shown = "  ".join(f"{sum(part) / len(part):.4f}" for part in zip(*recent, strict=True))
            print(f"{name} {step + 1:5d}  loss {shown}  {time.time() - start:.0f} s", flush=True)
            recent.clear()
            keep(name, step=step + 1, weights=model.state_dict(), opt=opt.state_dict(), mean=mean)
            save_file(
                dict(zip([k for k, _ in model.named_parameters()], mean, strict=True)),
                str(WORK / f"{name}.safetensors"),
            )


def train_dit(steps=17000, short=15600, batch=64, rate=1.5e-3, seed=3, images=6000):
    """The first `short` steps see 12 of the 77 text tokens (a caption needs 10, the rest is padding): the same lesson
    at a third of the time."""
    rng, start = torch.Generator().manual_seed(seed), time.time()
    attributes, index, latents, context, pooled = training_set(images, seed)
    print(
        f"data ready: {len(latents)} latents std {latents.std():.3f}, {len(context)} captions, "
        f"{time.time() - start:.0f} s",
        flush=True,
    )
    model = blank_transformer(rng)

    def losses(step, rng):
        pick = torch.randint(len(latents), (batch,), generator=rng)
        words = torch.tensor([index[said(rng, attributes[i])] for i in pick.tolist()])
        x0, noise, sigma = latents[pick], torch.randn((batch, *latents.shape[1:]), generator=rng), sigmas(rng, batch)
        return [flow_loss(model, x0, noise, sigma, context[words, : 12 if step < short else 77], pooled[words])]

    learn("dit", model, losses, steps, rate, seed)


def pack(files=(("vae", "vae"), ("dit", "transformer"))):
    """Write the 8-bit files that the repository keeps, and say how large they are."""
    world.WEIGHTS.mkdir(exist_ok=True)
    for source, target in files:
        path = world.WEIGHTS / f"{target}.safetensors"
        save_file(
            {k: v.contiguous() for k, v in world.pack(load_file(str(WORK / f"{source}.safetensors"))).items()},
            str(path),
        )
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


def check(seeds=2):
    """Build the checkpoint, sample every in-world caption and the unseen shapes with ComfyUI's sampler, print what was
    right."""
    from . import sampling

    toy = sampling.load(world.build(WORK / "toy_world.safetensors"))
    parts = [(n, c, s, g) for n in shapes.SEEN for c in shapes.COLOURS for s in shapes.SIZES for g in shapes.GROUNDS]
    full = [dict(zip(("shape", "colour", "size", "ground"), p, strict=True)) for p in parts] * seeds
    print("full captions", sampling.accuracy(toy, full, first_seed=100_000), flush=True)
    brief = [{"shape": n, "colour": c} for n in shapes.SEEN for c in shapes.COLOURS] * seeds
    print("a <colour> <shape>", sampling.accuracy(toy, brief, first_seed=200_000), flush=True)
    alone = [{"shape": n} for n in shapes.SEEN] * 6 * seeds
    print("a <shape>", sampling.accuracy(toy, alone, first_seed=300_000), flush=True)
    for shape in shapes.UNSEEN:
        unseen = [{"shape": shape, "colour": c} for c in (None, *shapes.COLOURS)] * 2 * seeds
        print(f"unseen: a {shape}", sampling.accuracy(toy, unseen, first_seed=400_000), flush=True)


if __name__ == "__main__":
    from comfy.cli_args import args

    args.cpu = True
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    for part in sys.argv[1:]:
        {"vae": train_vae, "polish": polish, "texts": texts, "dit": train_dit, "pack": pack, "check": check}[part]()
