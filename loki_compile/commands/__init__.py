"""The command `loki`. One file per command (main.py lists them); what several share is in options,
output, measure, models and reference_data. Of the package only this room knows transformers.

Files of commands import PyTorch inside functions: `--help` and `bases list` do not wait for it.
"""
