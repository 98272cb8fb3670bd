"""The ways into a fused kernel, by name: `rendezvous` on CPU, `ffi` and `cupy` on GPUs. Same contract, same bits."""
