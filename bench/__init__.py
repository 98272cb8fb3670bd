"""What the fused all-reduce gives here, in PyTorch and in JAX, and how far that is from the hardware's limit.

    python -m bench op       the reduction alone: every way to run it, by number of tokens
    python -m bench model    the whole model: prefill and decode, fused and not, beside the roofline
    python -m bench all      both
    python -m bench compare A.json B.json

Read `__main__.py` (commands), `result.py` (what is written), `torch_op.py` and `torch_model.py` (what is timed),
`floor.py` (the arithmetic of the limit). Each framework is measured in processes of its own (`launch.py`), so that
none of them holds memory that another one needs; the parent imports neither.
"""
