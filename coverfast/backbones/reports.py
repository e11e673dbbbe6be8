"""Loading weights: what fits, what does not, and that nothing is left out in silence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from coverfast.checks import require

_SHOWN = 3


@dataclass(frozen=True)
class LoadReport:
    """What a set of tensors did to a network: names by outcome.

    Attributes:
        matched: loaded as they are.
        missing: of the network, and not given.
        unexpected: given, and not of the network.
        reshaped: given in another shape, and not loaded.
        adapted: first convolutions of one channel, loaded for several.
    """

    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]
    adapted: list[str] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether every tensor found its place."""
        return not (self.missing or self.unexpected or self.reshaped)

    def __str__(self) -> str:
        """Counts of every outcome, and the first names of all but the matched."""
        parts = [f"{len(self.matched)} matched"]
        for outcome in ("adapted", "missing", "unexpected", "reshaped"):
            names = getattr(self, outcome)
            if names or outcome != "adapted":
                shown = names[:_SHOWN] + ([f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else [])
                parts.append(f"{len(names)} {outcome}" + (f" ({', '.join(shown)})" if names else ""))
        return ", ".join(parts)


def load_state(
    module: nn.Module, state: Mapping[str, Tensor], source: str, *, strict: bool = True, adapt: int = 0
) -> LoadReport:
    """Load tensors into a network, all of them or none.

    Args:
        module: the network.
        state: tensors by name.
        source: where they come from, for messages.
        strict: whether every tensor of the network must be there with its shape, and no other. False loads what fits.
        adapt: N channels that images have where the tensors may be those of a network for one; 0: leave them. An
            image repeated in all N channels then gives what it gave in one: every weight is that of the one over N.

    Raises:
        InputError: with the report, when a tensor does not fit and `strict` says that all must, or when none does.
    """
    own = module.state_dict()
    fitting = {n: state[n] for n in own if n in state and state[n].shape == own[n].shape}
    adapted = {n: _spread(state[n], own[n]) for n in own if n in state and _spreads(state[n], own[n], adapt)}
    report = LoadReport(
        matched=list(fitting),
        missing=[n for n in own if n not in state],
        unexpected=[n for n in state if n not in own],
        reshaped=[
            f"{n} {tuple(state[n].shape)} for {tuple(own[n].shape)}"
            for n in own
            if n in state and n not in fitting and n not in adapted
        ],
        adapted=[f"{n} from 1 to {own[n].shape[1]} channels, each weight over {own[n].shape[1]}" for n in adapted],
    )
    require(report.whole or (not strict and bool(fitting or adapted)), f"{source} does not fit the network: {report}")
    with torch.no_grad():
        module.load_state_dict({**fitting, **adapted}, strict=False)
    return report


def _spreads(given: Tensor, own: Tensor, channels: int) -> bool:
    """Whether it is the weight of a convolution of one channel where there is one of `channels`."""
    if own.ndim not in (4, 5) or given.ndim != own.ndim or own.shape[1] != channels or channels < 2:
        return False
    return given.shape[1] == 1 and given.shape[2:] == own.shape[2:] and given.shape[0] == own.shape[0]


def _spread(given: Tensor, own: Tensor) -> Tensor:
    return (given / own.shape[1]).expand_as(own)
