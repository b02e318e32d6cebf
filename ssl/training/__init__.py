"""A run while it trains: what it is set up with, what it learns from images with and without labels."""
