"""The model card: what a registered model is, for who finds it in the registry and did not train it.

Training writes it, as Markdown and as values (JSON), to the model's run and as the version's description; each
evaluation adds what it found, and writes it anew. A registry's column holds 5,000 characters, so the description of a
model of many classes leaves tables out; the run has the whole card.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rayseg import config
from rayseg.tracking import limits, runs
from rayseg.tracking.registry import ModelVersion

logger = logging.getLogger(__name__)

MARKDOWN, VALUES = "model_card.md", "model_card.json"
_LEFT_OUT = "Some tables are left out here. The run's artifact `model_card.md` has them."

End = float | None
Ends = tuple[float, End, End]  # a value and its 95 % interval

_CARD = """\
# {name}

**Research software, not a medical device.** This model may not guide the care of a patient.

Segments {labels} in CT or MR slices. The form of this card follows Mitchell et al. 2019 (arXiv:1810.03993).

## Intended use

- For research on segmentation: comparing methods, measuring cohorts whose results a person checks.
- Input: a slice (DICOM, PNG, JPEG, TIFF). The bundle's `Preprocess` makes the network's input of it: {shape}.
- Output: a label map on the slice's own grid; {decision}.
- Out of scope: diagnosis, triage, treatment, and any decision about a patient.

## Limits

- Not shown to work on other scanners, protocols, body parts or patients than those of the data below.
- Scores are of patients from the same source as the training data: expect less elsewhere.
{limits}
## Data

- Prepared set `{digest}`, split by patient ({split}): {rows} rows.
- Preprocess: `{preprocess}`
- Labels: `{label_settings}`

## Training

- Network: `{model}`
- {epochs} epochs, batch {batch_size}, learning rate {rate:.3g} ({schedule}), {precision}, seed {seed}.
- {weights}

{validation}
{evaluations}
## How to reproduce

MLflow run `{run_id}` holds the whole configuration, the split, the code's digest and the environment:

    {again}
    python -m jobs.evaluate --set model_uri=... --set prepared=... --set split=test
"""
_FOLDS_AGAIN = "python -m jobs.crossvalidate --config crossvalidation.json"  # an artifact of the run, JSON is YAML
_VALIDATION = """\
## Scores on validation

On the validation patients, which chose the epoch{chose}, all pixels together, at the network's size:

| | value |
|---|---|
{scores}
"""
_UNTESTED = """\
## Scores on held-out patients

None yet: the evaluate job scores held-out patients on the slices' own grid, and adds them here.
"""
# Of all that an evaluation logs, what a reader looks for first.
_TOLD = (
    *("dice_pooled", "dice_per_case", "iou_pooled", "precision_pooled", "recall_pooled", "average_precision"),
    *(f"{name}_{unit}_per_case" for unit in ("mm", "px") for name in ("hd95", "assd", "nsd")),
    *("lesion_f1", "lesion_recall", "lesion_precision", "lesions_false_per_case"),
    *(
        f"{name}_{unit}"
        for unit in ("ml", "px")
        for name in ("volume_bias", "volume_lower_limit", "volume_upper_limit")
    ),
    "volume_cases",
    *("false_positive_ml_per_empty_case", "false_positive_px_per_empty_case", "brier", "ece"),
)


@dataclass(frozen=True)
class Group:
    """A subgroup of the cases of a class."""

    name: str  # of the class
    by: str
    group: str
    patients: int
    metrics: dict[str, Ends]


@dataclass(frozen=True)
class Failures:
    """How well quality's numbers find failed segmentations, and how often intervals of volumes hold the truth."""

    aurc: dict[str, Ends] = field(default_factory=dict)  # by flag: area under the risk-coverage curve
    at_random: float | None = None
    optimum: float | None = None
    covered: dict[str, tuple[int, int]] = field(default_factory=dict)  # by class: patients covered, of how many


@dataclass(frozen=True)
class Evaluation:
    """A split's scores on the slices' own grid. Metrics are by name, as in MLflow without the split."""

    split: str
    digest: str  # of the prepared set
    patients: int
    slices: int
    rejected: int
    tolerance: str  # of the normalised surface distance
    metrics: dict[str, Ends]
    classes: dict[str, dict[str, Ends]]
    groups: list[Group]
    failures: Failures = field(default_factory=Failures)


@dataclass(frozen=True)
class Card:
    """All values that the card tells."""

    name: str
    run_id: str
    labels: tuple[str, ...]
    shape: tuple[int, ...]
    threshold: float
    threshold_chosen: bool  # on validation, rather than given
    digest: str
    rows: dict[str, int]  # by split
    preprocess: dict[str, Any]
    label_settings: dict[str, Any]
    model: dict[str, Any]
    epochs: int
    best_epoch: int
    batch_size: int
    rate: float
    schedule: str
    precision: str
    seed: int
    validation: dict[str, float]
    evaluations: tuple[Evaluation, ...] = ()  # one a split
    members: str = ""  # of a model that is several together: what they are, in words


def log(tracking_uri: str, card: Card) -> str:
    """Keeps the whole card with its run; returns it as a description of the model's version."""
    runs.log_bytes(tracking_uri, card.run_id, VALUES, json.dumps(config.plain(card), indent=2).encode())
    runs.log_bytes(tracking_uri, card.run_id, MARKDOWN, whole(card).encode())
    return render(card)


def add_evaluation(tracking_uri: str, version: ModelVersion, evaluation: Evaluation) -> None:
    """Writes the card of a registered model anew, with a split's scores in place of those that it may have had."""
    try:
        values = json.loads(runs.read_bytes(tracking_uri, version.run_id, VALUES))
    except ValueError:
        logger.warning("evaluate: %s has no card to add its scores to: it was not trained here", version.uri)
        return
    card = config.build(Card, values)
    others = [one for one in card.evaluations if one.split != evaluation.split]
    ordered = sorted([*others, evaluation], key=lambda one: one.split)
    text = log(tracking_uri, replace(card, evaluations=tuple(ordered)))
    runs.client(tracking_uri).update_model_version(version.name, version.version, text)


def render(card: Card) -> str:
    """The card as Markdown of at most `limits.DESCRIPTION` characters: as much of `whole` as a registry's column holds.

    Tables of subgroups go first, then those of flags, validation by class, settings, and scores by class; the card says
    so.
    """
    text = whole(card)
    for shorter in _shortened(card):
        if len(text) <= limits.DESCRIPTION:
            break
        text = f"{_LEFT_OUT}\n\n{whole(shorter)}"
    return text[: limits.DESCRIPTION]


def _shortened(card: Card) -> Iterator[Card]:
    """The card with ever less."""
    card = replace(card, evaluations=tuple(replace(one, groups=[]) for one in card.evaluations))
    yield card
    without = tuple(replace(one, failures=replace(one.failures, aurc={})) for one in card.evaluations)
    card = replace(card, evaluations=without)
    yield card
    of_all_classes = {name: value for name, value in card.validation.items() if name.count("/") == 1}
    card = replace(card, validation=of_all_classes)
    yield card
    card = replace(card, preprocess={}, label_settings={}, model={})
    yield card
    yield replace(card, evaluations=tuple(replace(one, classes={}, failures=Failures()) for one in card.evaluations))


def whole(card: Card) -> str:
    """The card as Markdown, with all its tables."""
    single = len(card.labels) == 1
    decision = f"foreground from a probability of {card.threshold:.4g}" if single else "the most probable class"
    told = "\n".join(_evaluation(one) for one in card.evaluations)
    return _CARD.format(
        name=card.name,
        labels=", ".join(card.labels),
        shape=" x ".join(map(str, card.shape)),
        decision=decision,
        limits="".join(f"- {limit}\n" for one in card.evaluations for limit in _limits(card, one)),
        digest=card.digest,
        split=", ".join(f"{split} {rows}" for split, rows in card.rows.items()),
        rows=sum(card.rows.values()),
        preprocess=card.preprocess,
        label_settings=card.label_settings,
        model=card.model,
        epochs=card.epochs,
        batch_size=card.batch_size,
        rate=card.rate,
        schedule=card.schedule,
        precision=card.precision,
        seed=card.seed,
        weights=card.members or f"The weights are those of epoch {card.best_epoch}.",
        validation="" if card.members else _validation(card),
        evaluations=told or _UNTESTED,
        run_id=card.run_id,
        again=_FOLDS_AGAIN if card.members else f"python -m jobs.train --set reproduce={card.run_id}",
    )


def _validation(card: Card) -> str:
    return _VALIDATION.format(
        chose=" and the threshold" if len(card.labels) == 1 and card.threshold_chosen else "",
        scores="\n".join(f"| {name} | {value:.4f} |" for name, value in card.validation.items()),
    )


def _evaluation(one: Evaluation) -> str:
    lines = [
        f"## Scores on {one.split}",
        "",
        f"{one.patients} patients, {one.slices} slices of prepared set `{one.digest}` ({one.rejected} could not be "
        "read), on the slices' own grid; 95 % intervals by bootstrap over patients, tolerance of nsd "
        f"{one.tolerance}. docs/reference/metrics.md defines the metrics.",
        "",
        *_table(("metric",), [((name,), one.metrics[name]) for name in _TOLD if name in one.metrics]),
    ]
    if len(one.classes) > 1:
        rows = [
            ((name, metric), of_class[metric])
            for name, of_class in one.classes.items()
            for metric in ("dice_pooled", "dice_per_case", "lesion_f1")
            if metric in of_class
        ]
        lines += ["", f"### {one.split} by class", "", *_table(("class", "metric"), rows)]
    lines += _failures(one)
    if one.groups:
        members = [
            ((group.name, f"{group.by}: {group.group}", str(group.patients)), group.metrics["dice_per_case"])
            for group in one.groups
            if "dice_per_case" in group.metrics
        ]
        lines += ["", f"### {one.split} by subgroup, dice_per_case", ""]
        lines += _table(("class", "group", "patients"), members)
    return "\n".join([*lines, ""])


def _failures(one: Evaluation) -> Iterator[str]:
    failures = one.failures
    if failures.aurc and failures.at_random is not None and failures.optimum is not None:
        yield ""
        yield f"### {one.split}: which flags find failures"
        yield ""
        yield (
            "Area under the risk-coverage curve, risk being 1 - Dice of a patient; lower is better: at random "
            f"{failures.at_random:.4g}, at best {failures.optimum:.4g}."
        )
        yield ""
        yield from _table(("flag",), [((flag,), ends) for flag, ends in failures.aurc.items()])
    if failures.covered:
        yield ""
        shares = ", ".join(f"{name} {covered} of {of}" for name, (covered, of) in failures.covered.items())
        yield f"Patients whose true volume lies in its 95 % interval: {shares}."


def _table(head: Sequence[str], rows: Sequence[tuple[Sequence[str], Ends]]) -> Iterator[str]:
    yield f"| {' | '.join([*head, 'value', '95 % interval'])} |"
    yield "|" + "---|" * (len(head) + 2)
    for cells, (value, low, high) in rows:
        interval = "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
        yield f"| {' | '.join([*cells, f'{value:.4g}', interval])} |"


def _limits(card: Card, one: Evaluation) -> Iterator[str]:
    """What the scores themselves say against the model, and against themselves."""
    if one.digest != card.digest:
        yield f"{one.split}: of another prepared set than the training's, which may share patients with it."
    if one.patients < 30:
        yield f"{one.split}: {one.patients} patients only, so intervals are wide or missing."
    missed, false = (_count(one.metrics, name) for name in ("cases_missed", "cases_false_alarms"))
    if missed:
        yield f"{one.split}: in {missed} of {one.patients} cases nothing was found though there is something."
    if false:
        yield f"{one.split}: in {false} of {one.patients} cases something was found though there is nothing."
    scored = [group for group in one.groups if "dice_per_case" in group.metrics and group.by == "size"]
    if scored:
        worst = min(scored, key=lambda group: group.metrics["dice_per_case"][0])
        dice, of = worst.metrics["dice_per_case"][0], f"{worst.patients} patient{'s' * (worst.patients != 1)}"
        yield f"{one.split}: weakest by size where {worst.name} is {worst.group} ({of}): Dice {dice:.2f} by case."


def _count(metrics: Mapping[str, Ends], name: str) -> int:
    return int(metrics[name][0]) if name in metrics else 0
