"""Convert audio and IPA labels into indexed tar shards bucketed by duration. Training code is never imported."""
