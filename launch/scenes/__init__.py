"""The scenes that the demo draws: digits on textured backgrounds."""
