"""Define the alphabet and the normal form of labels."""
