"""Expressions of the shipped dashboard and alerts, and the names of figures in them."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).parents[1] / "configs"
_WORDS = {"and", "or", "unless", "by", "without", "on", "ignoring", "offset", "le"}


def rules() -> list[dict[str, Any]]:
    """The recorded figures and alerts."""
    groups = yaml.safe_load((CONFIGS / "prometheus-alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def recorded() -> set[str]:
    """Names that the rules make."""
    return {rule["record"] for rule in rules() if "record" in rule}


def shown() -> list[str]:
    """Expressions of the dashboard, as Grafana sends them."""
    panels = json.loads((CONFIGS / "grafana-dashboard.json").read_text())["panels"]
    return [target["expr"].replace("$__rate_interval", "5m") for panel in panels for target in panel["targets"]]


def names(expression: str) -> set[str]:
    """Of the figures in an expression."""
    bare = re.sub(r'"[^"]*"', "", expression)
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(?:by|without|on|ignoring)\s*\([^)]*\)|(?<![\w:])\d[\w.]*", " ", bare)
    return set(re.findall(r"[a-zA-Z_:][\w:]*(?!\s*\(|\w|:)", bare)) - _WORDS
