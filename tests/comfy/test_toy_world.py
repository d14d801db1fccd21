"""ComfyUI loads the toy world's file as it would any other, and draws in it what the captions say."""

import logging

import numpy as np
import pytest
import torch
from trainyard.tests.toy import sampling, shapes, world
from trainyard.tests.toy.measure import measure

pytestmark = pytest.mark.comfy
COMPLAINTS = ("missing", "unexpected", "left over", "unmatched", "uninitialized")


@pytest.fixture(scope="module")
def built(comfy):
    """(the toy world loaded by ComfyUI, what the loader logged)"""
    path = world.cached()
    said = []
    handler = logging.Handler(level=logging.DEBUG)
    handler.emit = lambda record: said.append(record.getMessage())
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        toy = sampling.load(path)
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    toy.path = path
    return toy, said


def test_the_loader_misses_no_key_and_is_left_with_none(built):
    toy, said = built
    complaints = [
        line for line in said if any(word in line.lower() for word in COMPLAINTS) and not line.rstrip().endswith("[]")
    ]
    assert not complaints, complaints
    assert type(toy.model.model).__name__ == "SD3" and toy.clip is not None and toy.vae is not None


def test_every_weight_in_the_model_comes_from_the_file(built):
    """Name by name and bit by bit: what ComfyUI holds is what the file says."""
    from safetensors.torch import load_file

    toy, _ = built
    file = load_file(str(toy.path))
    parts = {
        "model.diffusion_model.": toy.model.model.diffusion_model,
        "first_stage_model.": toy.vae.first_stage_model,
        "text_encoders.clip_l.": toy.clip.cond_stage_model.clip_l,
    }
    for prefix, module in parts.items():
        held = module.state_dict()
        names = {k[len(prefix) :] for k in file if k.startswith(prefix)}
        assert names == set(held)
        assert all(torch.equal(held[k].half(), file[prefix + k]) for k in names)


def test_the_vae_gives_pictures_back(built):
    rng = torch.Generator().manual_seed(61)
    drawn = [shapes.sample(rng, shape=shapes.SHAPES[i % len(shapes.SHAPES)]) for i in range(24)]
    pixels = torch.stack([torch.from_numpy(np.asarray(p).copy()) for p, _, _ in drawn]).float() / 255
    latents = built[0].vae.encode(pixels)
    back = built[0].vae.decode(latents)
    error = (back - pixels).square().mean().item()
    right = [
        measure(p).matches(shape=a["shape"], colour=a["colour"], ground=a["ground"])
        for p, (_, _, a) in zip(back, drawn, strict=True)
    ]
    model_space = built[0].model.model.process_latent_in(latents)
    assert error < 0.002, f"MSE {error:.5f}"
    assert sum(right) >= 23, f"{sum(right)} of 24 are still what was drawn"
    assert 0.8 < model_space.std().item() < 1.2, f"latent std {model_space.std():.2f}"


def test_captions_come_out_in_shape_colour_and_ground(built):
    sizes, grounds = tuple(shapes.SIZES), tuple(shapes.GROUNDS)
    wanted = [
        {"shape": shape, "colour": colour, "size": sizes[(i + j) % 2], "ground": grounds[(i + j) % 3]}
        for i, colour in enumerate(shapes.COLOURS)
        for j, shape in enumerate(shapes.SEEN)
    ]
    shares = sampling.accuracy(built[0], wanted, first_seed=7000)
    assert min(shares[k] for k in ("shape", "colour", "ground")) >= 0.9, shares


def test_the_base_has_never_seen_a_star_or_a_ring(built):
    wanted = [{"shape": s, "colour": c} for s in shapes.UNSEEN for c in (None, *shapes.COLOURS)]
    shares = sampling.accuracy(built[0], wanted, first_seed=8000)
    assert shares["shape"] <= 0.1, shares


def test_a_batch_of_prompts_equals_the_prompts_alone(built):
    prompts, seeds = ["a red circle", "a small blue square on a black ground"], [3, 4]
    together = sampling.images(built[0], prompts, seeds, steps=4)
    apart = torch.cat([sampling.images(built[0], [p], [s], steps=4) for p, s in zip(prompts, seeds, strict=True)])
    assert (together - apart).abs().max() < 1e-3


def test_the_clip_vision_tells_shapes_apart_that_it_never_saw_like_this(comfy):
    """By its embeddings alone: each image's nearest among 300 others, at any place and angle and in any colour, shows
    the same shape."""
    from trainyard.tests.toy.train_eyes import drawn

    eyes, rng = sampling.clip_vision(), torch.Generator().manual_seed(77)
    made = [drawn(rng)[:2] for _ in range(360)]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image, _ in made])).float() / 255
    with torch.no_grad():
        seen = torch.cat([eyes.encode_image(some)["image_embeds"].float().cpu() for some in pixels.split(60)])
    seen, kinds = torch.nn.functional.normalize(seen - seen.mean(0), dim=1), torch.tensor([kind for _, kind in made])
    nearest = (seen[300:] @ seen[:300].T).topk(5).indices
    right = (kinds[:300][nearest].mode(1).values == kinds[300:]).float().mean()
    assert right > 0.8, right
