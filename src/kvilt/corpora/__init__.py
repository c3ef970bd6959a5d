"""Corpora: documents as people have them, in any number."""
