"""Denoisers over models that live outside ComfyUI."""
