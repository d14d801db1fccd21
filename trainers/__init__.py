"""The craft of training: torch only, nothing of ComfyUI."""
