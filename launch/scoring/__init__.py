"""Scores, figures and report of a run, as its command and a job make them."""
