"""The recipe as text: what was seen stands beside what follows from it."""

import re

from rayseg.data.layouts import Layout
from rayseg.starter.facts import Facts

_HEAD = ("HEAD", "BRAIN", "SKULL", "NECK")
_YAML_WORDS = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")
_SHARE = 0.15
_PAIR = 2  # patients: nobody is left for a test
_WHO = {
    "table": "The CSV says which images are of one patient.",
    "folder": "The folder {patient} is one patient.",
    "name": "The first part of a name is the patient.",
    "volume": "Each volume is one patient.",
    "header": "The DICOM header says who the patient is.",
    "unknown": "",
}


def text(facts: Facts, folder: str, name: str) -> str:
    """The YAML of the recipe.

    Args:
        facts: of the folder.
        folder: as it was given; goes into the recipe.
        name: of the recipe, its runs and its model.
    """
    if facts.layout is None:
        return _without_labels(facts, folder, name)
    assert facts.classes is not None
    gpu = ["  gpus_per_worker: 1", "  num_workers: 1"] if facts.gpu else []
    lines = [
        f"# {facts.pairs} pairs of images and masks, about {facts.rows} slices; written by rayseg init.",
        f"# rayseg run {name}.yaml does all of it; rayseg JOB --help shows what else a section takes.",
        "common:",
        "  tracking_uri: sqlite:///work/mlflow.db",
        f"  prepared: work/{name}/prepared",
        f"  registered_model: {name}",
        "  key: pseudonym.key  # makes pseudonyms of patients; keep it, as the split depends on it",
        "",
        "catalog:",
        f"  source: {_quoted(folder)}",
        f"  output: work/{name}/manifest.parquet",
        *_layout(facts, facts.layout),
        "",
        "prepare:",
        f"  manifest: work/{name}/manifest.parquet",
        f"  output: work/{name}/prepared",
        *_preprocess(facts),
        *_labels(facts),
        *_split(facts),
        "",
        "train:",
        f"  storage: work/{name}/runs",
        f"  name: {name}",
        "  augment: {}  # turns, scales and brightens a little; null is off",
        f"  batch_size: {facts.batch_size}",
        f"  epochs: {facts.epochs}  # more of them may give a better model",
        "  learning_rate: 0.002",
        *gpu,
        "",
        "evaluate:",
        f"  model_uri: models:/{name}/latest",
        *(["  split: val  # with two patients nobody is left for a test"] if facts.patients == _PAIR else []),
        "",
        "promote:",
        f"  model_uri: models:/{name}/latest",
        *(["  metric: val/dice_pooled"] if facts.patients == _PAIR else []),
        "",
        "serve:",
        f"  model_uri: models:/{name}@champion",
    ]
    return "\n".join(lines) + "\n"


def _without_labels(facts: Facts, folder: str, name: str) -> str:
    lines = [
        f"# {facts.images} images without labels; written by rayseg init.",
        "# They can be cataloged, and segmented by a model that was trained elsewhere.",
        "common:",
        "  tracking_uri: sqlite:///work/mlflow.db  # where that model is registered",
        "  key: pseudonym.key  # makes pseudonyms of patients; keep it",
        "",
        "catalog:",
        f"  source: {_quoted(folder)}",
        f"  output: work/{name}/manifest.parquet",
        "",
        "segment:",
        f"  manifest: work/{name}/manifest.parquet",
        f"  model_uri: models:/{name}@champion  # name your model here",
        f"  output: work/{name}/segmentations",
        "  profiles: [seg, report]",
    ]
    return "\n".join(lines) + "\n"


def _layout(facts: Facts, layout: Layout) -> list[str]:
    assert facts.told_by is not None
    lines = [f"  # {line}" for line in (_WHO[facts.told_by.source],) if line]
    lines += ["  layout:", f"    images: {_quoted(str(layout.images))}", f"    masks: {_quoted(str(layout.masks))}"]
    if layout.missing_mask == "empty":
        lines += ["    missing_mask: empty  # an image without a mask has nothing to find; reject leaves it out"]
    if facts.told_by.source == "unknown":
        lines += [
            "    # Nothing tells which images are of one patient. Write this CSV into the source, a line an image:",
            "    #   file,group",
            f"    #   {_example(layout)},patient-1",
            "    # Without this line all images count as one patient, and nothing can be held out.",
        ]
    if layout.groups is not None:
        lines += [f"    groups: {_quoted(layout.groups)}"]
    return lines


def _example(layout: Layout) -> str:
    pattern = str(layout.images)
    return pattern.rpartition("/")[2] if "{" in pattern else "NAME-WITH-ENDING"


def _preprocess(facts: Facts) -> list[str]:
    size = f"[{facts.size}, {facts.size}]"
    why = f"images have {facts.median_px} pixels a side (median)"
    if facts.size < facts.median_px and not facts.gpu:
        why += "; larger is for a GPU"
    lines = ["  preprocess:", f"    size: {size}  # {why}"]
    if facts.modality == "CT":
        if any(part in facts.body_part.upper() for part in _HEAD):
            return [
                *lines,
                "    window: brain  # HU from 0 to 80; also subdural, stroke, bone",
                "    percentiles: null",
            ]
        lines += [
            "    # CT has fixed units: a window is better, as {center: 40, width: 400} for soft tissue, with null below"
        ]
        return [*lines, "    window: null", "    percentiles: [0.5, 99.5]"]
    lines += ["    percentiles: [0.5, 99.5]  # of each image's own values: their unit is not fixed"]
    return [*lines, "    color: true  # red, green and blue are three channels"] if facts.color else lines


def _labels(facts: Facts) -> list[str]:
    assert facts.classes is not None
    classes = facts.classes
    lines = ["  labels:", f"    names: [{', '.join(_quoted(name) for name in classes.names)}]"]
    if classes.threshold:
        lines += [f"    threshold: {classes.threshold}  # masks are not exactly black and white: JPEG, or smooth edges"]
    if classes.rule:
        lines += [f"    {classes.rule}:"]
        for marker, name in classes.mapping.items():
            key = str(marker) if isinstance(marker, int) else _quoted(marker, always=True)
            pixels = f"  # {classes.counts[name]} pixels in the masks looked at" if name in classes.counts else ""
            lines += [f"      {key}: {_quoted(name)}{pixels}"]
    return lines


def _split(facts: Facts) -> list[str]:
    patients = facts.patients
    if patients == _PAIR:
        return ["  split: {val: 1, test: 0, exact: true}  # of 2 patients: one trains, one validates"]
    told = "" if patients is None else f", of {patients} patients"
    return [f"  split: {{val: {_SHARE}, test: {_SHARE}, exact: true}}  # shares of the patients{told}"]


def _quoted(value: str, always: bool = False) -> str:
    """As YAML, in quotes where it needs them."""
    plain = re.fullmatch(r"[A-Za-z][\w/.-]*", value, re.ASCII) and value.lower() not in _YAML_WORDS
    if not always and plain:
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
