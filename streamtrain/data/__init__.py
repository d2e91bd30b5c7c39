"""Plan an epoch and stream its batches to the ranks."""
