"""Build a shard set from sources: scan, split, plan, write, publish, verify."""
