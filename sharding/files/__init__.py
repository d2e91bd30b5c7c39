"""Read documents within limits, write files completely or not at all, lock files, and normalise names."""
