"""The folds' models as one: their mean, registered as a version of its own."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rayseg import config as configuration
from rayseg.crossvalidation.scores import SPLIT
from rayseg.data.prepared import PreparedSet
from rayseg.data.range import widest
from rayseg.inference.networks import Mirror
from rayseg.inference.predictor import FLIPS
from rayseg.models import ensemble
from rayseg.tracking import bundle, registry, runs
from rayseg.tracking import card as cards
from rayseg.training.settings import TrainConfig, TrainResult
from rayseg.training.trainer import examples


def register(
    base: TrainConfig,
    prepared: PreparedSet,
    trained: Sequence[TrainResult],
    mirror: Mirror | None,
    scores: cards.Evaluation,
    run_id: str,
) -> registry.ModelVersion:
    """The mean of the folds' models as one version; the one that an earlier start has left, where there is one."""
    uri = base.tracking_uri
    known = registry.of_run(uri, run_id, base.registered_model)
    if known is not None:
        return known
    bundle_dirs = [registry.fetch(uri, result.model_uri)[0] for result in trained]
    bundles = [bundle.load(one) for one in bundle_dirs]
    threshold = sum(one.threshold for one in bundles) / len(bundles)
    model = ensemble.mean([bundle.load_keras(one) for one in bundle_dirs], FLIPS[mirror])
    # All of them have trained most of its members, or chosen their epochs.
    runs.log_bytes(uri, run_id, "split.csv", prepared.read_split().replace(b",test,", b",train,"))
    card = configuration.build(cards.Card, json.loads(runs.read_bytes(uri, trained[0].run_id, cards.VALUES)))
    mirrored = " and their mirror images" if mirror else ""
    card = replace(
        card,
        name=card.name.replace(f"{base.registered_model}-folds", base.registered_model),
        run_id=run_id,
        rows={"all folds": sum(prepared.rows.values())},
        threshold=threshold,
        validation={},
        evaluations=(scores,),
        members=f"The mean of {len(trained)} networks{mirrored}, one a fold. The scores on {SPLIT} are of the single "
        "networks, each on patients whom it never saw; the mean has none here, as every patient has trained most of "
        "its members. Judge it on a test set that no fold saw.",
    )
    with tempfile.TemporaryDirectory(prefix="rayseg-bundle-") as temporary:
        example, *golden = examples(prepared)
        ranges = [one.range for one in bundles if one.range is not None]
        known_range = widest(ranges) if len(ranges) == len(bundles) else None
        saved = Path(temporary, "bundle")
        bundle.save(saved, model, prepared.model_preprocess, prepared.labels, threshold, example, golden, known_range)
        return registry.register(uri, run_id, saved, base.registered_model, cards.log(uri, card))
