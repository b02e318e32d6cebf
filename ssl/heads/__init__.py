"""Tokens or features -> outputs."""
