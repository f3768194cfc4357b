"""Progressive distillation as a pipeline: data from the last student, then the trainer, then promote."""
