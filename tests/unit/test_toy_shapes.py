"""The toy world's ruler: what is drawn is read back in pixels, also through noise and blur as a small VAE leaves
them."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter
from trainyard.tests.toy import shapes, world
from trainyard.tests.toy.measure import measure

NAMES = ("shape", "colour", "ground", "size")


def spoilt(image, blur_px, noise, rng):
    """(H, W, 3) tensor of an image after blur and noise."""
    x = torch.from_numpy(np.asarray(image.filter(ImageFilter.GaussianBlur(blur_px))) / 255.0)
    return (x + noise * torch.randn(x.shape, generator=rng, dtype=x.dtype)).clamp(0, 1)


@pytest.mark.parametrize("blur_px, noise", [(0, 0), (1.0, 0), (0, 0.05), (1.0, 0.05)])
def test_at_least_98_of_100_drawn_pictures_are_read_right(blur_px, noise):
    rng = torch.Generator().manual_seed(17)
    wrong = []
    for i in range(180):
        image, caption, drawn = shapes.sample(rng, shape=shapes.SHAPES[i % len(shapes.SHAPES)])
        seen = measure(spoilt(image, blur_px, noise, rng))
        if not seen.matches(**{k: drawn[k] for k in NAMES}):
            wrong.append((caption, seen))
    assert len(wrong) <= 180 * 0.02, f"{len(wrong)} of 180 read wrong, first: {wrong[0]}"


@pytest.mark.parametrize("shape", shapes.SHAPES)
@pytest.mark.parametrize("radius", [8, 12, 19])
def test_the_measured_area_is_pi_r_squared_whatever_the_shape(shape, radius):
    area = measure(shapes.draw(shape, radius=radius)).area
    assert area == pytest.approx(np.pi * radius**2, rel=0.07), f"{shape} of radius {radius}: {area:.0f} px"


def test_the_measured_centre_follows_the_drawn_one():
    seen = measure(shapes.draw("circle", "blue", "small", "black", centre=(25.0, 40.0)))
    assert seen.centre == pytest.approx((25.0, 40.0), abs=0.3)


def test_a_picture_of_twice_the_size_measures_the_same():
    small, big = (measure(shapes.draw("star", "green", "large", "grey", px=px)) for px in (64, 128))
    assert big.matches(shape="star", colour="green", size="large", ground="grey")
    assert big.area == pytest.approx(small.area, rel=0.03)


def test_a_square_turned_on_its_corner_is_still_a_square():
    assert [measure(shapes.draw("square", radius=14, degrees=d)).shape for d in (0, 20, 45)] == ["square"] * 3


def test_nothing_is_seen_where_nothing_is():
    flat = measure(Image.new("RGB", (64, 64), (128, 128, 128)))
    speckled = measure(spoilt(Image.new("RGB", (64, 64), (128, 128, 128)), 0, 0.03, torch.Generator().manual_seed(1)))
    assert (flat.shape, flat.colour, flat.ground) == ("other", None, "grey")
    assert speckled.shape == "other" and speckled.area < 60


@pytest.mark.parametrize("radius", [9, 17])
@pytest.mark.parametrize(("exponent", "name"), [(2, "circle"), (3, "circle"), (5, "square"), (20, "square")])
def test_a_rounded_square_is_called_after_the_shape_that_is_nearer(radius, exponent, name):
    """Superellipses: 2 is the circle. A square's outline has waves of 0.15, that of exponent 3 has 0.06."""
    image, fine = Image.new("RGB", (256, 256), (243, 243, 243)), 4
    half = radius * math.sqrt(math.pi) / (2 * math.gamma(1 + 1 / exponent)) * math.sqrt(math.gamma(1 + 2 / exponent))
    power = lambda value: math.copysign(abs(value) ** (2 / exponent), value)
    angles = [math.radians(degree) for degree in range(360)]
    points = [(fine * (32 + half * power(math.cos(a))), fine * (32 + half * power(math.sin(a)))) for a in angles]
    ImageDraw.Draw(image).polygon(points, fill=(40, 160, 60))
    assert measure(image.resize((64, 64), Image.Resampling.BOX)).shape == name


def test_what_is_between_two_shapes_has_no_name():
    """A half circle is none of the shapes."""
    image = np.asarray(shapes.draw("circle", radius=18)).copy()
    image[32:] = 243
    assert measure(Image.fromarray(image)).shape == "other"


def test_two_shapes_leave_stray_coverage():
    two = np.concatenate([np.asarray(shapes.draw("circle", size="small", centre=(32, 32)))[:, 16:48]] * 2, 1)
    assert measure(Image.fromarray(two)).stray == pytest.approx(0.5, abs=0.02)
    assert measure(shapes.draw("circle")).stray == 0


def test_pinned_attributes_leave_the_other_draws_alone():
    free = shapes.sample(torch.Generator().manual_seed(3))[2]
    pinned = shapes.sample(torch.Generator().manual_seed(3), colour="red", shape="star")[2]
    assert {k: pinned[k] for k in ("size", "ground", "radius")} == {k: free[k] for k in ("size", "ground", "radius")}
    assert (pinned["shape"], pinned["colour"]) == ("star", "red")


def test_the_base_never_draws_an_unseen_shape_unless_asked():
    rng = torch.Generator().manual_seed(4)
    assert {shapes.sample(rng)[2]["shape"] for _ in range(60)} == set(shapes.SEEN)


def test_a_caption_leaves_out_what_is_not_said():
    assert shapes.caption("circle", "red", "small", "white") == "a small red circle on a white ground"
    assert shapes.caption("star", ground="black") == "a star on a black ground"


def test_an_unknown_shape_or_attribute_is_named_in_the_error():
    with pytest.raises(ValueError, match="No shape is called 'blob'. Use one of circle"):
        shapes.draw("blob")
    with pytest.raises(ValueError, match=r"Cannot fix \['color'\]: a picture has shape, colour"):
        shapes.sample(torch.Generator(), color="red")


def test_weights_in_eight_bits_are_within_half_a_step_of_the_row():
    rng = torch.Generator().manual_seed(5)
    weight = torch.randn(7, 5, 3, 3, generator=rng) * torch.logspace(-4, 1, 7).view(-1, 1, 1, 1)
    state = {"a.weight": weight, "a.bias": torch.randn(7, generator=rng)}
    back = world.unpack(world.pack(state))
    step = state["a.weight"].abs().amax((1, 2, 3)) / 127
    worst = (back["a.weight"] - state["a.weight"]).abs().amax((1, 2, 3)) / step
    assert worst.max() < 0.6, worst  # half a step, and what the float16 scale adds at 127 steps
    assert (back["a.bias"] - state["a.bias"]).abs().max() < 2e-3


def test_the_position_table_says_column_then_row():
    table = world.position_table(192, 64).view(64, 64, 192)
    assert torch.equal(table[3, 9, :96], table[50, 9, :96]) and torch.equal(table[3, 9, 96:], table[3, 50, 96:])
    assert table[5, 7, 0].item() == pytest.approx(np.sin(7)) and table[5, 7, 96 + 48].item() == pytest.approx(np.cos(5))


def test_the_seed_still_gives_the_words_that_the_transformer_was_trained_on():
    """Four places of the token table, written down when the weights were made: a torch release that draws otherwise
    makes a deaf world."""
    table = torch.randn((49408, world.CLIP), generator=torch.Generator().manual_seed(world.TEXT_SEED))
    assert next(iter(world.text_table())) == "transformer.text_model.embeddings.token_embedding.weight"
    places = torch.stack([table[0, 0], table[736, 0], table[736, 3], table[-1, -1]])
    assert places.tolist() == pytest.approx([-2.8124, -1.1289, 1.2318, 1.4399], abs=1e-3)
