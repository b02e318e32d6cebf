"""Files that are whole or not there, locks, text and YAML read within bounds, digests."""
