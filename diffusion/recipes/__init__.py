"""What joins a recipe with the mathematics: its teacher, its device, its grid, and what a sample id draws."""
