"""Density estimation with LUFlow: data, training, evaluation and files."""
