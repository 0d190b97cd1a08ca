"""What the OpenAPI schema allows, drawn at random: no failure, and no answer that it does not name.

The draws are the same in every run. For many more of them:

    schemathesis run http://127.0.0.1:8000/openapi.json --max-examples 1000 \
        --checks not_a_server_error,status_code_conformance,content_type_conformance
"""

import pytest
import schemathesis.openapi
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.tokenizers_svc.support import expected_ids, jpeg, make_tokenizer, post, serving
from tokenizers_svc.access import AccessOptions
from tokenizers_svc.app import create_app
from tokenizers_svc.options import ServiceOptions

ADMIN = "the-key-of-the-administrator"
NUM_EXAMPLES = 8
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "admin"
    keys.write_text(ADMIN)
    options = ServiceOptions(access=AccessOptions(admin_key_file=keys))
    with serving(create_app(make_tokenizer(), options=options)) as client:
        yield client


def operations(client):
    schema = schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")
    return [result.ok() for result in schema.get_all_operations()]


@pytest.mark.slow
def test_whatever_the_schema_allows_gets_an_answer_that_it_names(client):
    tried = []
    for operation in operations(client):

        @settings(
            max_examples=NUM_EXAMPLES,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def ask(case):
            headers = {"Authorization": f"Bearer {ADMIN}"}
            case.call_and_validate(checks=CHECKS, headers=headers, timeout=60)

        ask()
        tried.append(operation.label)
    assert "POST /v1/tokenize" in tried
    assert len(tried) >= 14
    assert post(client, jpeg()).json()["token_ids"] == expected_ids(jpeg())
