"""Runs and a model whose names and values are as long as ours can be, and longer than MLflow's tables hold."""

from pathlib import Path

from rayseg.tracking import aliases, registry, runs

LONG = "Läsion-" * 2000  # 14,000 characters, of more bytes
PARAMS = {"short": 1, f"key.{LONG}"[:400]: "a value", f"key.{LONG}"[:401]: "another", "value": LONG, "zero": "a\0b"}
TAGS = {"purpose": "test", f"tag {LONG}"[:300]: "a tag", "note": LONG}
METRICS = {f"val/dice_pooled/{LONG}"[:260]: 0.5, f"val/dice_pooled/{LONG}"[:261]: 0.25} | {
    "nan": float("nan"),
    "inf": float("inf"),
    "-inf": float("-inf"),
}
EXPERIMENT, MODEL, ALIAS = "e" * 256, ("brain 1.0 " * 26)[:256], "a" * 200


def write(tracking_uri: str, bundle: Path) -> tuple[str, registry.ModelVersion]:
    """Writes all of it; returns the run's id and the version."""
    run_id = runs.start(tracking_uri, EXPERIMENT, f"run {LONG}", PARAMS, TAGS)
    runs.log_metrics(tracking_uri, run_id, METRICS, step=2**40)
    runs.set_tags(tracking_uri, run_id, {"reason": LONG})
    runs.log_dataset(tracking_uri, run_id, f"s3://bucket/{LONG[:1000]}", "d" * 64, "{}" + " " * 100_000, "training")
    version = registry.register(tracking_uri, run_id, bundle, MODEL, "ä" * 5000)
    aliases.move(tracking_uri, MODEL, ALIAS, version.version, "promoted")
    aliases.note_served(tracking_uri, MODEL, ALIAS, version.version)
    runs.finish(tracking_uri, run_id, "FINISHED")
    return run_id, version
