"""What MLflow's tables hold. PostgreSQL refuses more, in the middle of a run; SQLite, on a laptop, takes anything.

| column (MLflow 3.17)                     | characters | what becomes of more                    |
|------------------------------------------|-----------:|-----------------------------------------|
| experiments.name, registered_models.name |        256 | refused at the start                    |
| runs.name                                |        250 | cut                                     |
| key of params, metrics and tags          |        250 | cut, with a digest                      |
| params.value (MLflow takes fewer)        |       6000 | cut; whole in the run's artifact UNCUT  |
| tags.value                               |       8000 | cut; of a new run whole in UNCUT, too   |
| datasets.name                            |        500 | cut                                     |
| datasets.digest                          |         36 | cut                                     |
| model_versions.description               |       5000 | the card leaves tables out, see `card`  |
| registered_model_tags.key                |        250 | an alias is refused before it moves     |

Nothing of ours comes near the others: sources of data sets (65,535) and their profiles, tags of registered models
(5000) and of versions (text), parameters of logged models (text; keys 255). Where artifacts lie is the server's:
runs.artifact_uri holds 200, so the root may have 130. NaN and infinity have their place in every store.
"""

import hashlib

EXPERIMENT = MODEL = 256
RUN_NAME = 250
KEY = 250
PARAM, TAG = 6000, 8000
DATASET_NAME, DATASET_DIGEST = 500, 36
DESCRIPTION = 5000
ALIAS = 200  # of MLflow's 255, as the keys of our tags have more beside it

UNCUT = "uncut.json"  # a run's artifact: `params` and `tags` of which the columns hold but the beginning
_CUT = " [...]"
_DIGEST = 8  # hex digits of keys that are cut


def text(value: str, most: int) -> str:
    """At most so many characters, with a mark where it is cut, and only such as every database takes."""
    storable = value.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode("utf-8")
    return storable if len(storable) <= most else storable[: most - len(_CUT)] + _CUT


def key(name: str) -> str:
    """At most KEY characters; two that differ still do."""
    if len(name) <= KEY:
        return name
    return f"{name[: KEY - _DIGEST - 1]}-{hashlib.sha256(name.encode()).hexdigest()[:_DIGEST]}"


def require(what: str, name: str, most: int) -> None:
    """Raises ValueError, which names the key `what`, where a name is too long to be found by."""
    if len(name) > most:
        raise ValueError(f"{what}: at most {most} characters expected, as MLflow's databases hold, got {len(name)}")
