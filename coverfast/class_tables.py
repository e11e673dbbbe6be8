"""The two class tables of a shard: what the values of its label maps mean, and the names of its images' classes."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coverfast.checks import InputError, require
from coverfast.samples import LONGEST_TEXT, MOST_CLASSES, LabelClass

LabelTable = Mapping[int, str] | Sequence[LabelClass]
BACKGROUND = "background"
# Labels looked at in one go.
_SLAB = 1 << 20


class ClassTables:
    """The tables of a shard that is being written, or of several that are to agree.

    label_classes, target_classes: the tables if they are given; what is admitted must then be in them. None: the
    table is what was met, a value that nobody named by its number. Value 0 is in every table, "background" unless
    named. `InputError`: a table of more than `MOST_CLASSES`, of names that are empty, not different, or together
    longer than an attribute holds, and of values that are no uint32.
    """

    def __init__(self, label_classes: LabelTable | None = None, target_classes: Sequence[str] | None = None) -> None:
        self._known = None if label_classes is None else _label_names(label_classes)
        self._names: dict[int, str] = dict(self._known or {})
        self._named_by: dict[int, str] = {}
        self._values: set[int] = {0, *self._names}
        self._labelled: tuple[bool, str] | None = None
        if self._known is not None:
            self._labelled = True, ""
            _check_label_table(self.label_classes)
        given = None if target_classes is None else _target_names(target_classes)
        self._known_targets = given
        self._targets: set[str] = set(given or ())
        # Orders that names came in: one that all share is kept.
        self._orders: set[tuple[str, ...]] = set() if given is None else {given}
        self.targeted = given is not None

    @property
    def labelled(self) -> bool:
        """Whether there are label maps."""
        return self._labelled is not None and self._labelled[0]

    @property
    def label_classes(self) -> tuple[LabelClass, ...]:
        """The classes of the label maps so far, by value; empty without label maps."""
        return _label_table(self._values, self._names) if self.labelled else ()

    @property
    def target_classes(self) -> tuple[str, ...]:
        """The names of the images' classes so far: sorted, but for an order that was given."""
        return _in_order(self._targets, self._orders)

    @property
    def given_targets(self) -> bool:
        """Whether the target classes were given."""
        return self._known_targets is not None

    def options(self) -> dict[str, Any]:
        """The tables as `ShardWriter` takes them."""
        return {
            "label_classes": self.label_classes if self.labelled else None,
            "target_classes": self.target_classes if self.targeted else None,
        }

    def has_all(self, values: Iterable[int]) -> bool:
        """Whether none of these label values would be refused for not being in a given table."""
        return self._known is None or self._known.keys() >= set(values)

    def admit(
        self,
        source: str,
        values: Iterable[int] | None,
        target: str = "",
        *,
        names: Mapping[int, str] | None = None,
        targets: Sequence[str] = (),
    ) -> None:
        """Take in the values of a sample's label map and its target, or the tables `names` and `targets` of a shard.

        values: None for no label map. `InputError`, naming the source, changes nothing: label maps where others have
        none, or none where others have; what is not in a given table; a value with another name than it has; too many
        classes.
        """
        at, named = f"{source}: ", dict(names or {})
        has, first = self._labelled or (values is not None, source)
        like = f" like {first}" if first else " where label_classes are given"
        require(
            has == (values is not None),
            f"{source} must have {'a' if has else 'no'} label map{like}, got {'none' if has else 'one'} (all samples "
            "of a shard have one or none has)",
        )
        met, more = set(values or ()), {target, *targets} - {""}
        if self._known is not None:
            known = sorted(self._known)
            _check_known(f"{at}label values", sorted(met - self._known.keys()), "label_classes", known)
            named = {}
        if self._known_targets is not None:
            _check_known(f"{at}target", sorted(more - self._targets), "target_classes", self._known_targets)
        for value, name in named.items():
            other = self._names.get(value, name)
            require(
                other == name,
                f"{at}label value {value} must be {other!r} as in {self._named_by.get(value, '')}, got {name!r}",
            )
        # Nothing is kept until all is found in order.
        all_names, all_values = self._names | named, self._values | met
        if not (met <= self._values and all_names == self._names):
            _check_label_table(_label_table(all_values, all_names), at)
        if not more <= self._targets:
            _check_target_table(tuple(sorted(self._targets | more)), at)
        self._labelled = has, first
        self._named_by = dict.fromkeys(named, source) | self._named_by
        self._names, self._values = all_names, all_values
        self._targets |= more
        self.targeted = self.targeted or bool(more)
        if targets and self._known_targets is None:
            self._orders.add(tuple(targets))


def values_of(labels: NDArray[Any], source: str) -> list[int]:
    """The values of a label map, sorted; `InputError`, naming the source, if there are more than `MOST_CLASSES`."""
    flat, found = labels.reshape(-1), np.empty(0, labels.dtype)
    for start in range(0, flat.size, _SLAB):
        found = np.union1d(found, np.unique(flat[start : start + _SLAB]))
        if len(found) > MOST_CLASSES:
            raise InputError(
                f"{source}: label map must have at most {MOST_CLASSES} values, got at least {len(found)}, is it an "
                "image?"
            )
    return [int(value) for value in found]


class ClassIndices:
    """From label values to class indices: called with labels of any shape, gives uint8 of that shape.

    `InputError` if a value is in none of the classes.
    """

    def __init__(self, classes: Sequence[LabelClass]) -> None:
        self._values = np.array([value for value, _ in classes], np.uint32)
        self._numbered = bool((self._values == np.arange(len(classes))).all())
        self._tables: dict[int, NDArray[np.int16]] = {}

    def __call__(self, labels: NDArray[Any]) -> NDArray[np.uint8]:
        """See the class."""
        if self._numbered and int(labels.max(initial=0)) < len(self._values):
            return labels.astype(np.uint8, copy=False)
        if labels.dtype.itemsize <= 2:
            found = np.take(self._table(8 * labels.dtype.itemsize), labels)
        else:
            at = np.minimum(np.searchsorted(self._values, labels), len(self._values) - 1).astype(np.int16)
            found = np.where(self._values[at] == labels, at, np.int16(-1))
        if int(found.min(initial=0)) < 0:
            raise InputError(
                f"label values must be of the shard's table ({_some(self._values)}), got "
                f"{_some(np.unique(labels[found < 0]))}"
            )
        return found.astype(np.uint8)

    def _table(self, bits: int) -> NDArray[np.int16]:
        """The index of every number of so many bits, -1 for none."""
        if bits not in self._tables:
            table = np.full(1 << bits, -1, np.int16)
            inside = self._values[self._values < 1 << bits]
            table[inside] = np.arange(len(inside))
            self._tables[bits] = table
        return self._tables[bits]


def table_text(classes: Sequence[LabelClass] | Sequence[str]) -> bytes:
    """A table as JSON: a list of {"value", "name"} or of names."""
    plain = [{"value": c.value, "name": c.name} if isinstance(c, LabelClass) else c for c in classes]
    return json.dumps(plain).encode()


def read_label_table(text: str) -> tuple[LabelClass, ...]:
    """The label classes that `table_text` wrote; `InputError` if they make no table."""
    listed = json.loads(text)
    table = tuple(LabelClass(operator.index(c["value"]), c["name"]) for c in listed)
    _check_label_table(table)
    return table


def read_target_table(text: str) -> tuple[str, ...]:
    """The names that `table_text` wrote; `InputError` if they make no table."""
    table = tuple(json.loads(text))
    _check_target_table(table)
    return table


def _label_names(given: LabelTable) -> dict[int, str]:
    try:
        pairs = [
            (operator.index(value), name) for value, name in (given.items() if isinstance(given, Mapping) else given)
        ]
    except (TypeError, ValueError) as error:
        raise InputError(f"label_classes must be pairs of an integer value and a name, got {given!r:.80}") from error
    names = dict(pairs)
    require(len(names) == len(pairs), f"label_classes must name a value once, got {given!r:.80}")
    return {0: BACKGROUND} | names


def _target_names(given: Sequence[str]) -> tuple[str, ...]:
    listed = isinstance(given, Sequence) and not isinstance(given, str | bytes)
    require(listed, f"target_classes must be a sequence of names, got {given!r:.80}")
    _check_target_table(given)
    return tuple(given)


def _label_table(values: Iterable[int], names: Mapping[int, str]) -> tuple[LabelClass, ...]:
    default = {0: BACKGROUND}
    return tuple(LabelClass(v, names.get(v, default.get(v, str(v)))) for v in sorted(values))


def _in_order(names: set[str], orders: set[tuple[str, ...]]) -> tuple[str, ...]:
    if len(orders) == 1 and set(one := next(iter(orders))) == names:
        return one
    return tuple(sorted(names))


def _check_label_table(table: Sequence[LabelClass], at: str = "") -> None:
    values = [value for value, _ in table]
    require(
        all(0 <= v < 2**32 for v in values) and values == sorted(set(values)) and values[:1] == [0],
        f"{at}label values must be integers in [0, 2^32), rising from 0, got {_some(values)}",
    )
    _check_names("label", [name for _, name in table], table_text(table), at)


def _check_target_table(table: Sequence[str], at: str = "") -> None:
    _check_names("target", table, table_text(table) if all(isinstance(n, str) for n in table) else b"", at)


def _check_names(kind: str, names: Sequence[str], text: bytes, at: str) -> None:
    for name in names:
        sound = isinstance(name, str) and name != "" and "\0" not in name
        require(sound, f"{at}the name of a {kind} class must be a string, not empty and without NUL, got {name!r:.80}")
    require(
        len(names) <= MOST_CLASSES,
        f"{at}a shard must have at most {MOST_CLASSES} {kind} classes, got {len(names)}",
    )
    twice = sorted({name for name in names if list(names).count(name) > 1})
    require(not twice, f"{at}{kind} classes must have different names, got {_some(map(repr, twice))} twice")
    require(
        len(text) <= LONGEST_TEXT,
        f"{at}the names of the {kind} classes must be at most {LONGEST_TEXT} bytes together, got {len(text)}",
    )


def _check_known(what: str, strange: Sequence[Any], table: str, known: Sequence[Any]) -> None:
    require(not strange, f"{what} must be of the given {table} ({_some(known)}), got {_some(strange)}")


def _some(values: Iterable[Any]) -> str:
    """Some of them, as part of a sentence."""
    texts = [str(value) for value in values]
    more = f" and {len(texts) - 10} more" if len(texts) > 10 else ""
    return ", ".join(texts[:10]) + more
