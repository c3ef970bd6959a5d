"""A transformers model that encodes documents, runs plans, probes and decodes. It knows nothing of text or stores.

loading    a model from a folder or the hub, proved before it serves
model      encode documents, run plans
placing    the buffer of a running plan: reused rows are read into it, keys rotated, answers appended
attention  attention under a plan's mask, without a mask where possible
decoding   an answer's tokens after a plan
probe      the passes that a strategy may run before it decides
rope       which rotation a model's keys have; support: which models are refused; identity, proof: what was run, and is it right
"""
