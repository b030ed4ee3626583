"""The load policy: under load a smaller budget may answer, within what operator and request allow (ours).

All that give way are answered within the same budget, and not each a little less: those of one budget share a batch,
and a batch more costs what smaller budgets save.
"""

from dataclasses import dataclass

from flextron_lit.serving.offer import Offered


@dataclass(frozen=True)
class LoadPolicy:
    """When requests give way, and to what."""

    budget: Offered | None = None
    """What answers under load; None means that nothing gives way."""
    requests: int = 8
    """So many in the house, running and waiting, are load; half as many are none any more."""

    def pressed(self, before: bool, requests: int) -> bool:
        """Whether there is load.

        Args:
            before: whether there was.
            requests: in the house now, the new one among them.
        """
        if self.budget is None:
            return False
        # apart, so that the budget does not change with every request that comes or goes
        return requests > self.requests // 2 if before else requests >= self.requests

    def answered(self, asked: Offered, least: Offered | None, pressed: bool) -> Offered:
        """What answers a request: never more than it asks for.

        Args:
            asked: what it asks for.
            least: what it bears at least; None leaves that to the operator.
            pressed: whether there is load.
        """
        if not pressed or self.budget is None:
            return asked
        given = self.budget if least is None or least.size <= self.budget.size else least
        return given if given.size < asked.size else asked
