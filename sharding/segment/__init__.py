"""Split long recordings at pauses, and decide which words each segment gets."""
