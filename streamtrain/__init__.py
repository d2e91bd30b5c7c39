"""Plan, stream, train, evaluate: from a shard set to a CER. Builds on the lower rooms of sharding."""
