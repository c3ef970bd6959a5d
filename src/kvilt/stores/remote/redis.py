"""The store of documents in Redis or Valkey: a hot tier, not the truth, because the server may drop what it likes."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from kvilt.errors import MissingExtra, SpecError, StoreUnavailable
from kvilt.stores.blobs import check_key, is_key
from kvilt.stores.catalogue import Catalogue
from kvilt.stores.remote.parts import HEAD, Link, Opened, Part, RemoteBlobs, check_url
from kvilt.stores.store import Store

log = logging.getLogger("kvilt")

WRITING = 600  # seconds after which what a dead writer left behind is gone
ADVICE = {
    "it is full: raise its maxmemory, or let it evict with maxmemory-policy allkeys-lfu.": ("OutOfMemory", "OOM"),
    "the password is refused: set REDISCLI_AUTH, or REDIS_URL with user and password.": ("Authentication", "NOAUTH"),
    "this user may not do that: allow hashes, SCAN, UNLINK and RENAMENX.": ("NoPermission",),
    "it takes no writes: give the url of the primary.": ("ReadOnly",),
}


class RedisBlobs(RemoteBlobs):
    """Blobs as hashes `prefix:{key}`: size, identity, head, and the parts behind it by where they begin."""

    def __init__(self, client: Any, link: Link, prefix: str, ttl: float) -> None:
        super().__init__(link, connections=4)
        self._client, self._prefix, self._ttl, self._checked = client, prefix, ttl, False

    def open_many(self, keys: Sequence[str]) -> list[Opened | None]:
        with self._asked("cannot read"):  # an answer that changed on the way, too
            found = self._each("cannot read", "HMGET", keys, "size", "id", "head")
            return [None if head is None else Opened(int(size), made, memoryview(head)) for size, made, head in found]

    def fetch(self, part: Part) -> memoryview:
        with self._asked("cannot read"):  # an answer that changed on the way may be a list, or a number
            data = self._client.hget(self._name(part.blob.key), str(part.start))
            if data is None:
                raise EOFError("a part is missing")
            return memoryview(data)

    def put(self, key: str, data: Sequence[memoryview]) -> bool:
        """Under a name of its own first, so that a document is there completely or not at all."""
        name, whole = self._name(check_key(key)), b"".join(data)
        temporary = f"{name}:{secrets.token_hex(8)}"
        fields: dict[str, Any] = {"size": len(whole), "id": secrets.token_hex(8), "head": whole[:HEAD]}
        fields |= {str(start): whole[start : start + self.step] for start in range(HEAD, len(whole), self.step)}
        with self._asked("cannot write to"):
            if self._client.exists(name):
                return False
            try:
                for field, value in fields.items():
                    self._client.hset(temporary, field, value)
                    self._client.expire(temporary, WRITING)
                if self._client.hlen(temporary) != len(fields):
                    raise StoreUnavailable(f"cannot write to {self.link.where}: it is so full that it evicts at once.")
                made = bool(self._client.renamenx(temporary, name))
                if made:
                    self._client.pexpire(name, int(self._ttl * 1000))
                return made
            finally:
                with contextlib.suppress(Exception):
                    self._client.unlink(temporary)

    def delete(self, key: str) -> bool:
        self.live.pop(check_key(key), None)
        with self._asked("cannot delete from"):
            return bool(self._client.unlink(self._name(key)))

    def list(self) -> Iterator[tuple[str, int]]:
        with self._asked("cannot list"):
            names = self._client.scan_iter(match=f"{self._prefix}:{{*}}", count=1000)
            keys = (name.decode("utf-8", "replace")[len(self._prefix) + 2 : -1] for name in names)
            while batch := list(itertools.islice(filter(is_key, keys), 1000)):
                sizes = self._each("cannot list", "HGET", batch, "size")
                yield from ((key, int(size)) for key, size in zip(batch, sizes, strict=True) if size is not None)

    def contains(self, keys: Iterable[str]) -> set[str]:
        wanted = [check_key(key) for key in keys]
        there = self._each("cannot read", "HEXISTS", wanted, "head")
        return {key for key, is_there in zip(wanted, there, strict=True) if is_there}

    def close(self) -> None:
        self._client.close()

    def _name(self, key: str) -> str:
        return f"{self._prefix}:{{{key}}}"  # in braces: a cluster keeps a document and its temporary name together

    def _each(self, what: str, command: str, keys: Sequence[str], *arguments: str) -> Sequence[Any]:
        """A command for every key, all in one go."""
        with self._asked(what), self._client.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.execute_command(command, self._name(key), *arguments)
            return list(pipe.execute())

    @contextlib.contextmanager
    def _asked(self, what: str) -> Iterator[None]:
        with self.link.asked(what):
            if not self._checked:
                self._check_policy()
            yield

    def _check_policy(self) -> None:
        """Say once if the server does not evict as a cache should."""
        from redis.exceptions import ResponseError

        with contextlib.suppress(ResponseError):  # hosted servers do not tell
            told = self._client.config_get("maxmemory*")
            policy, room = told.get("maxmemory-policy", ""), int(told.get("maxmemory", 0))
            if room and not policy.startswith("allkeys"):
                log.warning("%s evicts by %s: allkeys-lfu is right for a cache.", self.link.where, policy)
        self._checked = True


class RedisStore(Store):
    """Keeps documents in Redis or Valkey, for `ttl` seconds: `redis:url=redis://host:6379/0,ttl=86400,prefix=kvilt`.

    Without a url it is $REDIS_URL, or this machine's. User and password stand in REDIS_URL, or a password in REDISCLI_AUTH.
    A server that does not answer within `timeout` seconds is left alone for a while, and documents count as not stored."""

    def __init__(self, url: str = "", ttl: float = 86400.0, prefix: str = "kvilt", timeout: float = 2.0) -> None:
        try:
            from redis import Redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError as error:
            raise MissingExtra("redis", "redis") from error
        if not 0 < ttl < 1 << 40:
            raise SpecError(f"ttl={ttl!r}: the time to live is a number of seconds above 0.")
        self.url = check_url(url)
        given = url or os.environ.get("REDIS_URL") or "redis://localhost:6379/0"
        secret = {} if "@" in given else {"password": os.environ.get("REDISCLI_AUTH")}
        waits = {"socket_timeout": timeout, "socket_connect_timeout": timeout, "socket_read_size": 1 << 20}
        try:
            client = Redis.from_url(given, retry=Retry(NoBackoff(), 1), **waits, **secret)
        except ValueError:
            raise SpecError("the url of a Redis server is written like redis://host:6379/0.") from None
        super().__init__(Catalogue(RedisBlobs(client, Link(given.rpartition("@")[2], ADVICE), prefix, ttl)))
