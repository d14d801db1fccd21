"""Configurations of benchmarks/published.py are those that ComfyUI derives from a checkpoint of that size."""

import pytest
import torch
from trainyard.benchmarks import shapes
from trainyard.benchmarks.published import PUBLISHED

LEFT_TO_DEFAULTS = {"num_heads", "num_head_channels", "n_refiner_layers", "n_heads", "dim"}  # where detection is silent
BILLIONS = {"sd15": 0.86, "sdxl": 2.57, "sd3": 2.1, "sd35_medium": 2.5, "sd35_large": 8.1, "flux": 11.9, "chroma": 8.9, "zimage": 6.2,
            "lumina2": 2.6, "qwen": 20.4, "flux2": 32.2, "klein4b": 3.9, "klein9b": 9.1, "auraflow": 6.9, "hunyuan_video": 12.8,
            "hunyuan_video_1.5": 8.3, "wan_1.3b": 1.4, "wan_5b": 5.0, "wan_14b": 14.3}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_size_is_what_comfyui_finds_in_its_weights(comfy, name):
    """Weights without values, named and shaped as in a file."""
    from comfy import model_detection

    shape = PUBLISHED[name]
    weights = shapes.base_model(shape, torch.bfloat16, "meta").diffusion_model.state_dict()
    found = model_detection.detect_unet_config(weights, "")
    assert type(model_detection.model_config_from_unet_config(found)).__name__ == shape.family.supported
    unlike = {key: found.get(key) for key, value in shape.family.config.items() if found.get(key) != value}
    assert unlike.keys() <= LEFT_TO_DEFAULTS and set(unlike.values()) <= {None}
    count = sum(weight.numel() for weight in weights.values()) / 1e9
    assert count == pytest.approx(BILLIONS.get(name, count), rel=0.02)
