"""Stores on other machines.

parts    what they have in common: documents read in parts, ahead of the pass; servers that go away and come back
object   any object store: S3 and what speaks like it, Google Cloud Storage, Azure, a folder, a web server
redis    Redis and Valkey
"""
