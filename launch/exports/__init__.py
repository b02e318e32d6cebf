"""A backbone in the formats of other programs: each is loaded again and compared before it gets its name."""
