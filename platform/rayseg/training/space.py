"""The space of a sweep: which keys of the train section take which values, and what each trial draws from it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from ray import tune
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.sample import Categorical, Domain

from rayseg import config as configuration
from rayseg.training.settings import TrainConfig

_KINDS = {"loguniform": tune.loguniform, "uniform": tune.uniform, "randint": tune.randint, "choice": tune.choice}
# Where a trial is and what it takes: the sweep sees to it, and scores do not depend on it. `epochs` is the budget, by
# which trials are compared.
_FIXED = (
    *("prepared", "storage", "tracking_uri", "experiment", "name", "registered_model", "reproduce", "epochs"),
    *("num_workers", "cpus_per_worker", "gpus_per_worker", "resources", "max_failures", "hang_timeout_s"),
)
_SCORE = "score"


class Space:
    """What trials draw, each by its number.

    Args:
        spec: a distribution a key, `{"learning_rate": {"loguniform": [1e-4, 1e-2]}}`; dots lead into groups of keys.
        points: values of the first trials, each of every key; the others are drawn.
        train: the run that they change.

    Raises:
        ValueError: a key that there is not or that a sweep keeps, no such distribution, a value that the key does not
            take, or a point out of the space.
    """

    def __init__(self, spec: Mapping[str, Mapping[str, Any]], points: Sequence[Mapping[str, Any]], train: TrainConfig):
        if not spec:
            raise ValueError("tune.space: empty; name a key of the train section and its distribution")
        self._domains = {key: _domain(key, given) for key, given in spec.items()}
        self._points, self._train = points, train
        for key, domain in self._domains.items():
            ends = domain.categories if isinstance(domain, Categorical) else (domain.lower, _highest(domain))
            for value in ends:
                self._try({key: value}, f"tune.space.{key}")
        for number, point in enumerate(points):
            _check_point(point, self._domains, f"tune.points.{number}")
            self._try(point, f"tune.points.{number}")

    def changed(self, values: Mapping[str, Any], **more: Any) -> TrainConfig:
        """The run with these values by dotted key, and `more`."""
        plain = configuration.plain(self._train)
        for key, value in {**values, **more}.items():
            configuration.put(plain, key, value)
        return configuration.build(TrainConfig, plain)

    def draw(self, number: int, seed: int) -> dict[str, Any]:
        """At random: a function of the seed and the number alone."""
        if number < len(self._points):
            return dict(self._points[number])
        random = np.random.RandomState([seed, number])
        return {key: domain.sample(random_state=random) for key, domain in self._domains.items()}

    def optuna(self, seed: int) -> "OptunaDraws":
        """Drawn by Optuna."""
        return OptunaDraws(self._domains, self._points, seed)

    def _try(self, values: Mapping[str, Any], where: str) -> None:
        if values.get("mixed_precision") == "auto":
            raise ValueError(f"{where}: float32, mixed_bfloat16 or mixed_float16 expected; auto is one of these")
        try:
            self.changed(values)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


class OptunaDraws:
    """Draws of Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), a function of the calls so far."""

    def __init__(self, domains: Mapping[str, Domain], points: Sequence[Mapping[str, Any]], seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        space = OptunaSearch.convert_search_space(domains)
        self._search = OptunaSearch(
            space, metric=_SCORE, mode="max", seed=seed, points_to_evaluate=[dict(point) for point in points]
        )

    def ask(self, number: int) -> dict[str, Any]:
        """The values of trial `number`; once, in order."""
        return dict(self._search.suggest(str(number)))

    def tell(self, number: int, score: float | None) -> None:
        """What trial `number` scored, None where it failed; once."""
        result = {} if score is None else {_SCORE: score}
        self._search.on_trial_complete(str(number), result, error=score is None)


def _domain(key: str, given: Any) -> Domain:
    where = f"tune.space.{key}"
    if key.split(".")[0] in _FIXED:
        raise ValueError(f"{where}: not to be tuned; a sweep keeps it as the train section has it")
    kinds = ", ".join(_KINDS)
    if not isinstance(given, Mapping) or len(given) != 1 or next(iter(given)) not in _KINDS:
        raise ValueError(f"{where}: one of {kinds} expected, as in {{loguniform: [1e-4, 1e-2]}}, got {given!r:.80}")
    [(kind, values)] = given.items()
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(f"{where}.{kind}: a list expected, got {values!r:.80}")
    if kind == "choice":
        return tune.choice(list(values))
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if len(values) != 2 or not numbers or not values[0] < values[1]:
        raise ValueError(f"{where}.{kind}: [low, high] expected, two numbers, the lower one first, got {values!r:.80}")
    if kind == "loguniform" and values[0] <= 0:
        raise ValueError(f"{where}.loguniform: positive numbers expected, got {values!r:.80}")
    if kind == "randint" and not all(isinstance(value, int) for value in values):
        raise ValueError(f"{where}.randint: whole numbers expected, got {values!r:.80}")
    return _KINDS[kind](*values)


def _check_point(point: Mapping[str, Any], domains: Mapping[str, Domain], where: str) -> None:
    if point.keys() != domains.keys():
        raise ValueError(f"{where}: a value of each key of tune.space expected ({', '.join(domains)}), got {point!r}")
    for key, value in point.items():
        domain = domains[key]
        within = (
            value in domain.categories
            if isinstance(domain, Categorical)
            else isinstance(value, int | float) and domain.lower <= value <= _highest(domain)
        )
        if not within:
            raise ValueError(f"{where}.{key}: a value within tune.space.{key} expected, got {value!r}")


def _highest(domain: Any) -> float:
    """The upper end; Ray leaves out that of whole numbers."""
    return domain.upper - 1 if isinstance(domain, type(tune.randint(0, 2))) else domain.upper
