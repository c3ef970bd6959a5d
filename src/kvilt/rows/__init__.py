"""What a document cache is made of.

rows     keys and values in memory, some rows or heads of others, and the rotation that puts keys where they are used
codec    keys and values in fewer bits
file     a document cache as bytes and back
header   what those bytes say of themselves, read without torch
adapter  low-rank adapters as files
files    files read by lines and written whole
"""
