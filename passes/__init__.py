"""FX analysis and rewriting."""
