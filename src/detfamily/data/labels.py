"""Which category of a data set each column of the class head stands for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from detfamily.errors import DataError, nearest


@dataclass(frozen=True)
class LabelMap:
    """One entry for every column of the class head; saved with the weights, used by training and evaluation alike.

    A label is a column (0 .. ``num_classes`` - 1); a category id is the number that the annotation file uses. Make one
    with ``contiguous`` (the rule) or ``by_category_id`` (heads of the official COCO checkpoints).

    Attributes:
        category_ids: the category id of each column, None where the column stands for nothing.
        names: the category name of each column, None where the column stands for nothing.

    Raises:
        DataError: no category at all, an id or a name that occurs twice, a column with only one of the two.
    """

    category_ids: tuple[int | None, ...]
    names: tuple[str | None, ...]
    _labels: dict[int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.category_ids) != len(self.names):
            raise DataError(f"{len(self.category_ids)} category ids but {len(self.names)} names in the label map")
        labels: dict[int, int] = {}
        seen: dict[str, int] = {}
        for label, (category_id, name) in enumerate(zip(self.category_ids, self.names, strict=True)):
            if (category_id is None) != (name is None):
                raise DataError(f"column {label} of the label map needs both an id and a name, or neither")
            if category_id is None or name is None:
                continue
            if category_id in labels:
                raise DataError(
                    f"category id {category_id} occurs twice: {self.names[labels[category_id]]!r}, {name!r}"
                )
            if name in seen:
                raise DataError(f"category name {name!r} occurs twice: ids {seen[name]} and {category_id}")
            labels[category_id] = label
            seen[name] = category_id
        if not labels:
            raise DataError("the data set has no categories: 'categories' is empty, so there is nothing to detect")
        object.__setattr__(self, "_labels", labels)

    @classmethod
    def contiguous(cls, categories: Iterable[Mapping[str, Any]]) -> LabelMap:
        """Labels 0 .. K-1 in the order of the category ids.

        Args:
            categories: entries with ``id`` and ``name``, as in the ``categories`` of a COCO json.
        """
        pairs = sorted(_id_and_name(category) for category in categories)
        return cls(tuple(category_id for category_id, _ in pairs), tuple(name for _, name in pairs))

    @classmethod
    def by_category_id(cls, categories: Iterable[Mapping[str, Any]]) -> LabelMap:
        """Column i stands for category id i, as in the 91-column heads of the official COCO checkpoints.

        Args:
            categories: entries with ``id`` and ``name``, as in the ``categories`` of a COCO json.
        """
        pairs = [_id_and_name(category) for category in categories]
        if any(category_id < 0 for category_id, _ in pairs):
            raise DataError("data.labels=category_id needs category ids of 0 or more; use data.labels=contiguous")
        contiguous = cls.contiguous([{"id": category_id, "name": name} for category_id, name in pairs])
        columns = max(category_id for category_id, _ in pairs) + 1
        if columns > 10_000:
            raise DataError(
                f"data.labels=category_id would need a head of {columns} columns for {len(pairs)} categories; "
                "use data.labels=contiguous"
            )
        names = dict(zip(contiguous.category_ids, contiguous.names, strict=True))
        return cls(
            tuple(i if i in names else None for i in range(columns)), tuple(names.get(i) for i in range(columns))
        )

    @property
    def num_classes(self) -> int:
        """Columns of the class head, unused ones included."""
        return len(self.category_ids)

    @property
    def num_categories(self) -> int:
        """Categories of the data set: columns that stand for something."""
        return len(self._labels)

    def label_of(self, category_id: int) -> int:
        """The column of a category id; DataError if the map does not know it."""
        try:
            return self._labels[category_id]
        except (KeyError, TypeError):
            known = nearest(str(category_id), (str(one) for one in self._labels))
            raise DataError(f"category id {category_id!r} is not in the label map; {known}") from None

    def category_id(self, label: int) -> int | None:
        """The category id of a column, None if the column stands for nothing."""
        return self.category_ids[label]

    def name(self, label: int) -> str:
        """The category name of a column; a readable stand-in if the column stands for nothing."""
        name = self.names[label]
        return name if name is not None else f"(unused column {label})"

    def by_label(self) -> dict[int, str]:
        """The category name of each column that stands for one."""
        return {label: name for label, name in enumerate(self.names) if name is not None}

    def state_dict(self) -> dict[str, list[int | None] | list[str | None]]:
        """Plain lists, for a checkpoint."""
        return {"category_ids": list(self.category_ids), "names": list(self.names)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> LabelMap:
        """The map that ``state_dict`` was taken from."""
        try:
            return cls(tuple(state["category_ids"]), tuple(state["names"]))
        except (KeyError, TypeError) as error:
            raise DataError(f"not the state of a label map, 'category_ids' and 'names' are needed: {error}") from None


def _id_and_name(category: Mapping[str, Any]) -> tuple[int, str]:
    category_id, name = category.get("id"), category.get("name")
    if type(category_id) is not int:
        raise DataError(f"category {dict(category)!r} needs a whole number as its 'id'")
    if not isinstance(name, str) or not name:
        raise DataError(f"category {category_id} needs a text as its 'name', not {name!r}")
    return category_id, name
