"""Read, write and verify a shard set on disk or in a bucket: samples, indexes, stores."""
