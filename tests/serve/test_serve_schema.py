"""/openapi.json describes what is served; hundreds of requests made from it, right and wrong ones, find no fault."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from serve_kit import Server, serving

EXAMPLES = 20  # of every route and mode
STATUSES = {200, 202, 400, 401, 403, 404, 405, 408, 409, 413, 415, 429, 504}  # 504: a prompt that takes too long
CASES = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def served(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of its own."""
    place = tmp_path_factory.mktemp("schema")
    options = ["--store", "memory", "--dtype", "float32", "--max-tokens", "2", "--deadline", "5"]
    with serving(checkpoint, *options, log=place / "log") as made:
        yield made


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_requests_made_from_the_description_find_no_fault(served: Server, mode: GenerationMode) -> None:
    """Danger: a body that the description allows, or nearly, ends in a 500, in a hang, or with something else than JSON."""
    seen: dict[str, set[int]] = {}

    def check(operation: Any, case: Any) -> None:
        if (
            isinstance(case.body, dict) and mode is GenerationMode.POSITIVE
        ):  # an answer of thousands of tokens proves nothing
            case.body.update({name: 1 for name in case.body if name.startswith("max_")})
        response = case.call(base_url=served.url, timeout=30)
        seen.setdefault(operation.label, set()).add(response.status_code)
        assert response.status_code in STATUSES, (case.as_curl_command(), response.content[:300])
        if response.status_code >= 400:
            assert response.json()["error"]["message"]

    for found in schemathesis.openapi.from_dict(served.ask("GET", "/openapi.json").json).get_all_operations():
        operation = found.ok()
        with contextlib.suppress(Unsatisfiable):  # nothing can be wrong where nothing is said
            CASES(given(case=operation.as_strategy(mode))(_tried(check, operation)))()
    assert len(seen) >= (15 if mode is GenerationMode.POSITIVE else 5)
    assert "fault" not in served.log.read_text()
    assert served.chat("Who?", ["A text."]).status == 200


def _tried(check: Callable[[Any, Any], None], operation: Any) -> Callable[[Any], None]:
    def try_case(case: Any) -> None:
        check(operation, case)

    return try_case
