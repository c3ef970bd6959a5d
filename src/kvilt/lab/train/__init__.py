"""Trainers: wrappers for frozen models (KV Packet, linked packet) and whole models (KVLink, block fine-tuning)."""
