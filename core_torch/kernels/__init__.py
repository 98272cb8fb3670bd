"""Kernels and workspaces, without the engine: the only part of `core_torch` that `jax_bridge` may import."""
