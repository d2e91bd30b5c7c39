"""Build the challenge's submission: a zip, the main.py in it, and its rehearsal."""
