"""Score a model: exact corpus error rates, the scorecard, comparisons."""
