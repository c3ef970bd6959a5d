"""Where document caches are kept: blobs of bytes, under a catalogue of what is known of them.

store      the Store of document caches that the engine uses
blobs      the contract that every kind of store meets
memory, disk, tiered   the kinds: in memory, in a `folder`, and several stores behind one another
remote     those on other machines: object stores, Redis
catalogue  budgets, quotas, pins, time to live, uses, totals: in a `database` that can be deleted at any time
entry      what is known of one document
sizes      sizes as people write them
"""
