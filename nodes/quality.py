"""What is wrong with which picture, and which pictures are the same."""

NODES: list = []
