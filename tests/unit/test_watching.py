"""The dashboard and the alerts: of figures that there are, and firing where they should."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from rayseg.meters import METERS
from serving.metrics import Metrics
from tests.promql import CONFIGS, names, recorded, rules, shown

FOLDER = Path(__file__).parent


@pytest.fixture
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool (package prometheus) is not installed")
    return found


def registered() -> set[str]:
    """Names of all figures of ours, as Prometheus gets them: through Ray, and from the service."""
    made = Metrics()
    made.answered("POST", "/v1/segment", 200, 0.1, 1, 1)
    made.rejected("busy")
    made.model("m", "1", "d")
    lines = made.text().decode().splitlines()
    return {f"ray_{name}" for name in METERS} | {line.partition("{")[0].partition(" ")[0] for line in lines}


def test_names_of_an_expression() -> None:
    told = 'sum by (le, a) (rate(one_total{x="two", y=~"3|4"}[5m])) / 2 > 0.1 and on (b) three:30m offset 30m or ALERTS'
    assert names(told) == {"one_total", "three:30m", "ALERTS"}


def test_dashboard_and_alerts_are_of_figures_that_there_are() -> None:
    expressions = [*shown(), *(rule["expr"] for rule in rules())]
    assert len(expressions) > 25
    known = registered() | recorded() | {"ALERTS", "up"}
    for expression in expressions:
        assert names(expression), expression
        assert names(expression) <= known, expression


def test_every_figure_of_a_stage_is_shown() -> None:
    used = set().union(*map(names, shown()), *(names(rule["expr"]) for rule in rules()))
    assert {f"ray_{name}" for name in METERS} <= used


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    """Each panel has an id, a place that no other one covers, and the chosen Prometheus; Grafana is not asked."""
    dashboard = json.loads((CONFIGS / "grafana-dashboard.json").read_text())
    panels = dashboard["panels"]
    assert dashboard["uid"]
    assert [one["type"] for one in dashboard["templating"]["list"]] == ["datasource"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    covered = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(covered)) == len(covered)
    assert max(x for x, _ in covered) < 24
    assert {panel["datasource"]["uid"] for panel in panels} == {"${source}"}
    (provider,) = yaml.safe_load((CONFIGS / "grafana-provisioning.yaml").read_text())["providers"]
    assert provider["type"] == "file"


def test_every_alert_says_what_to_do() -> None:
    alerts = [rule for rule in rules() if "alert" in rule]
    assert {"RaysegRejects", "RaysegStall", "RaysegQueue", "RaysegSwapFailed"} <= {rule["alert"] for rule in alerts}
    for rule in alerts:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "todo"}


def test_promtool_takes_the_files(promtool: str, tmp_path: Path) -> None:
    checks = {"config": CONFIGS / "prometheus.yaml", "rules": tmp_path / "dashboard.yaml"}
    made = [{"record": f"panel_{number}", "expr": expression} for number, expression in enumerate(shown())]
    checks["rules"].write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": made}]}))
    for what, path in checks.items():
        subprocess.run([promtool, "check", what, path], check=True, capture_output=True)


def test_alerts_fire_where_they_should(promtool: str) -> None:
    told = subprocess.run([promtool, "test", "rules", FOLDER / "alerts.yaml"], capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr
    tried = {
        one["alertname"]
        for test in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["tests"]
        for one in test["alert_rule_test"]
        if "exp_alerts" in one
    }
    assert tried == {rule["alert"] for rule in rules() if "alert" in rule}
