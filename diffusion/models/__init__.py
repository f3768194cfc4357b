"""Networks by family, their specs and checkpoints, and teachers by URI: what is a model."""
