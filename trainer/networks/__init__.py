"""The networks of a fit: the student, and those beside it."""
