"""The service does what its OpenAPI description says: schemathesis asks it what the description allows and forbids."""

from pathlib import Path

import hypothesis
import schemathesis
from schemathesis import checks
from schemathesis.specs.openapi import checks as conformance

from tests.unit.guarded import service
from tests.unit.test_guard import KNOWN, bearing
from tests.unit.test_jobs import Recorded, jobs

SETTINGS = hypothesis.settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
CHECKS = [
    checks.not_a_server_error,
    conformance.status_code_conformance,
    conformance.content_type_conformance,
    conformance.response_schema_conformance,
]


def test_the_description_holds(tmp_path: Path):
    app = service(jobs(tmp_path, Recorded()), tokens=KNOWN)
    description = schemathesis.openapi.from_asgi("/openapi.json", app)
    operations = [one.ok() for one in description.get_all_operations()]
    assert {"POST /v1/segment", "POST /v1/jobs", "DELETE /v1/jobs/{id}", "GET /metrics"} <= {
        operation.label for operation in operations
    }
    for operation in operations:

        @hypothesis.given(case=operation.as_strategy())
        @hypothesis.settings(
            max_examples=25,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        def holds(case: schemathesis.Case) -> None:
            case.call_and_validate(headers=bearing("a-token"), checks=CHECKS)

        holds()
