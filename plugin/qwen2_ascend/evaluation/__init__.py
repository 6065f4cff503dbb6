"""Evaluation: perplexity of a text, and the tasks of lm-eval, at any layout."""
