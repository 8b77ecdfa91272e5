"""What became of an archive's objects that have no mask, counted: there may be millions."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rayseg.inference.series import STAGE


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
