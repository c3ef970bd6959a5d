"""A transformers model that encodes documents, runs plans, probes and decodes. It knows nothing of text or stores."""
