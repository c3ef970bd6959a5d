"""Processes that work on one store; run as a script so that they can be killed for real.

store_worker.py fill PATH SHUFFLE...           a process for each puts 15 documents; print how many were new
store_worker.py killed PATH ROUNDS             kill -9 a writing child ROUNDS times, each a little later
store_worker.py deleted PATH BUDGET            four processes write while their folder is deleted again and again
store_worker.py forked KIND PATH               fork while threads use the store; both sides go on using it
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from store_kit import digest, make_cache, make_key, make_store, same

from kvilt.errors import StoreUnavailable
from kvilt.stores.disk import DiskStore


def fill(path: str, *shuffles: str) -> None:
    children = []
    for shuffle in shuffles:
        children.append(os.fork())
        if children[-1] == 0:
            store, seeds = DiskStore(path), list(range(15))
            random.Random(int(shuffle)).shuffle(seeds)
            made = sum(store.put(make_cache(seed, rows=200)) for seed in seeds)
            right = all(same(store.get(make_key(seed)), make_cache(seed, rows=200)) for seed in seeds)
            store.close()
            os._exit(made if right else 99)
    print(sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))


def killed(path: str, rounds: str) -> None:
    for turn in range(int(rounds)):
        child = os.fork()
        if child == 0:
            store = DiskStore(path, budget="6MB")
            for seed in range(turn % 3, 10**6):
                store.put(make_cache(seed % 40, rows=2000))
                store.get(make_key(seed % 7))
                store.pin(digest(seed % 5), seed % 2 == 0)
        time.sleep(0.05 + 0.013 * turn)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def deleted(path: str, budget: str) -> None:
    children = []
    for first in range(0, 400, 100):
        children.append(os.fork())
        if children[-1] == 0:
            store, until = DiskStore(path, budget=int(budget)), time.monotonic() + 2
            while time.monotonic() < until:
                for seed in range(first, first + 25):
                    with contextlib.suppress(StoreUnavailable):
                        store.put(make_cache(seed, rows=200))
            store.close()
            os._exit(0)
    for _ in range(4):
        time.sleep(0.35)
        shutil.rmtree(path, ignore_errors=True)
    assert not any(os.waitpid(child, 0)[1] for child in children)


def forked(kind: str, path: str) -> None:
    store, done = make_store(kind, Path(path)), threading.Event()
    for seed in range(3):
        store.put(make_cache(seed))

    def busy() -> None:
        while not done.is_set():
            store.get(make_key(0))
            store.stats()
            store.put(make_cache(7))
            store.delete(digest(7))
            time.sleep(0.001)

    threads = [threading.Thread(target=busy) for _ in range(3)]
    for thread in threads:
        thread.start()
    children = []
    for turn in range(10):
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            right = all(same(store.get(make_key(seed)), make_cache(seed)) for seed in range(3))
            store.put(make_cache(100 + turn))
            right = right and store.get(make_key(100 + turn)) is not None and len(store.entries()) >= 4
            store.close()
            os._exit(0 if right else 1)
        children.append(child)
        time.sleep(0.01)
    states = [os.waitpid(child, 0)[1] for child in children]
    done.set()
    for thread in threads:
        thread.join()
    print(states)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"fill": fill, "killed": killed, "deleted": deleted, "forked": forked}[sys.argv[1]](*sys.argv[2:])
