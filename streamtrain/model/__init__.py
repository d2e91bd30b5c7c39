"""The network, its vocabulary and its decoding."""
