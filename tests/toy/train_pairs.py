"""Goes on training the toy world's transformer on frames of two shapes, and writes tests/toy/weights/pairs.safetensors. Half an hour of one core.

    python -m tests.toy.train_pairs train pack      # stopped runs go on from TOY_WORK, by default /tmp/toy_world

Half of a step's pictures stay alone, 64 x 64 px. The other half are frames of 128 x 64 px, what Build Collages makes of two of them, captioned
by position ("left: a red circle on a white ground; right: ..."), always of SEEN shapes. Run from the root of the repository, like train_world.
"""
import os
import sys
import time

import torch
from safetensors.torch import load_file, save_file

from . import shapes, world
from .train_world import WORK, blank_transformer, encode_pictures, keep, kept, pace, pixels, said, sigmas, step_rng

TOKENS = 28     # the longest caption of a frame needs 27; the rest of 77 is padding


def by_position(left, right):
    return f"left: {left}; right: {right}"


def brief(rng, attributes):
    """As `said`, but a cell of a frame is never left without a word."""
    return next(text for text in iter(lambda: said(rng, attributes), None) if text)


@torch.no_grad()
def encode_texts(texts):
    """(N, 28, 768) hidden states and (N, 768) pooled, by the host's tokenizer and CLIP with the seeded weights. The encoder looks back only,
    so what is cut off changes nothing before it."""
    import comfy.sd1_clip
    from comfy.text_encoders.sd3_clip import sd3_clip
    clip, tokenizer = sd3_clip(clip_l=True, clip_g=False, t5=False)(dtype=torch.float32), comfy.sd1_clip.SDTokenizer()
    clip.load_state_dict({f"clip_l.{k}": v.half().float() for k, v in world.text_encoder().items()})
    places = clip.clip_l.transformer.text_model.embeddings.position_embedding
    places.weight = torch.nn.Parameter(places.weight[:TOKENS], requires_grad=False)
    hidden, pooled = [], []
    for text in texts:
        (tokens,) = tokenizer.tokenize_with_weights(text)
        if tokens[TOKENS - 1][0] != tokens[-1][0]:
            raise ValueError(f"{text!r} needs more than {TOKENS} tokens.")
        out = clip.encode_token_weights({"l": [tokens[:TOKENS]], "g": [], "t5xxl": []})
        hidden.append(out[0][..., :world.CLIP].half())
        pooled.append(out[1][..., :world.CLIP].half())
    return torch.cat(hidden), torch.cat(pooled)


def encode_frames(pictures):
    """Latents (N, 16, 8, 8 or 16), by the VAE as it is stored."""
    WORK.mkdir(parents=True, exist_ok=True)
    if not (WORK / "vae.safetensors").exists():
        save_file(world.unpack(load_file(str(world.WEIGHTS / "vae.safetensors"))), str(WORK / "vae.safetensors"))
    return encode_pictures(pictures)


def lessons(kind, count, seed, per_caption=4):
    """(latents, caption number of each, hidden states, pooled) of pictures alone or frames; caption 0 is the empty one."""
    path = WORK / f"{kind}-{count}-{seed}.pt"
    if path.exists():
        return torch.load(path)
    rng, drawn, words, texts = torch.Generator().manual_seed(seed), [], [], [""]
    while len(drawn) < count:
        here, there = shapes.sample(rng)[2], shapes.sample(rng)[2]
        texts.append(brief(rng, here) if kind == "alone" else by_position(brief(rng, here), brief(rng, there)))
        for _ in range(per_caption):
            left, right = (shapes.sample(rng, **{k: a[k] for k in ("shape", "colour", "size", "ground")})[0] for a in (here, there))
            frame = left
            if kind != "alone":
                frame = shapes.Image.new("RGB", (2 * shapes.PX, shapes.PX))
                frame.paste(left, (0, 0))
                frame.paste(right, (shapes.PX, 0))
            drawn.append(frame)
            words.append(len(texts) - 1)
    made = encode_frames(pixels(drawn)), torch.tensor(words), *encode_texts(texts)
    torch.save(made, path)
    return made


def transformer():
    """The host's MMDiT with the CLIP-L columns only and the stored weights."""
    model = blank_transformer(torch.Generator().manual_seed(0))
    stored = world.unpack(load_file(str(world.WEIGHTS / "transformer.safetensors")))
    model.load_state_dict(stored | {"pos_embed": world.position_table(world.WIDTH, world.SIDE)})
    return model


def train(steps=3000, batch=32, rate=6e-4, seed=11):
    """Flow matching as in train_dit; `batch` pictures alone and as many frames per step. Writes the averaged weights: WORK/pairs.safetensors."""
    start = time.time()
    parts = [lessons("alone", 3000, seed), lessons("frames", 6000, seed + 1)]
    print(f"data ready, {time.time() - start:.0f} s", flush=True)
    model, before, start = transformer(), kept("pairs"), time.time()
    weights, mean = list(model.parameters()), [p.detach().clone() for p in model.parameters()]
    opt, recent = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.99), weight_decay=0.01), []
    if before:
        model.load_state_dict(before["weights"])
        opt.load_state_dict(before["opt"])
        mean = before["mean"]
    for step in range(before["step"] if before else 0, steps):
        rng, row = step_rng(seed, step), []
        for group in opt.param_groups:
            group["lr"] = rate * pace(step, steps, 200)
        opt.zero_grad(set_to_none=True)
        for latents, words, context, pooled in parts:
            pick, noise = torch.randint(len(latents), (batch,), generator=rng), torch.randn((batch, *latents.shape[1:]), generator=rng)
            sigma, empty = sigmas(rng, batch), torch.rand(batch, generator=rng) < 0.1
            x0, s, text = latents[pick], sigma.view(-1, 1, 1, 1), torch.where(empty, 0, words[pick])
            with torch.autocast("cpu", torch.bfloat16):
                answer = model((1 - s) * x0 + s * noise, sigma * 1000, context=context[text].float(), y=pooled[text].float())
            loss = (answer.float() - (noise - x0)).square().mean()
            (loss / len(parts)).backward()
            row.append(loss.item())
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        opt.step()
        torch._foreach_lerp_(mean, [p.detach() for p in weights], 1 - min(0.998, (step + 1) / (step + 10)))
        recent.append(row)
        if step % 200 == 199 or step == steps - 1:
            alone, frames = (sum(part) / len(part) for part in zip(*recent, strict=True))
            print(f"pairs {step + 1:5d}  loss alone {alone:.4f}  frames {frames:.4f}  {time.time() - start:.0f} s", flush=True)
            recent.clear()
            keep("pairs", step=step + 1, weights=model.state_dict(), opt=opt.state_dict(), mean=mean)
            save_file(dict(zip([k for k, _ in model.named_parameters()], mean, strict=True)), str(WORK / "pairs.safetensors"))


def pack():
    """Write the 8-bit file that the repository keeps."""
    path = world.WEIGHTS / "pairs.safetensors"
    save_file({k: v.contiguous() for k, v in world.pack(load_file(str(WORK / "pairs.safetensors"))).items()}, str(path))
    print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    from comfy.cli_args import args
    args.cpu = True
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    for part in sys.argv[1:]:
        {"train": train, "pack": pack}[part]()
