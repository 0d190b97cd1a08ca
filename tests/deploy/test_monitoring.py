"""Prometheus' alerts and Grafana's dashboard, against what a service really exports."""

import json
import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.places import ROOT
from tests.tokenizers_svc.support import (
    RED,
    AllergicTokenizer,
    jpeg,
    open_request,
    post,
    serving,
    wait_until,
)
from tokenizers_svc.app import create_app
from tokenizers_svc.limits import Limits

MONITORING = ROOT / "deploy" / "monitoring"
ALERTS = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((MONITORING / "grafana" / "dashboards" / "service.json").read_text())
PROMTOOL = shutil.which("promtool")
# What Prometheus adds by itself.
FROM_SCRAPING = {"job": "patchcache-service", "instance": "service:8000"}
ALERTING = {"alertstate": "firing", "severity": "page", **FROM_SCRAPING}


def queries():
    """Every expression of the dashboard and of the alerts, by what it is part of."""
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            yield f"{panel['title']} {target['refId']}", target["expr"]
    for alert in ALERTS:
        yield alert["alert"], alert["expr"]


def parse(query):
    """The tree of an expression, Grafana's variables as Grafana fills them in."""
    filled = query.replace("$__rate_interval", "1m")
    for variable in DASHBOARD["templating"]["list"]:
        filled = filled.replace(f"${variable['name']}", variable["allValue"])
    assert "$" not in filled, "a variable that the dashboard does not have"
    return promql_parser.parse(filled)


def parts(node):
    """A tree's node and all below it."""
    found = []
    promql_parser.walk(node, lambda part: found.append(part) or True)
    return found


def selectors(node):
    return [part for part in parts(node) if isinstance(part, promql_parser.VectorSelector)]


@pytest.fixture(scope="module")
def series():
    """The labels of every series of a service that has seen everything, by name."""
    tokenizer = AllergicTokenizer()
    app = create_app(tokenizer, limits=Limits(lanes=1, max_batch=1, max_queue=1, max_items=1))
    with serving(app) as client, ThreadPoolExecutor(1) as pool:
        service = app.state.service
        assert post(client, jpeg()).status_code == 200
        assert post(client, b"no picture").status_code == 415
        assert post(client, RED).status_code == 500
        tokenizer.may_run.clear()
        try:
            busy = pool.submit(post, client, jpeg(seed=1))
            wait_until(lambda: service.door.num_pictures == 1)
            assert post(client, jpeg(seed=2)).status_code == 429
        finally:
            tokenizer.may_run.set()
        assert busy.result().status_code == 200
        leaving = open_request(client, jpeg(), num_sent=10)
        wait_until(lambda: service.door.num_pictures == 1)
        leaving.close()
        wait_until(lambda: "patchcache_cancelled_total{" in client.get("/metrics").text)
        text = client.get("/metrics").text
    found = {
        "up": [FROM_SCRAPING],
        "ALERTS": [{"alertname": alert["alert"], **ALERTING} for alert in ALERTS],
    }
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append({**sample.labels, **FROM_SCRAPING})
    return found


def is_met(matcher, labels):
    value = labels.get(matcher.name, "")
    operations = promql_parser.MatchOp
    if matcher.op in (operations.Equal, operations.NotEqual):
        return (value == matcher.value) == (matcher.op == operations.Equal)
    return bool(re.fullmatch(matcher.value, value)) == (matcher.op == operations.Re)


@pytest.mark.parametrize(
    ("where", "query"), [pytest.param(where, query, id=where) for where, query in queries()]
)
def test_a_query_names_series_and_labels_that_a_service_exports(where, query, series):
    tree = parse(query)
    known = set()
    selected = list(selectors(tree))
    assert selected, where
    for selector in selected:
        assert selector.name in series, where
        exported = series[selector.name]
        assert any(
            all(is_met(matcher, labels) for matcher in selector.matchers.matchers)
            for labels in exported
        ), f"{where}: nothing is {selector}"
        known |= {label for labels in exported for label in labels}
        assert {matcher.name for matcher in selector.matchers.matchers} <= known
    for part in parts(tree):
        grouping = getattr(getattr(part, "modifier", None), "labels", None)
        assert set(grouping or ()) <= known, where
        matching = getattr(getattr(part, "modifier", None), "matching", None)
        assert set(matching.labels if matching else ()) <= known, where


def test_the_walk_sees_the_labels_that_it_should_refuse():
    tree = parse("sum by (a) (rate(b{c='d'}[5m])) / on (e) f")
    assert [selector.name for selector in selectors(tree)] == ["b", "f"]
    modifiers = [part.modifier for part in parts(tree) if getattr(part, "modifier", None)]
    assert [list(getattr(x, "labels", None) or x.matching.labels) for x in modifiers] == [
        ["e"],
        ["a"],
    ]


def test_a_legend_names_labels_that_its_query_keeps():
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            tree = parse(target["expr"])
            kept = {
                label
                for part in parts(tree)
                if isinstance(part, promql_parser.AggregateExpr) and part.modifier
                for label in part.modifier.labels
            }
            aggregates = [x for x in parts(tree) if isinstance(x, promql_parser.AggregateExpr)]
            named = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert not aggregates or named <= kept, panel["title"]


def test_the_panels_of_the_dashboard_are_told_apart_and_do_not_overlap():
    panels = DASHBOARD["panels"]
    assert max(Counter(panel["id"] for panel in panels).values()) == 1
    assert max(Counter(panel["title"] for panel in panels if panel["type"] != "stat").values()) == 1
    cells = Counter()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            cells.update((x, y) for y in range(place["y"], place["y"] + place["h"]))
    assert max(cells.values()) == 1
    assert all(
        panel["description"] and panel["fieldConfig"]["defaults"]["unit"] for panel in panels
    )


def test_the_dashboard_asks_the_data_source_that_is_provisioned():
    folder = MONITORING / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text())[
        "datasources"
    ]
    asked = {"type": source["type"], "uid": source["uid"]}
    for panel in DASHBOARD["panels"]:
        assert panel["datasource"] == asked
        assert all(target["datasource"] == asked for target in panel["targets"])
    assert all(variable["datasource"] == asked for variable in DASHBOARD["templating"]["list"])
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]
    assert source["url"] == "http://prometheus:9090"
    assert "127.0.0.1:${PROMETHEUS_PORT:-9090}:9090" in compose["prometheus"]["ports"]
    (provider,) = yaml.safe_load((folder / "dashboards" / "patchcache.yml").read_text())[
        "providers"
    ]
    mounts = dict(volume.split(":")[:2] for volume in compose["grafana"]["volumes"])
    assert mounts["./monitoring/grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./monitoring/grafana/provisioning"] == "/etc/grafana/provisioning"


def test_the_variables_of_the_dashboard_have_values(series):
    for variable in DASHBOARD["templating"]["list"]:
        name, label = re.fullmatch(
            r"label_values\((\w+), (\w+)\)", variable["query"]["query"]
        ).groups()
        assert all(label in labels for labels in series[name])


def test_every_alert_says_how_bad_it_is_and_is_tested_by_promtool():
    tested = (ROOT / "tests" / "deploy" / "alerts_test.yml").read_text()
    for alert in ALERTS:
        assert alert["labels"]["severity"] in ("page", "ticket")
        assert alert["annotations"]["summary"].endswith((".", "?"))
        assert re.search(rf"alertname: {alert['alert']}\n +eval_time", tested)


def test_the_page_for_operators_lists_the_alerts():
    page = (ROOT / "docs" / "service-operations.md").read_text()
    listed = re.findall(r"^\| `(Patchcache\w+)` \| .* \| (\w+) \|$", page, re.MULTILINE)
    assert listed == [(alert["alert"], alert["labels"]["severity"]) for alert in ALERTS]


@pytest.mark.parametrize(
    "words",
    [
        ("check", "rules", MONITORING / "alerts.yml"),
        ("check", "config", "--syntax-only", MONITORING / "prometheus.yml"),
        ("test", "rules", ROOT / "tests" / "deploy" / "alerts_test.yml"),
    ],
    ids=lambda words: f"{words[0]} {words[1]}",
)
def test_promtool_finds_nothing(words):
    if PROMTOOL is None:
        pytest.skip("promtool is not installed: it comes with Debian's package prometheus")
    done = subprocess.run([PROMTOOL, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
