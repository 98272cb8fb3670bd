"""`python -m jax_bridge parity`: how equal the two engines are, level by level.

tolerances.py   how equal they have to be, by dtype, and why
compare.py      two engines' records -> one result a level
report.py       results as text, JSON and a plot
run.py          both engines on one job; PyTorch's in a process of its own

The levels, in the order in which a fault is looked for: the op, the layers, the logits, the greedy continuation, the
counts of fused reductions.
"""
