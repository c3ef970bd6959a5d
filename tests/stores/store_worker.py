"""Processes that write into one store; run as a script so that they can be killed for real.

store_worker.py fill PATH FIRST LAST SHUFFLE   put documents FIRST..LAST and print how many were new
store_worker.py killed PATH ROUNDS             kill -9 a writing child ROUNDS times, each a little later
store_worker.py claim PATH SEED                claim a document, say so, and wait to be killed
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time

import torch
from kvilt.stores.disk import DiskStore
from store_kit import make_cache, make_key, same


def fill(path: str, first: str, last: str, shuffle: str) -> None:
    store, seeds, made = DiskStore(path), list(range(int(first), int(last))), 0
    random.Random(int(shuffle)).shuffle(seeds)
    for seed in seeds:
        key = make_key(seed).digest
        if not store.contains([key]) and store.claim(key):
            made += not store.contains([key])
            store.put(make_cache(seed, rows=200))
            store.release(key)
        found = store.get(make_key(seed))
        assert found is None or same(found, make_cache(seed, rows=200))
    store.close()
    print(made)


def killed(path: str, rounds: str) -> None:
    for turn in range(int(rounds)):
        child = os.fork()
        if child == 0:
            store = DiskStore(path, budget="6MB")
            for seed in range(turn % 3, 10**6):
                store.put(make_cache(seed % 40, rows=2000))
                store.get(make_key(seed % 7))
                store.pin(make_key(seed % 5).digest, seed % 2 == 0)
        time.sleep(0.02 + 0.013 * turn)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def claim(path: str, *seeds: str) -> None:
    store = DiskStore(path)
    print(all(store.claim(make_key(int(seed)).digest) for seed in seeds), flush=True)
    time.sleep(600)


def forked(path: str) -> None:
    store = DiskStore(path)
    store.put(make_cache(1))
    store.get(make_key(1))
    child = os.fork()
    if child == 0:
        os._exit(0 if store.stats().entries == 1 and store.get(make_key(1)) is not None else 1)
    assert os.waitpid(child, 0)[1] == 0
    store.put(make_cache(2))
    print(store.stats().entries)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"fill": fill, "killed": killed, "claim": claim, "forked": forked}[sys.argv[1]](*sys.argv[2:])
