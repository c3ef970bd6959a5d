"""What a document cache is made of: rows, codecs, and the file format over bytes; files.py reads and writes files whole."""
