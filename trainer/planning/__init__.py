"""What a fit is going to do: where it starts, on which samples, in which stages."""
