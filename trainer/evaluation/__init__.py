"""Contenders, their numbers of network calls, and the measures that compare them."""
