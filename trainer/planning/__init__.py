"""The plan of a fit: where it starts, on which samples, in which stages."""
