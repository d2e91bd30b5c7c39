"""The alphabet and the normal form of labels."""
