"""Documents to caches, questions to answers."""
