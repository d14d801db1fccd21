"""Images in the place of captions: where each family takes them, a training without captions, and what is refused in
words."""

import comfy.model_base
import comfy.model_patcher
import comfy.sd
import pytest
import torch
from comfy.ldm.flux.redux import ReduxImageEncoder
from PIL import Image
from trainyard.nodes import host
from trainyard.nodes.scores import image_conditioning as nodes
from trainyard.nodes.scores.image_conditioning import CaptionsFromImages, ImageConditioning, find_embedding_slot
from trainyard.tests.comfy import families
from trainyard.tests.comfy.families import HEADS_OF_32, SD2, Family, latent_shape, make
from trainyard.tests.comfy.test_host import RANK_4, fingerprint
from trainyard.tests.comfy.test_leco_score import Clip
from trainyard.trainers.data.cache import MemoryStore
from trainyard.trainers.data.encoded import EncodedDataset, EncodedItem
from trainyard.trainers.data.readers import read_folder
from trainyard.trainers.loop import step_rng
from trainyard.trainers.methods.lora import LoraTraining
from trainyard.trainers.settings import NoiseSettings

WIDTHS = {"sdxl": 1280, "sd15": 768, "flux": 16}


class Vision:
    """A CLIP_VISION whose embedding is a fixed random map of the mean colour."""

    image_size = 8

    def __init__(self, width, tokens=5):
        self.width, self.tokens = width, tokens
        rng = torch.Generator().manual_seed(1)
        with torch.inference_mode(False):
            self.map = torch.randn(3, width, generator=rng)
            self.patcher = comfy.model_patcher.ModelPatcher(
                torch.nn.Linear(2, 2), torch.device("cpu"), torch.device("cpu")
            )
            self.patcher.model.weight.data.fill_(1.0), self.patcher.model.bias.data.fill_(0.0)

    def encode_image(self, pixels):
        embedding = pixels.mean((1, 2)) @ self.map
        return {"image_embeds": embedding, "last_hidden_state": embedding[:, None].expand(-1, self.tokens, -1)}


@pytest.fixture
def coloured(tmp_path):
    """(dataset, encoded) of a red and a blue image, encoded without captions."""

    def made(family):
        for name, colour in (("red", (200, 20, 20)), ("blue", (20, 20, 200))):
            Image.new("RGB", (64, 64), colour).save(tmp_path / f"{name}.png")
        dataset = read_folder(tmp_path)
        store, items = MemoryStore(), []
        for number, record in enumerate(dataset.records):
            store[f"latent/{number}"] = {
                "mean": torch.randn(latent_shape(family)[1:], generator=torch.Generator().manual_seed(number)),
                "std": None,
            }
            items.append(EncodedItem(record.id, record.path, f"latent/{number}", latent_shape(family)[1:], (), ()))
        return dataset, EncodedDataset(items, store, latent_shape(family)[1], "print")

    return made


def run(kind, **inputs):
    with torch.inference_mode():
        return kind.PREPARE_CLASS_CLONE(None).execute(**inputs).args[0]


def image(red=1.0):
    return torch.tensor([red, 0.1, 0.1]).expand(1, 8, 8, 3)


def extra(model, conditioning, x):
    """The model inputs that the host makes of a CONDITIONING."""
    ((cross, rest),) = conditioning
    about = dict(device=x.device, noise=x, latent_image=x, seed=0, prompt_type="positive", width=64, height=64)
    return {k: v.cond for k, v in model.model.extra_conds(**{**about, **rest, "cross_attn": cross}).items()}


# -- where it goes -----------------------------------------------------------------------------------------------------


def test_sdxl_takes_the_picture_in_the_place_of_its_pooled_text():
    model, vision = make("sdxl"), Vision(1280)
    sharp = run(
        ImageConditioning, model=model, clip=Clip("sdxl"), clip_vision=vision, images=image(), alpha=0.0, seed=0
    )
    torch.testing.assert_close(sharp[0][1]["pooled_output"], vision.encode_image(image())["image_embeds"])
    y = extra(model, sharp, torch.zeros(latent_shape("sdxl")))["y"]
    torch.testing.assert_close(y[:, :1280], vision.encode_image(image())["image_embeds"])
    noisy = run(
        ImageConditioning, model=model, clip=Clip("sdxl"), clip_vision=vision, images=image(), alpha=0.25, seed=3
    )
    assert not torch.allclose(noisy[0][1]["pooled_output"], sharp[0][1]["pooled_output"]) and torch.equal(
        noisy[0][0], sharp[0][0]
    )


def test_sdxl_reads_what_the_hosts_own_unclip_conditioning_would_give_it():
    """At no noise both ways lead to the same vector (up to the first step of the host's noise schedule, which it always
    adds)."""
    model, vision = make("sdxl"), Vision(1280)
    ours = run(ImageConditioning, model=model, clip=Clip("sdxl"), clip_vision=vision, images=image(), alpha=0.0, seed=0)
    seen = nodes.ClipVisionOutput(image_embeds=vision.encode_image(image())["image_embeds"])
    host_way = [
        [
            ours[0][0],
            {"unclip_conditioning": [{"clip_vision_output": seen, "strength": 1.0, "noise_augmentation": 0.0}]},
        ]
    ]
    x = torch.zeros(latent_shape("sdxl"))
    a, b = extra(model, ours, x)["y"][:, :1280], extra(model, host_way, x)["y"][:, :1280]
    assert torch.nn.functional.cosine_similarity(a, b).item() > 0.99


def test_unclip_takes_the_picture_in_its_own_entry(monkeypatch):
    config = SD2 | dict(adm_in_channels=1536, num_classes="sequential")
    monkeypatch.setitem(
        families.TABLE, "unclip", Family("SD21UnclipL", config, 64, latent=(4, 16, 16), overrides=HEADS_OF_32)
    )
    model, vision = make("unclip"), Vision(768)
    conditioning = run(
        ImageConditioning, model=model, clip=Clip("unclip"), clip_vision=vision, images=image(), alpha=0.0, seed=0
    )
    y = extra(model, conditioning, torch.zeros(1, 4, 16, 16))["y"]
    assert torch.nn.functional.cosine_similarity(y[:, :768], vision.encode_image(image())["image_embeds"]).item() > 0.99


def test_stable_cascade_takes_the_picture_as_clip_img():
    cond = nodes.CascadeSlot(None)(
        {"cross_attn": torch.zeros(1, 2, 4), "pooled_output": torch.zeros(1, 4)}, torch.full((1, 768), 0.5)
    )
    made = comfy.model_base.StableCascade_C.extra_conds(None, **cond)
    assert made["clip_img"].cond.shape == (1, 1, 768) and float(made["clip_img"].cond.mean()) == 0.5


def test_flux_takes_the_tokens_of_redux_after_those_of_the_text():
    model, vision = make("flux"), Vision(16)
    style = comfy.sd.StyleModel(ReduxImageEncoder(redux_dim=16, txt_in_features=64))
    for p in style.model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    conditioning = run(
        ImageConditioning,
        model=model,
        clip=Clip("flux"),
        clip_vision=vision,
        images=image(),
        style_model=style,
        alpha=0.0,
        seed=0,
    )
    empty = Clip("flux").encode_from_tokens_scheduled(Clip("flux").tokenize(""))[0][0]
    assert torch.equal(conditioning[0][0][:, : empty.shape[1]], empty)
    torch.testing.assert_close(
        conditioning[0][0][:, empty.shape[1] :], style.get_cond(nodes.ClipVisionOutput(**vision.encode_image(image())))
    )


def test_several_pictures_are_averaged():
    vision, model = Vision(1280), make("sdxl")
    both = torch.cat([image(1.0), image(0.0)])
    conditioning = run(
        ImageConditioning, model=model, clip=Clip("sdxl"), clip_vision=vision, images=both, alpha=0.0, seed=0
    )
    torch.testing.assert_close(
        conditioning[0][1]["pooled_output"], vision.encode_image(both)["image_embeds"].mean(0, keepdim=True)
    )


# -- training ----------------------------------------------------------------------------------------------------------


WIDGETS = dict(alpha=0.25, drop=0.1, variants=3, seed=0)


def test_a_lora_learns_from_pictures_without_captions(coloured):
    dataset, encoded = coloured("sdxl")
    model = make("sdxl", inference=True)
    before = fingerprint(model)
    vision = Vision(1280)
    told = run(
        CaptionsFromImages,
        model=model,
        clip=Clip("sdxl"),
        clip_vision=vision,
        dataset=dataset,
        encoded=encoded,
        **WIDGETS,
    )
    assert told.dropout == 0.1 and told.fingerprint != encoded.fingerprint
    with torch.inference_mode(), host.session.open_training_session(model, RANK_4) as session:
        loss = LoraTraining(
            session.denoiser, session.adapters, told, NoiseSettings(), session.family.density, batch=2
        ).loss(step_rng(0, 0))
        loss.sum().backward()
        assert loss.isfinite().all()
    assert fingerprint(model) == before


def test_each_picture_has_its_own_embedding_in_several_noises_that_do_not_depend_on_its_neighbours(coloured):
    dataset, encoded = coloured("sdxl")
    given = dict(model=make("sdxl"), clip=Clip("sdxl"), clip_vision=Vision(1280), dataset=dataset)
    told = run(CaptionsFromImages, encoded=encoded, **given, **WIDGETS)
    pooled = [[told.store.load(key)["pooled_output"] for key in item.caption_keys] for item in told.items]
    cosine = lambda a, b: torch.nn.functional.cosine_similarity(a, b).item()
    assert len(pooled[0]) == 3 and not torch.equal(pooled[0][0], pooled[0][1])
    assert cosine(pooled[0][0], pooled[0][1]) > 0.85 > cosine(pooled[0][0], pooled[1][0])
    encoded.items = encoded.items[1:]
    alone = run(CaptionsFromImages, encoded=encoded, **given, **WIDGETS)
    assert torch.equal(alone.store.load(alone.items[0].caption_keys[2])["pooled_output"], pooled[1][2])
    assert torch.equal(
        told.store.load(told.empty_key)["pooled_output"],
        Clip("sdxl").encode_from_tokens_scheduled({"l": [[""]]})[0][1]["pooled_output"],
    )


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd15", "sd3", "lumina2", "chroma"])
def test_a_model_without_a_place_for_pictures_is_told_which_ones_have(family):
    with pytest.raises(
        ValueError, match=r"has no place for an image embedding.*SDXL .*unCLIP, Stable Cascade stage C, and Flux\.1"
    ) as error:
        find_embedding_slot(make(family))
    assert "empty (unconditional)" in str(error.value)


def test_another_clip_vision_than_the_family_wants_is_refused():
    with pytest.raises(
        ValueError, match="gives 768 numbers per image, and the MODEL expects 1280: load CLIP-ViT-bigG-14"
    ):
        run(
            ImageConditioning,
            model=make("sdxl"),
            clip=Clip("sdxl"),
            clip_vision=Vision(768),
            images=image(),
            alpha=0.0,
            seed=0,
        )


def test_flux_without_redux_and_redux_without_flux_are_refused():
    with pytest.raises(ValueError, match="Load one with Load Style Model"):
        find_embedding_slot(make("flux"))
    with pytest.raises(ValueError, match=r"only Flux.1 reads one: this MODEL is SDXL. Disconnect it"):
        find_embedding_slot(make("sdxl"), object())


def test_pictures_that_were_not_encoded_from_this_dataset_are_named(coloured):
    dataset, encoded = coloured("sdxl")
    encoded.items = [nodes.dataclasses.replace(encoded.items[0], id="else", path="else.png")]
    with pytest.raises(ValueError, match=r"1 encoded images are not in the dataset, for example else.png"):
        run(
            CaptionsFromImages,
            model=make("sdxl"),
            clip=Clip("sdxl"),
            clip_vision=Vision(1280),
            dataset=dataset,
            encoded=encoded,
            **WIDGETS,
        )
