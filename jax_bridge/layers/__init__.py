"""Flax layers of one rank: `core_torch.layers`, file by file."""
