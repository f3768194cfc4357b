"""What a run keeps on disk: its record, checkpoints, models, metrics and pins."""
