"""Teachers that misbehave, for `python:strange_teachers:NAME`. They tell tasks apart by how often they were called."""
