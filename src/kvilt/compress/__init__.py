"""Smaller document caches: shorter texts, fewer rows, fewer bits."""
