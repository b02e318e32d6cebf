"""The verbs of the command line: their flags, and what each asks for."""
