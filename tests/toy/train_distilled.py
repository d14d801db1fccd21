"""Distils the toy world's transformer to four steps with its guidance built in, and writes
tests/toy/weights/distilled.safetensors. Five minutes of one idle core.

    python -m tests.toy.train_distilled train pack check      # stopped runs go on from TOY_WORK, by default /tmp/toy_world

The teacher samples a caption from noise in 12 Euler steps under classifier-free guidance 2.5. The student learns to make
the same way in four steps and without guidance: at each of its four noise levels its velocity is the mean velocity of the
teacher's three steps from there (Salimans and Ho 2022, progressive distillation, in one go). What it learns is a low-rank
change of every matrix, so that the file is small. The committed weights are the average at step 400 of 800, where the run
was stopped: four steps then drew 48 of 48 captions right. Run from the root of the repository, like train_world.
"""

import math
import os
import sys
import time

import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrize

from . import shapes, world
from .sampling import CFG, STEPS_DISTILLED
from .train_pairs import transformer
from .train_world import WORK, captions, encode_texts, learn, said

FINE = 3  # steps of the teacher for one of the student's
RANK = 32
WORDS = 12  # tokens of a caption that are not padding
NAME = "distilled"


class LowRank(torch.nn.Module):
    """weight -> weight + up @ down."""

    def __init__(self, weight, rank, rng):
        super().__init__()
        rows, columns = weight.flatten(1).shape
        rank = min(rank, rows, columns)
        self.down = torch.nn.Parameter(torch.randn(rank, columns, generator=rng) / math.sqrt(columns))
        self.up = torch.nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight):
        return weight + (self.up @ self.down).view_as(weight)


def student(seed=0):
    """The transformer with a low-rank change on each matrix, which alone is trained."""
    model, rng = transformer().requires_grad_(False), torch.Generator().manual_seed(seed)
    for module in list(model.modules()):
        if (weight := getattr(module, "weight", None)) is not None and weight.ndim >= 2:
            parametrize.register_parametrization(module, "weight", LowRank(weight, RANK, rng))
    return model


def levels(count):
    """(count + 1,) noise levels of the host's simple schedule at SD3's shift of 3, from pure noise to none."""
    u = torch.linspace(1, 0, count + 1)
    return 3 * u / (1 + 2 * u)


def velocity(model, x, sigma, context, pooled):
    with torch.autocast("cpu", torch.bfloat16):
        return model(x, sigma.expand(len(x)) * 1000, context=context.float(), y=pooled.float()).float()


def few_texts():
    """Hidden states (N, WORDS, 768) and pooled of every caption that training uses; kept in WORK."""
    path = WORK / "few_texts.pt"
    if not path.exists():
        WORK.mkdir(parents=True, exist_ok=True)
        torch.save(encode_texts(captions(), WORDS), path)
    return torch.load(path)


@torch.no_grad()
def teacher_way(model, x, context, pooled, empty):
    """(STEPS_DISTILLED + 1, B, ...): x at each of the student's noise levels, of the teacher's guided way from noise."""
    n, found = len(x), [x]
    both = torch.cat([context, empty[0].expand(n, -1, -1)]), torch.cat([pooled, empty[1].expand(n, -1)])
    sigmas = levels(FINE * STEPS_DISTILLED)
    for step, (here, there) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        told, untold = velocity(model, torch.cat([x, x]), here, *both).chunk(2)
        x = x + (untold + CFG * (told - untold)) * (there - here)
        if step % FINE == FINE - 1:
            found.append(x)
    return torch.stack(found)


def ways(count=1536, batch=64, seed=21):
    """(teacher's ways (count, steps + 1, 16, 8, 8), number of each one's caption); kept in WORK."""
    path = WORK / f"ways-{count}-{seed}.pt"
    if path.exists():
        return torch.load(path)
    rng, model, start = torch.Generator().manual_seed(seed), transformer(), time.time()
    context, pooled = few_texts()
    index = {t: i for i, t in enumerate(captions())}
    words = torch.tensor([index[said(rng, shapes.sample(rng)[2])] for _ in range(count)])
    found = []
    for part in words.split(batch):
        x = torch.randn(len(part), world.CHANNELS, 8, 8, generator=rng)
        found.append(teacher_way(model, x, context[part], pooled[part], (context[:1], pooled[:1])).transpose(0, 1))
        if len(found) % 10 == 0:
            print(f"ways {len(found) * batch}  {time.time() - start:.0f} s", flush=True)
    torch.save((torch.cat(found), words), path)
    return torch.load(path)


def train(steps=800, batch=64, rate=3e-3, seed=23):
    """Each picture of a batch trains at one of the four levels."""
    drawn, words = ways()
    context, pooled = few_texts()
    model, sigmas = student(seed), levels(STEPS_DISTILLED)

    def losses(step, rng):
        pick = torch.randint(len(drawn), (batch,), generator=rng)
        at = torch.randint(STEPS_DISTILLED, (batch,), generator=rng)
        x, then = drawn[pick, at], drawn[pick, at + 1]
        wanted = (x - then) / (sigmas[at] - sigmas[at + 1]).view(-1, 1, 1, 1)
        found = velocity(model, x, sigmas[at], context[words[pick]], pooled[words[pick]])
        return [(found - wanted).square().mean()]

    learn(NAME, model, losses, steps, rate, seed)


def pack():
    """Write the 8-bit factors that the repository keeps, and say how large they are."""
    found = {
        name.replace(".parametrizations.weight.0", ".weight")
        .replace(".weight.up", ".weight:up")
        .replace(".weight.down", ".weight:down"): value
        for name, value in load_file(str(WORK / f"{NAME}.safetensors")).items()
        if "parametrizations.weight.0" in name
    }
    path = world.WEIGHTS / f"{NAME}.safetensors"
    save_file({k: v.contiguous() for k, v in world.pack(found).items()}, str(path))
    print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


def check(seeds=1):
    """What four steps draw: of the distilled model, and of the base with and without guidance."""
    from . import sampling

    parts = [(n, c, s, g) for n in shapes.SEEN for c in shapes.COLOURS for s in shapes.SIZES for g in shapes.GROUNDS]
    full = [dict(zip(("shape", "colour", "size", "ground"), p, strict=True)) for p in parts] * seeds
    toy = sampling.load(world.build(WORK / "toy_world.safetensors"))
    turbo = sampling.load(world.build(WORK / "toy_distilled.safetensors", NAME))
    few = dict(steps=STEPS_DISTILLED, first_seed=100_000)
    print("distilled, 4 steps, cfg 1", sampling.accuracy(turbo, full, cfg=1.0, **few), flush=True)
    print("base, 4 steps, cfg 1", sampling.accuracy(toy, full, cfg=1.0, **few), flush=True)
    print("base, 4 steps, cfg 2.5", sampling.accuracy(toy, full, cfg=CFG, **few), flush=True)


if __name__ == "__main__":
    from comfy.cli_args import args

    args.cpu = True
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    for part in sys.argv[1:]:
        {"ways": ways, "train": train, "pack": pack, "check": check}[part]()
