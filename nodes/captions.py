"""Captions edited by rule and by hand, and what they look like as a whole."""

NODES: list = []
