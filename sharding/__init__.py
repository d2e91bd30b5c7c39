"""Audio and IPA labels become tar shards bucketed by duration, with an index. Knows nothing of training."""
