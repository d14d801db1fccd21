"""Several pictures in one frame, so that patterns are learnt relative to the frame."""

NODES: list = []
