"""What every training shares: the loop, checkpoints, run folders, seeds, several processes."""
