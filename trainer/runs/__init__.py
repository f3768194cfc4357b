"""A run on disk: its record, checkpoints, models, metrics and pins."""
