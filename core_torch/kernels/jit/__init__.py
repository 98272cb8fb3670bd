"""Triton kernels: import these modules only where Triton is; `triton_kernels` compiles and launches them."""
