"""What a family is trained with by default, read off ComfyUI's own classes without a network."""

import math

import comfy.model_patcher
import comfy.patcher_extension
import comfy.supported_models
import pytest
import torch
from trainyard.nodes import host
from trainyard.nodes.host.families import FAMILY_KEYS, TESTED_CLASSES, find_model_family
from trainyard.tests.comfy import families
from trainyard.trainers.diffusion import (
    density_quantile,
    resolve_noise_density,
    sample_sigmas,
    shift_for_latents,
)
from trainyard.trainers.families import MODEL_FAMILIES
from trainyard.trainers.settings import NoiseSettings

SD = dict(in_channels=4, use_temporal_attention=False)
VIDEO = dict(in_channels=16, guidance_embed=True)


class Loaded:
    """A model of a class of ComfyUI without its network, as far as a family needs it."""

    def __init__(self, supported, **config):
        settings = getattr(comfy.supported_models, supported)
        self.config = settings({**settings.unet_config, **config})
        self.config.unet_config["disable_unet_model_creation"] = True
        self.model = self.config.get_model({})
        self.sampling = self.model.model_sampling
        self.family = find_model_family(self.config, self.sampling)
        self.model.current_patcher = None

    model_options = {}
    wrappers = {}
    load_device = torch.device("cpu")

    @property
    def denoiser(self):
        return host.denoiser.ComfyDenoiser(self, self.family)

    def shift(self, *shape):
        return shift_for_latents(self.family.density, torch.zeros(shape))


FLUX_2_DEV = dict(hidden_size=6144, guidance_embed=True, in_channels=128, out_channels=128)
KLEIN = dict(hidden_size=4096, guidance_embed=False, in_channels=128, out_channels=128)


@pytest.mark.parametrize("supported, config, latent, shift", [
    ("Flux", {}, (1, 16, 128, 128), math.exp(1.15)),
    ("Flux2", FLUX_2_DEV, (1, 128, 64, 64), math.exp(1.15)),  # 4096 tokens at 1024 px: one per latent cell
    ("Flux2", KLEIN, (1, 128, 32, 32), math.exp(0.5 + 0.65 * 768 / 3840)),
    ("HunyuanVideo15", VIDEO, (1, 32, 1, 60, 60), 2.0),
    ("Krea2", {}, (1, 16, 1, 128, 128), math.exp(0.5 + 0.65 * 3840 / 6144)),  # 2.5 at 1024 px
    ("Kandinsky5", {}, (1, 16, 1, 64, 64), 5.0),
    ("Kandinsky5Image", {}, (1, 16, 128, 128), 3.0),  # the host's own
    ("LTXV", {}, (1, 128, 1, 32, 32), math.exp(0.95)),
    ("LTXV", {}, (1, 128, 4, 32, 32), math.exp(2.05)),  # frames count
    ("LTXAV", {}, (1, 128, 13, 32, 32), math.exp(2.37)),
    ("Ideogram4", {}, (1, 128, 64, 64), 2.0),
    ("HunyuanImage21", {}, (1, 64, 32, 32), 5.0),
    ("HunyuanImage21Refiner", {}, (1, 64, 1, 32, 32), 4.0),
    ("HiDream", {}, (1, 16, 128, 128), 3.0),
    ("Anima", {}, (1, 16, 1, 128, 128), 1.0),
    ("GenmoMochi", {}, (1, 12, 1, 60, 60), 6.0),  # without a row: the host's own from here on
    ("Lens", {}, (1, 128, 64, 64), math.exp(1.829)),
    ("LongCatImage", {}, (1, 16, 128, 128), math.exp(1.15)),
    ("ErnieImage", {}, (1, 128, 64, 64), 3.0),
    ("MageFlow", {}, (1, 128, 64, 64), 6.0),
    ("MiniMaxH3", {}, (1, 32, 1, 32, 32), 12.0),
    ("CosmosT2IPredict2", {}, (1, 16, 1, 128, 128), 1.0),
])  # fmt: skip
def test_noise_levels_are_shifted_as_the_family_was_trained_or_as_the_host_samples_it(supported, config, latent, shift):
    assert Loaded(supported, **config).shift(*latent) == pytest.approx(shift, rel=1e-3)


@pytest.mark.parametrize("supported, config", [("PixArtAlpha", {}), ("PixArtSigma", {}), ("HunyuanDiT", {}), ("HunyuanDiT1", {}),
                                               ("CogVideoX_T2V", {}), ("SDXLRefiner", {}), 
                                               ("Stable_Cascade_C", {}), ("HiDreamO1", {}), ("SVD_img2vid", {})])  # fmt: skip
def test_discrete_and_other_schedules_are_trained_evenly(supported, config):
    assert Loaded(supported, **config).family.density.kind == "uniform"


def test_predict2_is_trained_in_the_time_of_its_flow_and_not_in_the_logarithm_of_sigma():
    """ln(sigma) is normal: half the levels lie below 1, 84 % below e. In the host's own spacing they lay below 0.4."""
    loaded = Loaded("CosmosT2IPredict2")
    quantiles = torch.tensor([0.1587, 0.5, 0.8413], dtype=torch.float64)
    sigma = loaded.denoiser.sigma_at(density_quantile(loaded.family.density, quantiles))
    assert sigma.tolist() == pytest.approx([math.exp(-1), 1.0, math.exp(1)], rel=1e-3)
    assert loaded.denoiser.sigma_at(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.002, 80.0])
    drawn = sample_sigmas(
        loaded.denoiser, loaded.family.density, torch.zeros(4000, 1), torch.Generator().manual_seed(0)
    )
    assert float(drawn.median()) == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("supported, config, guidance, distilled", [
    ("Flux", {"guidance_embed": True}, 1.0, True),
    ("FluxSchnell", {"guidance_embed": False}, None, True),
    ("FluxInpaint", {"guidance_embed": True}, 1.0, True),
    ("Flux2", FLUX_2_DEV, 1.0, True),
    ("Flux2", KLEIN, None, False),
    ("HunyuanVideo", {"guidance_embed": True}, 1.0, True),
    ("HunyuanVideo15", {"guidance_embed": False}, None, False),
    ("HunyuanImage21", {"guidance_embed": False}, None, False),
    ("HunyuanImage21", {"guidance_embed": True}, 1.0, True),
    ("Chroma", {}, 0.0, False),
])  # fmt: skip
def test_only_a_model_that_takes_guidance_as_an_input_draws_without_classifier_free_guidance(
    supported, config, guidance, distilled
):
    family = Loaded(supported, **config).family
    assert (family.guidance, family.guidance_distilled) == (guidance, distilled)


@pytest.mark.parametrize("supported, config, base, architecture", [
    ("Flux2", FLUX_2_DEV, "flux_2_dev", "Flux.2-dev"),
    ("Flux2", KLEIN | {"hidden_size": 3072}, "flux_2_klein_4b", "Flux.2-klein-4b"),
    ("Flux2", KLEIN, "flux_2_klein_9b", "Flux.2-klein-9b"),
    ("Krea2", {}, "krea2", "Krea-2"),
    ("HunyuanVideo15", VIDEO, "hunyuan_video_1_5", "hunyuan-video-1.5"),
    ("HunyuanImage21", {}, "hunyuan-image-2.1", "hunyuan-image-2.1"),
    ("Kandinsky5", {}, "kandinsky5", "Kandinsky-5"),
    ("HiDreamO1", {}, "hidream_o1_image", "HiDream-O1-Image"),
    ("Ideogram4", {}, "ideogram4", "Ideogram-4"),
    ("SSD1B", SD, "ssd_1b", "ssd-1b"),
    ("PixArtSigma", {}, "pixart_sigma", "pixart-sigma"),
    ("WAN21_Vace", {}, "wan", "wan"),
    ("LongCatImage", {}, "longcatimage", "longcatimage"),
    ("Omnigen2", {}, "omnigen2", "omnigen2"),
])  # fmt: skip
def test_a_file_is_labelled_with_the_model_it_was_trained_on(supported, config, base, architecture):
    family = Loaded(supported, **config).family
    assert (family.base_version, family.architecture) == (base, architecture)


@pytest.mark.parametrize("child, config", [("FluxInpaint", {}), ("Flux2", KLEIN), ("HunyuanVideoI2V", {}), ("SSD1B", SD),
                                           ("WAN21_I2V", {}), ("SD15_instructpix2pix", {}), ("ChromaRadiance", {}),
                                           ("ZImagePixelSpace", {})])  # fmt: skip
def test_a_relative_of_a_tested_class_has_its_gradients_checked(child, config):
    assert not Loaded(child, **config).family.known


def test_every_class_that_is_called_tested_is_in_the_table_of_tiny_models_and_no_other():
    assert {row.supported for row in families.TABLE.values()} == TESTED_CLASSES
    assert all(
        find_model_family(families.base_model(families.TABLE[n], torch.float32).model_config).known
        for n in ("sd3", "anima")
    )


def test_every_row_belongs_to_a_class_of_comfyui():
    assert [name for name in FAMILY_KEYS if not hasattr(comfy.supported_models, name)] == []
    assert MODEL_FAMILIES.keys() - FAMILY_KEYS.values() == {"flux2_klein_4b", "flux2_klein_9b"}


def test_a_shift_of_ones_own_is_kept_and_another_density_keeps_the_family_s_shift():
    density = Loaded("Flux2", **KLEIN).family.density
    assert resolve_noise_density(NoiseSettings(shift=7.0), density).shift == 7.0
    other = resolve_noise_density(NoiseSettings(density="uniform"), density)
    assert shift_for_latents(other, torch.zeros(1, 128, 64, 64)) == pytest.approx(math.exp(1.15))
    assert density.fingerprint() != Loaded("Flux").family.density.fingerprint()


def test_a_model_sampling_node_sets_the_shift_of_a_family_without_a_recipe():
    loaded = Loaded("ErnieImage")
    loaded.sampling.set_parameters(shift=5.0)
    assert find_model_family(loaded.config, loaded.sampling).density.shift == pytest.approx(5.0)
    assert host.families.host_shift(Loaded("PixArtSigma").sampling) == 1.0
