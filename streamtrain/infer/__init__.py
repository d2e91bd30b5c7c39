"""Use a trained model: transcribe, align, export."""
