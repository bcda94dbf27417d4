"""Recommendation on rating data: reading it, splitting it, the LU-Net model and its training."""
