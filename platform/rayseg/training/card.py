"""The model card: what a registered model is, for who finds it in the registry and did not train it."""

from rayseg import __version__
from rayseg import config as configuration
from rayseg.data.prepared import PreparedSet
from rayseg.training.settings import TrainConfig
from rayseg.training.state import State

_CARD = """\
# {name}

**Research software, not a medical device.** This model may not guide the care of a patient.

Segments {labels} in single slices, after Mitchell et al. 2019 (arXiv:1810.03993).

## Use

- Input: a CT or MR slice (DICOM, PNG, JPEG, TIFF). The bundle's `Preprocess` makes the network's input of it: {shape}.
- Output: a label map on the slice's own grid; {decision}.
- Not shown to work on: other scanners, protocols, body parts or patients than those of the training data.

## Data

- Prepared set `{digest}`, split by patient ({split}): {rows} rows.
- Preprocess: `{preprocess}`
- Labels: `{label_settings}`

## Training

- Network: `{model}`
- {epochs} epochs, batch {batch_size}, learning rate {rate:.3g} ({schedule}), {precision}, seed {seed}; the weights are
  those of epoch {best_epoch}.
- MLflow run `{run_id}` holds the whole configuration, the split, the code's digest and the environment;
  `python -m jobs.train --set reproduce={run_id}` repeats it.

## Scores

On the validation patients, which chose the epoch, all pixels together, at the network's size (the evaluate job scores
held-out patients on the slices' own grid):

| | value |
|---|---|
{scores}
"""


def card(config: TrainConfig, prepared: PreparedSet, state: State, run_id: str) -> str:
    """Markdown about the model that the run gave: use, data, training, scores on validation."""
    best_epoch, best = state.best()
    names = prepared.labels.names
    lines = [
        f"| {name} | {value:.4f} |" for name, value in best.items() if name.startswith("val/") and value is not None
    ]
    return _CARD.format(
        name=f"{config.registered_model} {__version__}",
        labels=", ".join(names),
        shape=" x ".join(map(str, prepared.shape)),
        decision=f"foreground from a probability of {config.threshold}"
        if len(names) == 1
        else "the most probable class",
        digest=prepared.digest[:16],
        split=", ".join(f"{split} {rows}" for split, rows in prepared.rows.items()),
        rows=sum(prepared.rows.values()),
        preprocess=configuration.plain(prepared.preprocess),
        label_settings=configuration.plain(prepared.labels),
        model=configuration.plain(config.model.resolved()),
        epochs=state.epoch,
        batch_size=config.batch_size,
        rate=config.scaled_learning_rate,
        schedule=config.schedule,
        precision=config.mixed_precision,
        seed=config.seed,
        best_epoch=best_epoch,
        run_id=run_id,
        scores="\n".join(lines),
    )
