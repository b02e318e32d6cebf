"""Scores -> what people read: the pages of runs and of comparisons."""
