"""Split long recordings at pauses, and assign words to each segment."""
