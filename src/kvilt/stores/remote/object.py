"""The store of documents in an object store, through obstore."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from kvilt.errors import MissingExtra, SpecError
from kvilt.stores.blobs import OnePerKey, check_key, is_key
from kvilt.stores.catalogue import Catalogue
from kvilt.stores.remote.parts import HEAD, PART, Link, Opened, Part, RemoteBlobs, check_url
from kvilt.stores.store import Store

T = TypeVar("T")
KNOWN = 100_000  # documents that are remembered to be there
DOCUMENT, PIN = "{0:.2}/{0}.safetensors", "pins/{0}"
SERVERS, REGIONS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"), ("AWS_REGION", "AWS_DEFAULT_REGION")
BACKOFF = {"init_backoff": timedelta(seconds=0.05), "max_backoff": timedelta(seconds=1), "base": 2}
ADVICE = {
    "its bucket does not exist: create it, or correct the url.": (
        "NoSuchBucket",
        "NoSuchContainer",
        "ContainerNotFound",
    ),
    "the server takes this machine's clock to be wrong: set the clock.": ("RequestTimeTooSkewed", "RequestExpired"),
    "no credentials are found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.": ("169.254.169.254",),
    "its disk is full: free space there.": ("No space left",),
    "access is refused: check the credentials and what they allow.": ("PermissionDenied", "Unauthenticated", "403 F"),
    "this kind of object store cannot do that.": ("NotSupported", "NotImplemented", "ValueError"),
    "there is nothing: check the url.": ("FileNotFound",),
}


@dataclass
class Endpoint:
    """What a server turned out to be able to do."""

    ranges: bool = True  # until it answers a part with the whole
    creates: bool | None = None  # whether `put` leaves alone what is there; None: not tried


ENDPOINTS: dict[str, Endpoint] = {}  # by bucket and server, for this process


class ObjectBlobs(RemoteBlobs):
    """Blobs as objects, under the names that they have in a folder: one may be copied to the other."""

    def __init__(self, client: Any, link: Link, can: Endpoint, connections: int, fresh: float, name: str) -> None:
        import obstore

        super().__init__(link, connections)
        self.api: Any = obstore
        self.client, self._can, self._name, self._connections = client, can, name, connections
        self._fresh, self._seen = fresh, dict[str, float]()  # when documents were seen last
        self._writers = OnePerKey()

    @property
    def step(self) -> int:  # type: ignore[override]
        """Bytes of a part: all there are, if the server knows no ranges."""
        return PART if self._can.ranges else 1 << 62

    def open_many(self, keys: Sequence[str]) -> list[Opened | None]:
        with self.link.asked("cannot read"):
            return [*self._of_each(self._open, keys)]

    def fetch(self, part: Part) -> memoryview:
        path, start, end = self.path(part.blob.key), part.start, part.end
        with self.link.asked("cannot read"):
            if self._can.ranges:
                return memoryview(self.api.get_range(self.client, path, start=start, end=end))
            return memoryview(self.api.get(self.client, path).bytes())[start:end]

    def put(self, key: str, data: Sequence[memoryview]) -> bool:
        path = self.path(key)
        with self.link.asked("cannot write"), self._writers.alone(key):
            if self._can.creates is None:
                self._can.creates = self._probe(f"probe/{secrets.token_hex(8)}")
            mode = "create" if self._can.creates else "overwrite"
            made = (self._can.creates or not self._is_there(key)) and self._create(path, b"".join(data), mode)
            self._note(key)
            return made

    def delete(self, key: str) -> bool:
        path = self.path(key)
        with self.link.asked("cannot delete from"):
            there = self._is_there(key)
            self._forget(key)
            with contextlib.suppress(FileNotFoundError):
                self.api.delete(self.client, path)
            return there

    def list(self) -> Iterator[tuple[str, int]]:
        with self.link.asked("cannot list"):
            for page in self.api.list(self.client, self._name.partition("{")[0] or None, chunk_size=1000):
                for meta in page:
                    key = meta["path"].rpartition("/")[2].partition(".")[0]
                    if is_key(key) and meta["path"] == self.path(key):
                        yield key, meta["size"]

    def contains(self, keys: Iterable[str]) -> set[str]:
        wanted = {check_key(key) for key in keys}
        unsure = [key for key in wanted if not self._is_fresh(key)]
        with self.link.asked("cannot read"):
            there = self._of_each(self._is_there, unsure)
            return wanted - {key for key, is_there in zip(unsure, there, strict=True) if not is_there}

    def _of_each(self, work: Callable[[str], T], keys: Sequence[str]) -> Sequence[T]:
        """`work` of every key, on all connections, each with its share of the keys."""
        step = -(-len(keys) // self._connections) or 1
        shares = (keys[first : first + step] for first in range(0, len(keys), step))
        return [made for share in self.pool.map(lambda keys: [*map(work, keys)], shares) for made in share]

    def path(self, key: str) -> str:
        """The name of a document's object."""
        return self._name.format(check_key(key))

    def _open(self, key: str) -> Opened | None:
        live = self.live.get(key)
        if live is not None and self._is_fresh(key):
            return live.opened
        try:
            opened = self._head(self.path(key))
        except FileNotFoundError as error:
            self._forget(key)
            if "NoSuchBucket" in str(error):
                raise
            return None
        self._note(key)
        return opened

    def _head(self, path: str) -> Opened:
        """Size, identity and first bytes. Raises FileNotFoundError."""
        if self._can.ranges:
            try:
                got = self.api.get(self.client, path, options={"range": (0, HEAD)})
                return _opened(got.meta, got.bytes())
            except (self.api.exceptions.GenericError, self.api.exceptions.NotSupportedError) as error:
                if "range" not in str(error).lower():
                    raise
        got = self.api.get(self.client, path)  # the object is empty, or the server knows no ranges
        self._can.ranges = self._can.ranges and not got.meta["size"]
        return _opened(got.meta, next(iter(got.stream(HEAD)), b""))

    def _create(self, path: str, data: bytes, mode: str) -> bool:
        try:
            self.api.put(self.client, path, data, mode=mode, use_multipart=False)
        except self.api.exceptions.AlreadyExistsError:
            return False
        return True

    def _probe(self, path: str) -> bool:
        """Whether the server leaves alone what is there if it is told to: some overwrite it, silently."""
        try:
            return self._create(path, b"kvilt", "create") and not self._create(path, b"kvilt", "create")
        except (self.api.exceptions.NotSupportedError, NotImplementedError):
            return False
        finally:
            with contextlib.suppress(Exception):
                self.api.delete(self.client, path)

    def _is_there(self, key: str) -> bool:
        try:
            self.api.head(self.client, self.path(key))
        except FileNotFoundError:
            self._forget(key)
            return False
        self._note(key)
        return True

    def _is_fresh(self, key: str) -> bool:
        return time.monotonic() - self._seen.get(key, float("-inf")) < self._fresh

    def _note(self, key: str) -> None:
        if len(self._seen) >= KNOWN:  # millions are listed, not read
            self._seen.clear()
        self._seen[key] = time.monotonic()

    def _forget(self, key: str) -> None:
        self._seen.pop(key, None)
        self.live.pop(key, None)


def _opened(meta: Any, head: Any) -> Opened:
    return Opened(meta["size"], (meta["e_tag"], meta["version"], meta["last_modified"]), memoryview(head)[:HEAD])


class ObjectStore(Store):
    """Keeps documents in an object store: `object:url=s3://bucket/prefix`, also gs://, az://, file://, memory:// and http://.

    Credentials come from where the provider's own tools find them, never from here; `endpoint` is that of a server which
    speaks like S3. At most `connections` requests of `timeout` seconds run at once. A document that was seen less than
    `fresh` seconds ago is taken to be there. `catalogue` is a local file that remembers what a large bucket holds."""

    def __init__(
        self,
        url: str,
        endpoint: str = "",
        connections: int = 16,
        timeout: float = 30.0,
        fresh: float = 10.0,
        catalogue: str = "",
    ) -> None:
        self.url = check_url(url)
        server = check_url(endpoint) or next(filter(None, map(os.environ.get, SERVERS)), "")
        client = _client(url, server, timeout)
        link = Link(f"{url} ({server})" if server and url.startswith("s3") else url, ADVICE)
        can = ENDPOINTS.setdefault("/".join([*url.split("/")[:3], server]), Endpoint())
        self._objects, pins = (ObjectBlobs(client, link, can, connections, fresh, name) for name in (DOCUMENT, PIN))
        path = Path(catalogue).expanduser() if catalogue else None
        super().__init__(Catalogue(self._objects, pins, path))

    def sign(self, digests: Sequence[str], seconds: float = 3600) -> list[str]:
        """A URL for each document that reads it without credentials for a while: keep it secret. Raises StoreUnavailable."""
        blobs = self._objects
        with blobs.link.asked("cannot sign for"):
            return [*blobs.api.sign(blobs.client, "GET", [*map(blobs.path, digests)], timedelta(seconds=seconds))]


def _client(url: str, server: str, timeout: float) -> Any:
    """Raises MissingExtra, SpecError."""
    try:
        from obstore.store import from_url
    except ImportError as error:
        raise MissingExtra("obstore", "object") from error
    scheme, wait = url.partition("://")[0], timedelta(seconds=timeout)
    options = {"timeout": wait, "connect_timeout": wait / 6, "allow_http": (server or url).startswith("http:")}
    more: dict[str, Any] = {"retry_config": {"max_retries": 4, "retry_timeout": wait, "backoff": BACKOFF}}
    more |= {"client_options": options}
    if scheme in ("file", "memory"):
        more = {"mkdir": True} if scheme == "file" else {}
    if scheme in ("s3", "s3a"):
        region = next(filter(None, map(os.environ.get, REGIONS)), "us-east-1" if server else "")
        more |= {name: value for name, value in (("endpoint", server), ("region", region)) if value} | _profile()
    try:
        return from_url(url, **more)
    except Exception as error:
        what = f"{url} is not the url of an object store ({type(error).__name__})"
        raise SpecError(f"{what}: write it like s3://bucket/prefix.") from None


def _profile() -> dict[str, Any]:
    """Credentials of a profile in ~/.aws, which boto3 reads; nothing where others are given or there is none."""
    there = "AWS_PROFILE" in os.environ or Path("~/.aws/credentials").expanduser().is_file()
    if there and "AWS_ACCESS_KEY_ID" not in os.environ:
        with contextlib.suppress(ImportError):
            from obstore.auth.boto3 import Boto3CredentialProvider

            return {"credential_provider": Boto3CredentialProvider()}
    return {}
