"""Decode, resample and encode audio, prove that files are whole, detect speech."""
