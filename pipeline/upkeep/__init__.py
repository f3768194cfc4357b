"""A store over the years: other layouts, what was lost, what may go."""
