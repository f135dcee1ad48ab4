"""A run on disk: what it was asked for, what is done, and its record."""
