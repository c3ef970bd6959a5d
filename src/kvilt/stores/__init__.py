"""Where document caches are kept: blobs of bytes, under a catalogue of what is known of them.

blobs      the contract that every store meets
memory, disk, tiered   blobs in memory, in a folder (`files`: its system calls), and in several stores behind one another
catalogue  budgets, quotas, pins, time to live, uses, totals: in a `database` that can be deleted at any time
entry      what is known of one document
policy, sizes   who has to go when a store is full, and sizes as people write them
store      the Store of document caches that the engine uses
"""
