"""Plan, stream, train, evaluate: from a shard set to a CER. Stands on sharding.{format, store, ipa, audio}."""
