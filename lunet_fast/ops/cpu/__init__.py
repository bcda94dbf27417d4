"""The operations of LU layers in fast PyTorch, for any device that PyTorch has.

Raw computations: no autograd, gradients are computed by hand. Rows are the batch: x, y and h are [N, D] and
contiguous. ``reference.py`` states the same formulas plainly. ``operations`` has the registered operations.
"""
