"""The shard set on disk or in a bucket: samples, indexes, stores."""
