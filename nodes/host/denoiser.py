"""A loaded MODEL as trainers.diffusion.Denoiser."""

from __future__ import annotations

import math

import comfy.lora
import torch

from ...trainers.data.cache import TensorRecord
from ...trainers.data.encoded import CLIP_VISION_OUTPUT, CONCAT_IMAGE, REFERENCE_LATENTS
from ...trainers.memory.transfer import copy_to_device
from .context import clone_inference_tensors
from .families import ModelFamily

# Classes of the host whose code mixes the rows of a batch: ACE-Step 1.5 gives the timbre of every row to the first one,
# and SeedVR2's rows differ by 6e-4 from what they are alone. They are asked for one row at a time.
MIXING_ROWS = {"ACEStep15", "SeedVR2"}


class ComfyDenoiser:
    """trainers.diffusion.Denoiser over a ModelPatcher that is loaded and attached."""

    def __init__(self, patcher, family: ModelFamily):
        self.patcher, self.model, self.family = patcher, patcher.model, family
        self.device = patcher.load_device
        self.sigma_max = float(self.sampling.sigma_max)  # read once and here: a step would wait for it
        self.max_batch_numel = 0  # numbers in the largest batch so far, latents and control images
        self.transformer_options = self._make_transformer_options()
        self.mixes_rows = any(cls.__name__ in MIXING_ROWS for cls in type(self.model).__mro__)

    def _make_transformer_options(self):
        options = comfy.model_patcher.create_model_options_clone(self.patcher.model_options).get(
            "transformer_options", {}
        )
        comfy.patcher_extension.merge_nested_dicts(
            options.setdefault("wrappers", {}), self.patcher.wrappers, copy_dict1=False
        )
        return options

    @property
    def sampling(self):
        return self.model.model_sampling

    @property
    def flow(self) -> bool:
        return isinstance(self.sampling, comfy.model_sampling.CONST)

    @property
    def prediction(self) -> str:
        """What the network predicts, in the words of modelspec."""
        kinds = comfy.model_sampling
        return (
            "flow"
            if self.flow
            else "v"
            if isinstance(self.sampling, (kinds.V_PREDICTION, kinds.V_PREDICTION_DDPM))
            else "epsilon"
        )

    def model_space(self, latent):
        latent = latent.to(torch.float32)
        if latent.ndim == 4 and self.model.latent_format.latent_dimensions == 3:
            latent = latent.unsqueeze(2)  # an image is a video of one frame
        latent = self.model.process_latent_in(latent)  # on the CPU: some formats bring numbers along
        return copy_to_device(latent, self.device)

    def noised(self, x0, noise, sigma):
        return self.sampling.noise_scaling(sigma, noise, x0)

    def sigma_at(self, u):
        """Discrete schedules train on their own integer timesteps: the network never saw a sigma between two of
        them. A flow that is written as sigma = t / (1 - t), and a v model on the angle, are trained in t and not in the
        logarithm of sigma, in which the host samples."""
        ms = self.sampling
        if is_discrete_schedule(ms):
            steps = len(ms.sigmas)
            index = (u * steps).floor().long().clamp(0, steps - 1)
            return ms.sigmas[copy_to_device(index, ms.sigmas.device)].float()
        if (sigmas := sigmas_of_training_time(ms, u)) is not None:
            return sigmas.clamp(float(ms.sigma_min), self.sigma_max)
        return torch.tensor([float(ms.percent_to_sigma(min(1 - float(v), 1 - 1e-6))) for v in u]).clamp(
            max=self.sigma_max
        )

    def native_scale(self, sigma):
        one = torch.ones(len(sigma), 1, device=sigma.device)
        return self.sampling.calculate_denoised(sigma, one, torch.zeros_like(one)).abs().flatten()

    def denoise(self, x, sigma, conds):
        """x0 for each row i under cond i. (The host's own list of conds would predict every row under all of them and
        average.)"""
        shown = sum(latent.numel() for cond in conds for latent in cond.get(REFERENCE_LATENTS, ()))
        self.max_batch_numel = max(self.max_batch_numel, x.numel() + shown)
        rows = [self._model_inputs(cond, x[i : i + 1]) for i, cond in enumerate(clone_inference_tensors(conds))]
        sigma = copy_to_device(sigma, x.device)
        found = {}
        for group in [[i] for i in range(len(rows))] if self.mixes_rows else group_concatenable_conds(rows):
            part = self._apply_model(take_rows(x, group), take_rows(sigma, group), [rows[i] for i in group])
            found.update(zip(group, part.split(1), strict=True))
        return torch.cat([found[i] for i in range(len(rows))])

    def _model_inputs(self, cond, x):
        """The host's own model inputs for one caption: extra_conds adds size conditioning, guidance, masks."""
        cond = {"guidance": self.family.guidance, **cond} if self.family.guidance is not None else cond
        cond = place_references(self.model, cond)
        inputs = self.model.extra_conds(**{**describe_sampling(x), **cond})
        return {k: v.process_cond(batch_size=1, area=None) for k, v in inputs.items()}

    def _apply_model(self, x, sigma, rows):
        inputs = {name: copy_input(value, x.device) for name, value in comfy.samplers.cond_cat(rows).items()}
        options = {**self.transformer_options, "cond_or_uncond": [0] * len(x), "sigmas": sigma, "sample_sigmas": sigma}
        return self.model.apply_model(x, sigma, transformer_options=options, **inputs)


def copy_input(value, device):
    """An input of the network on the device: a tensor, or a list of some, as the latents of control images are."""
    if isinstance(value, list):
        return [copy_input(each, device) for each in value]
    return copy_to_device(value, device) if torch.is_tensor(value) else value


def describe_sampling(x) -> dict:
    """What the host's `extra_conds` is told of a latent that is sampled, beside the conditioning."""
    empty = torch.zeros_like(x)  # the latent that is drawn on; some models take it for their first frame
    about = dict(device=x.device, noise=x, latent_image=empty, seed=0, prompt_type="positive")
    return about | dict(width=x.shape[-1] * 8, height=x.shape[-2] * 8)


def place_references(model, cond: dict) -> dict:
    """The conditioning with images as this model looks for them. InstructPix2Pix and its like see the latent of the
    first control image joined to the noise, channel by channel; others see all of them as tokens of their own."""
    if isinstance(cond.get(CLIP_VISION_OUTPUT), dict):  # as the cache keeps it
        cond = {**cond, CLIP_VISION_OUTPUT: TensorRecord(cond[CLIP_VISION_OUTPUT])}
    if REFERENCE_LATENTS not in cond or not joins_references_to_noise(model):
        return cond
    rest = {name: value for name, value in cond.items() if name != REFERENCE_LATENTS}
    return {**rest, CONCAT_IMAGE: cond[REFERENCE_LATENTS][0]}


def joins_references_to_noise(model) -> bool:
    return isinstance(model, comfy.model_base.IP2P) or "concat_image" in model.concat_keys


def takes_references(model, cond: dict, shape) -> bool:
    """Whether control images make a difference to this model. `cond`: a conditioning that has some; `shape`: (C, ...,
    h, w) of a latent."""
    if joins_references_to_noise(model):
        return True
    x = torch.zeros(1, *shape)
    x = x.unsqueeze(2) if x.ndim == 4 and model.latent_format.latent_dimensions == 3 else x
    about = describe_sampling(x)
    without = {name: value for name, value in cond.items() if name != REFERENCE_LATENTS}
    return model.extra_conds(**{**about, **cond}).keys() != model.extra_conds(**{**about, **without}).keys()


def joins_first_frame(model, cond: dict, shape) -> bool:
    """Whether this model looks at the first frame in a conditioning. `shape`: (C, ..., h, w) of a latent."""
    return "c_concat" in model.extra_conds(
        **{**describe_sampling(torch.zeros(1, *shape)), **place_references(model, cond)}
    )


def take_rows(x, group: list[int]):
    """Rows of x, copied. `x[group]` would send the indices to the device first, and wait for it."""
    return torch.cat([x[i : i + 1] for i in group])


def is_discrete_schedule(ms) -> bool:
    kinds = comfy.model_sampling
    return isinstance(ms, kinds.ModelSamplingDiscrete) and not isinstance(
        ms, (kinds.ModelSamplingDiscreteEDM, kinds.StableCascadeSampling)
    )


def sigmas_of_training_time(ms, u):
    """(B,) -> (B,) sigmas for training times u, or None where these are the schedule's own."""
    u = u.float().clamp(0, 1 - 1e-6)
    if isinstance(ms, comfy.model_sampling.COSMOS_RFLOW):
        return u / (1 - u)
    if isinstance(ms, comfy.model_sampling.ModelSamplingContinuousV):
        return (u * math.pi / 2).tan()
    return None


def group_concatenable_conds(rows) -> list[list[int]]:
    """Indices of rows whose conditionings fit into one batch; different token counts may need several."""
    groups: list[list[int]] = []
    for i, row in enumerate(rows):
        for group in groups:
            first = rows[group[0]]
            if first.keys() == row.keys() and all(first[k].can_concat(row[k]) for k in row):
                group.append(i)
                break
        else:
            groups.append([i])
    return groups
