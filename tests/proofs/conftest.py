"""Proofs train inside real ComfyUI. After this file `import comfy...` works at the top of a test module."""

from trainyard.tests.comfy.boot import COMFYUI, boot

if COMFYUI is not None:
    boot()
