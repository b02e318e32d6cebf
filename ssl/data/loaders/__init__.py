"""Images -> batches, each decoded once for all its views."""
