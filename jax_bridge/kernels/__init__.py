"""Functions over JAX arrays that the layers are made of: `core_torch.kernels`, file by file."""
