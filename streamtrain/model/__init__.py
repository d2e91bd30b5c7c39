"""Hold the network, its vocabulary and its decoding."""
