"""A run on the processes of this machine."""
