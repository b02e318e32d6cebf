"""A run on disk: its folder, log and messages, its checkpoints, and how it continues from them."""
