"""What a document cache is made of: rows, codecs, and the file format over bytes."""
