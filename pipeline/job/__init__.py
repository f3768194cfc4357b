"""What every job does: prepare, announce, adopt what is committed, have the rest made, seal."""
