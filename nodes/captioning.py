"""Captions written by models that see, by taggers, or by plain rules."""

NODES: list = []
