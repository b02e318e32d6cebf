"""Pictures of what a network sees: attention, tokens as colors, sheets of neighbors, masks and views."""
