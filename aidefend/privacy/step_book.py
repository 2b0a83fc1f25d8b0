"""Which batch is open, which step it pays for, how many steps are spent: the order of calls that keeps epsilon true."""

from collections.abc import Callable

from torch import Tensor

from aidefend._core.checks import expected
from aidefend._core.errors import AidefendError, BudgetExceeded, PrivacyError

_LOOP = "Keep to: for x, y in private.loader: zero_grad(), private.loss(private.model(x), y).backward(), step()"


class Ticket:
    """One batch of the loader: it pays for one backward pass and one step."""

    def __init__(self, number: int, rows: int, units: Tensor | None = None) -> None:
        self.number, self.rows = number, rows
        self.units = units  # (rows,) whose rows they are; None: each row stands for itself
        self.graded = False  # its gradient waits for the step
        self.released = False  # its noisy gradient was made, and may have been seen
        self.closed = False


class StepBook:
    """Counts steps when their batch is drawn, so that a step that is aborted or crashes is charged."""

    def __init__(self, steps: int, reserve: Callable[[int], None]) -> None:
        self._steps = steps
        self._reserve = reserve
        self._ticket: Ticket | None = None
        self._stale = False
        self._stray = False
        self.charged = 0
        self.released = False

    @property
    def remaining(self) -> int:
        """Steps that are left."""
        return self._steps - self.charged

    @property
    def open_ticket(self) -> Ticket | None:
        """The batch that waits for its step."""
        if self._ticket is None or self._ticket.closed or self.released:
            return None
        return self._ticket

    def check_remaining(self) -> None:
        """Refuse to go on with nothing left."""
        if self.released:
            raise refused("a run that is not released", "released", True, "Call make_private again")
        if self.remaining <= 0:
            cure = "The budget of this run is spent; a further run is another config, and composes with this one"
            raise BudgetExceeded(expected(f"fewer than {self._steps} steps", "steps taken", self.charged, cure))

    def draw(self, rows: int, units: Tensor | None = None) -> Ticket:
        """Charge one step and open its batch; an earlier open batch is void (and stays charged)."""
        self.check_remaining()
        self._reserve(self.charged + 1)
        self.charged += 1
        before = self.open_ticket
        if before is not None:
            self._stale = self._stale or before.graded
            before.closed = True
        self._ticket = Ticket(self.charged, rows, units)
        return self._ticket

    def begin_backward(self, losses: int) -> Ticket | None:
        """The batch these losses belong to; None marks gradients without a batch, which the next step refuses."""
        ticket = self.open_ticket
        if ticket is None:
            self._stray = True
            return None
        self._refuse_stale()
        if ticket.released:
            cure = "Add up all losses of a batch and call backward once"
            raise refused("one backward pass for each batch", "backward passes", 2, cure)
        if losses != ticket.rows:
            raise refused(f"one loss for each of the {ticket.rows} rows of the batch", "losses", losses, _LOOP)
        return ticket

    def begin_step(self) -> Ticket:
        """The batch this step closes; refuses everything that is not exactly one graded batch of the loader."""
        ticket = self.open_ticket
        if ticket is None:
            self.check_remaining()
        if self._stray or ticket is None:
            raise refused("gradients of an open batch of private.loader", "batch", None, _LOOP)
        self._refuse_stale()
        if not ticket.graded:
            cure = "Call private.loss(private.model(x), y).backward() or private.backward(losses) first"
            raise refused("a backward pass through private.loss", "gradients", None, cure)
        return ticket

    def discard(self) -> None:
        """`zero_grad`: what was computed so far is dropped; the steps stay charged."""
        self._stale = self._stray = False
        if self._ticket is not None:
            self._ticket.graded = False

    def _refuse_stale(self) -> None:
        if self._stale:
            cure = (
                "Gradients cannot be added up over batches: raise expected_batch_size and bound the memory with "
                "microbatch. To drop the earlier batch call private.optimizer.zero_grad()"
            )
            raise refused("a step (or zero_grad) after each backward pass", "batches with gradients", 2, cure)


def refused(rule: str, name: str, value: object, cure: str) -> AidefendError:
    """A `PrivacyError` in the one form."""
    return PrivacyError(expected(rule, name, value, cure))
