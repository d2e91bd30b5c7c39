"""Train: set up a run, step, evaluate, checkpoint, mirror, log."""
