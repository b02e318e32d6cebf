"""Images -> frozen features, in memory and on disk."""
