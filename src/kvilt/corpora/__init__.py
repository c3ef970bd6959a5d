"""Around documents: reading what people have, cutting it, finding it again; and whole corpora, encoded, moved and priced."""
