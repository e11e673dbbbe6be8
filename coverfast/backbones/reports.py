"""Loading weights: what fits, what does not, and that nothing is left out in silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from coverfast.checks import printable, require

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
        converted: number of tensors by the type that they had, where the network's is another.
    """

    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]
    adapted: list[str] = field(default_factory=list)
    converted: dict[str, int] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether every tensor found its place."""
        return not (self.missing or self.unexpected or self.reshaped)

    def __str__(self) -> str:
        """Counts of every outcome, and the first names of all but the matched."""
        return self._told(_SHOWN)

    @property
    def every(self) -> str:
        """The same with every name."""
        return self._told(None)

    def _told(self, limit: int | None) -> str:
        parts = [f"{len(self.matched)} matched"]
        parts += [f"{count} converted from {kind}" for kind, count in self.converted.items()]
        for outcome in ("adapted", "missing", "unexpected", "reshaped"):
            names = getattr(self, outcome)
            if names or outcome != "adapted":
                more = len(names) - (len(names) if limit is None else limit)
                shown = names[:limit] + ([f"and {more} more"] if more > 0 else [])
                parts.append(f"{len(names)} {outcome}" + (f" ({', '.join(shown)})" if names else ""))
        return printable(", ".join(parts))  # names are as a file has them


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
    for name in own.keys() & state.keys():
        _check_values(state[name], own[name], name, source)
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
        converted=Counter(
            str(v.dtype).removeprefix("torch.") for n, v in {**fitting, **adapted}.items() if v.dtype != own[n].dtype
        ),
    )
    require(report.whole or (not strict and bool(fitting or adapted)), f"{source} does not fit the network: {report}")
    with torch.no_grad():
        module.load_state_dict({**fitting, **adapted}, strict=False)
    return report


def _check_values(given: Tensor, own: Tensor, name: str, source: str) -> None:
    """Refuse what would lose its meaning in the type of the network, and weights that are no numbers."""
    same = given.is_floating_point() == own.is_floating_point() and given.is_complex() == own.is_complex()
    require(
        same,
        f"{source} must hold {str(own.dtype).removeprefix('torch.')} or the like for {printable(name)}, got "
        f"{str(given.dtype).removeprefix('torch.')}",
    )
    finite = not given.is_floating_point() or bool(given.isfinite().all())
    require(finite, f"{source} must hold finite numbers, but {printable(name)} has others")


def _spreads(given: Tensor, own: Tensor, channels: int) -> bool:
    """Whether it is the weight of a convolution of one channel where there is one of `channels`."""
    if own.ndim not in (4, 5) or given.ndim != own.ndim or own.shape[1] != channels or channels < 2:
        return False
    return given.shape[1] == 1 and given.shape[2:] == own.shape[2:] and given.shape[0] == own.shape[0]


def _spread(given: Tensor, own: Tensor) -> Tensor:
    return (given / own.shape[1]).expand_as(own)
