"""Triton kernels: import these modules only where Triton is (`triton_kernels.require_jit`)."""
