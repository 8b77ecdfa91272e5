"""What became of an archive's objects that have no mask, counted, and what of that is new: there may be millions."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rayseg.data.objects import Place
from rayseg.inference.ledger import CATALOG
from rayseg.inference.series import STAGE
from rayseg.records import Reject


@dataclass
class Refusals:
    """Rows of `records.REJECTS` by reason."""

    reasons: Counter[str] = field(default_factory=Counter)
    of_run: Counter[str] = field(default_factory=Counter)  # of these, what the catalog had accepted
    earlier: Counter[str] = field(default_factory=Counter)  # of what runs before this one have done, by the ledger
    details: dict[str, str] = field(default_factory=dict)  # of one of each reason, which says something if any does

    def add(self, rejects: Iterable[Mapping[str, Any]]) -> None:
        """Counts more of them."""
        for reject in rejects:
            reason = reject["reason"]
            self.reasons[reason] += 1
            self.of_run[reason] += reject["stage"] == STAGE
            self.details[reason] = self.details.get(reason) or reject["detail"] or ""

    def against(self) -> dict[str, int]:
        """What counts against the budget, sorted: all that the output lacks now, whichever run refused it."""
        return dict(sorted((self.of_run + self.earlier).items()))

    def counts(self) -> dict[str, int]:
        """How many of each reason, sorted."""
        return dict(sorted(self.reasons.items()))


class News:
    """What a manifest says of refused objects that the table of rejects does not say yet.

    An object of the manifest is refused there as the catalog refuses it now, and else no more.
    """

    def __init__(self, told: Mapping[Place, Reject]) -> None:
        self._left = dict(told)
        self._objects = {uri for uri, _ in told}
        self._met: set[str] = set()

    def of(self, refused: Sequence[dict[str, Any]], accepted: Iterable[str]) -> list[dict[str, Any]]:
        """Those of the rejects that are to be written; `accepted` are other objects of the manifest."""
        news = []
        for one in refused:
            if one["stage"] == CATALOG:
                known = self._left.pop((one["uri"], one["frame"]), None)
                if known is not None and (known.reason, known.detail) == (one["reason"], one["detail"]):
                    continue
            news.append(one)
        if self._objects:
            self._met.update(uri for uri in (*(one["uri"] for one in refused), *accepted) if uri in self._objects)
        return news

    def over(self) -> list[dict[str, Any]]:
        """At the end: rejects without a reason, of what is refused no more."""
        return [
            {"uri": uri, "frame": frame, "stage": CATALOG, "reason": None, "series_key": None}
            for uri, frame in self._left
            if uri in self._met
        ]
