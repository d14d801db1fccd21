"""What an image-to-video model is given of the first frame of a clip: by the host's own node for it, so that training
and sampling see the same numbers."""

from __future__ import annotations

import contextlib

import comfy.model_management as mm
import torch

from .encoders import FIRST_FRAME_NODES, NO_FIRST_FRAME
from .identity import hash_patched_weights
from .progress import raise_if_interrupted

SEEN_TENSORS = ("last_hidden_state", "image_embeds", "penultimate_hidden_states", "mm_projected")


class FirstFrames:
    """trainers.data's door for first frames: one of the host's nodes over a loaded VAE, and a loaded CLIP_VISION where
    the model also sees the frame through one."""

    def __init__(self, node: str, vae, clip_vision=None):
        if node not in FIRST_FRAME_NODES:
            raise ValueError(f"first_frame is {node!r}; choose one of {', '.join(FIRST_FRAME_NODES)}.")
        self.node, self.vae, self.clip_vision = node, vae, clip_vision
        seen = hash_patched_weights(clip_vision.patcher) if clip_vision is not None else ""
        self.identity = f"{node} {hash_patched_weights(vae.patcher)} {seen}"

    def make_condition(self, first: torch.Tensor, frames: int) -> dict:
        """concat_latent_image and concat_mask, as the node writes them; clip_vision_output as a dict of tensors."""
        raise_if_interrupted()
        with torch.no_grad():
            found = run_first_frame_node(self.node, self.vae, first, frames)
            if self.clip_vision is not None:
                found["clip_vision_output"] = tensors_of_output(self.clip_vision.encode_image(first, crop=False))
        return found


def run_first_frame_node(node: str, vae, first: torch.Tensor, frames: int) -> dict:
    from comfy_extras import nodes_hunyuan, nodes_wan

    height, width = first.shape[1:3]
    empty = [[torch.zeros(1, 1, 1), {}]]
    size = dict(width=width, height=height, length=frames, batch_size=1)
    if node == "HunyuanImageToVideo":
        made = nodes_hunyuan.HunyuanImageToVideo.execute(
            empty, vae, **size, guidance_type="v1 (concat)", start_image=first
        )
    else:
        home = nodes_wan if node == "WanImageToVideo" else nodes_hunyuan
        made = getattr(home, node).execute(empty, empty, vae, **size, start_image=first)
    return dict(made.args[0][0][1])


def tensors_of_output(seen) -> dict:
    return {name: value for name in SEEN_TENSORS if torch.is_tensor(value := getattr(seen, name, None))}


def make_first_frames(node: str, vae, clip_vision=None) -> FirstFrames | None:
    """None where clips come without a condition."""
    if node != NO_FIRST_FRAME:
        return FirstFrames(node, vae, clip_vision)
    if clip_vision is not None:
        raise ValueError(
            f"CLIP_VISION is connected and first_frame is {NO_FIRST_FRAME!r}. Choose the node that you draw with, or "
            "disconnect it."
        )
    return None


@contextlib.contextmanager
def unloaded_afterwards(clip_vision):
    try:
        yield
    finally:
        if clip_vision is not None:
            mm.unload_model_and_clones(clip_vision.patcher)
