"""A corpus that lies in a bucket, encoded into that bucket: real S3, as moto speaks it (python -m moto.server)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from corpus_kit import MOMENT, files, parquet

from cli_kit import data, error
from kvilt.corpora.encode import encode_corpus
from kvilt.corpora.sources import read_all
from stores import servers


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket on a server that the environment names; its URL."""
    with pytest.MonkeyPatch.context() as patch, servers.moto() as url:
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_ACCESS_KEY_ID", servers.ACCESS)
        patch.setenv("AWS_SECRET_ACCESS_KEY", servers.SECRET)
        patch.setenv("SOURCE_DATE_EPOCH", MOMENT)
        yield f"s3://{servers.BUCKET}"


def upload(path: Path, url: str) -> None:
    """Copy a file into a bucket."""
    from pyarrow import fs

    system, inner = fs.FileSystem.from_uri(url)
    with system.open_output_stream(inner) as out:
        out.write(path.read_bytes())


def test_from_a_bucket_into_a_bucket(bucket: str, model_dir: Path, tmp_path: Path) -> None:
    """Danger: what two workers make of a corpus on other machines is not what one makes of the same files here."""
    upload(parquet(tmp_path / "a.parquet", 24, group=6), f"{bucket}/corpus/a.parquet")
    (tmp_path / "b.jsonl").write_text('{"text": "One more."}\nno JSON\n')
    upload(tmp_path / "b.jsonl", f"{bucket}/corpus/below/b.jsonl")
    assert len(read_all([f"{bucket}/corpus/*.parquet"], print)) == 24
    store = f"object:url={bucket}/caches"
    done = encode_corpus(f"{bucket}/corpus", str(model_dir), store=store, workers=2)
    assert (done.documents, done.encoded) == (25, 25)
    assert [problem.split(" ")[0] for problem in done.failed] == [f"{bucket}/corpus/below/b.jsonl:2"]
    again = encode_corpus(f"{bucket}/corpus/*.parquet", str(model_dir), store=store)
    assert (again.documents, again.present) == (24, 24)
    here = encode_corpus(str(tmp_path / "a.parquet"), str(model_dir), store=f"disk:path={tmp_path / 'store'}")
    assert here.encoded == 24
    data("collection", "export", tmp_path / "made", "--store", store)
    made = {p.name: p.read_bytes() for p in (tmp_path / "made").glob("*.safetensors")}
    assert made.items() >= files(tmp_path / "store").items()
    assert sum(share["documents"] for share in data("cache", "du", "--store", store)) == 25
    assert data("cache", "prune", "--budget", 1, "--store", store)["removed"] == 25
    other = f"object:url={bucket}/others"
    assert data("collection", "import", tmp_path / "made", "--store", other)["stored"] == 25
    assert len(data("cache", "ls", "--sort", "size", "--store", other)) == 25


def test_a_bucket_that_is_not_there_is_one_line(bucket: str, model_dir: Path, store: str) -> None:
    """Danger: a wrong name ends in a page of somebody else's errors."""
    common = ("--model", model_dir, "--store", store)
    assert "s3://nowhere/x" in error("encode", "s3://nowhere/x/*.parquet", *common)
    assert f"{bucket}/none" in error("encode", f"{bucket}/none", *common)
