"""Bases: fit, file format, lookup."""
