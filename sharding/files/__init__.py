"""Names, documents and files: read with limits, written whole or not at all, held by one process."""
