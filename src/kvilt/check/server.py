"""Why a vLLM server does not reuse documents: what it says over HTTP."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvilt.check.doctor import REASONS, Diagnosis, Finding, Verdict
from kvilt.types import Document

START = "Start it with: kvilt vllm MODEL --store ... --strategy ..."
WITHOUT = "the server runs without Kvilt's routes (VLLM_PLUGINS=kvilt): it takes no documents, and may not reuse any."
SECONDS = 60.0


def examine_server(url: str, documents: Sequence[Document], system: str | None, namespace: str | None) -> Diagnosis:
    """Whether Kvilt is loaded in the server at `url`, and whether it would reuse these documents."""
    server = _Server(url.rstrip("/").removesuffix("/v1"), namespace)
    status, models = server.call("/v1/models")
    if status != 200:
        what = f"no vLLM server answers at {url}: {_said(models)}."
        return Diagnosis([Finding("problem", what, "Check the address, and that the server is up.")])
    status, stored = server.call("/v1/documents")
    if status != 200:
        return Diagnosis([Finding("problem", WITHOUT, START)])
    made = Diagnosis([Finding("ok", f"{stored['total']:,} stored documents can be reused by this server.")])
    if not stored["total"]:
        fix = "kvilt encode with the same --model, --strategy and --store; --namespace, if the server has one."
        made = Diagnosis([Finding("problem", "the server's store holds nothing of its checkpoint and namespace.", fix)])
    values = [{"text": d.text, "title": d.title} for d in documents] or [{"id": d["id"]} for d in stored["data"][:1]]
    made += Diagnosis(list(server.tried(models["data"][0]["id"], values, system))) if values else Diagnosis()
    return made + Diagnosis([], list(server.verdicts(values, system))) if documents else made


class _Server:
    def __init__(self, url: str, namespace: str | None) -> None:
        self.url, self.namespace = url, namespace

    def call(self, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, Any]:
        """Status and answer; status 0 where nobody answers."""
        headers = {"content-type": "application/json", "x-kvilt-encode": "no"}  # looking changes nothing
        headers |= {"x-kvilt-namespace": self.namespace} if self.namespace else {}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode("utf-8", "replace")
        except (OSError, ValueError) as error:
            return 0, str(error)

    def tried(self, model: str, values: Sequence[Any], system: str | None) -> Iterator[Finding]:
        """What a short chat with these documents reuses."""
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": "?"})
        body = {"model": model, "messages": messages, "documents": values, "max_tokens": 1}
        body |= {"cache_salt": self.namespace} if self.namespace else {}
        status, answer = self.call("/v1/chat/completions", body)
        if status != 200:
            yield Finding("problem", f"a chat with these documents fails: {_said(answer)}.", START)
            return
        receipt = (answer.get("kv_transfer_params") or {}).get("kvilt") or {}
        reused = receipt.get("reused_tokens", 0)
        if receipt.get("why"):
            yield Finding("problem" if not reused else "note", receipt["why"], START)
        elif not reused:
            yield Finding("problem", "a chat with these documents reuses nothing.", "See the documents below.")
        else:
            yield Finding("ok", f"a chat with these documents reuses {reused:,} tokens.")

    def verdicts(self, values: Sequence[Any], system: str | None) -> Iterator[Verdict]:
        """Every document: stored, or why not."""
        status, answer = self.call("/v1/documents/check", {"documents": values, "system": system})
        for document in answer["data"] if status == 200 else ():
            name = document["title"] or document["id"][:12]
            yield Verdict(name, True) if document["stored"] else Verdict(name, False, *_why(document))


def _why(document: Mapping[str, Any]) -> tuple[str, str]:
    wanted, near = document["fields"], document["near"]
    if not near:
        text = "nothing is stored of its text (title, blanks and the tokenizer count too)"
        return text, "kvilt encode it, or send it again."
    differ = min(([f for f in wanted if n.get(f) != wanted[f]] for n in near), key=len)
    known = [REASONS[field] for field in differ if field in REASONS]
    return "; ".join(why for why, _ in known), f"{', '.join(fix for _, fix in known)}, or kvilt encode it again."


def _said(answer: Any) -> str:
    try:
        return str(json.loads(answer)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return str(answer)[:200]
