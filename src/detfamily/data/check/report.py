"""What was found, as text for people and as json for programs."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from detfamily.data.check.findings import Finding, Findings, Kind, Level

WIDTH = 120
CLASSES = 40
"""Classes that are listed unless all findings are."""


@dataclass(frozen=True)
class Report:
    """All that a check found.

    Attributes:
        sources: split -> annotation file and image folder.
        findings: of all splits.
        statistics: split -> numbers; without a split whose annotation file could not be read.
        decoded: whether the images were decoded, not only looked for.
    """

    sources: Mapping[str, tuple[Path, Path]]
    findings: Findings
    statistics: Mapping[str, Mapping[str, Any]]
    decoded: bool

    @property
    def errors(self) -> int:
        """Number of errors, those that stop training included."""
        return self.findings.number("stop", "error")

    def text(self, limit: int | None) -> str:
        """For people; ``limit`` is the number of findings of each kind that are listed, None lists all."""
        lines = []
        for split, (path, folder) in self.sources.items():
            lines.append(f"{split}: {path}, images in {folder}")
            if split in self.statistics:
                lines += [f"  {line}" for line in _statistics_lines(self.statistics[split], limit is None)]
        groups: tuple[tuple[str, tuple[Level, ...]], ...] = (("notice", ("notice",)), ("error", ("stop", "error")))
        for title, levels in groups:
            number = self.findings.number(*levels)
            lines += ["", f"{number} {title}{'s' * (number != 1)}" if number else f"no {title}s"]
            for kind in self.findings.kinds(*levels):
                lines += [f"  {line}" for line in self._kind_lines(kind, limit)]
        if not self.decoded:
            lines += ["", "The images were looked for, but not decoded: check.decode=true does that."]
        return "\n".join(lines)

    def json(self) -> str:
        """For programs: all findings that were kept, with the number of each kind, and the statistics."""
        kinds = self.findings.kinds("stop", "error", "notice")
        content = {
            "sources": {
                name: {"annotations": str(path), "images": str(folder)} for name, (path, folder) in self.sources.items()
            },
            "errors": self.errors,
            "notices": self.findings.number("notice"),
            "decoded": self.decoded,
            "kinds": [
                {
                    **asdict(kind),
                    "number": self.findings.counts[kind.code],
                    "findings": [
                        {key: value for key, value in asdict(one).items() if key != "code"}
                        for one in self.findings.of(kind.code)
                    ],
                }
                for kind in kinds
            ],
            "statistics": self.statistics,
        }
        return json.dumps(content, indent=1) + "\n"

    def _kind_lines(self, kind: Kind, limit: int | None) -> list[str]:
        number = self.findings.counts[kind.code]
        found = self.findings.of(kind.code)[:limit]
        lines = [f"{kind.code} ({number}): {kind.title}", *(f"  {_line(one)}" for one in found)]
        if number > len(found):
            lines.append(f"  ... and {number - len(found)} more (check.limit=0 lists all)")
        return lines


def _line(finding: Finding) -> str:
    """The words, and behind them what they do not say themselves."""
    head = f"{finding.split}: " if finding.split else ""
    image = f"image {finding.image_id}"
    others = [image] * (finding.image_id is not None and not re.search(rf"\b{image}\b", finding.words))
    others += [str(finding.file)] * (finding.file is not None and finding.file not in finding.words)
    return head + finding.words + (f" ({', '.join(others)})" if others else "")


def _statistics_lines(numbers: Mapping[str, Any], whole: bool) -> list[str]:
    objects, per_image, by_class = numbers["objects"], numbers["objects_per_image"], numbers["objects_by_class"]
    rows = [("images", f"{numbers['images']}, {numbers['images_without_objects']} without objects")]
    if sizes := numbers["image_sizes"]:
        words = [f"{name} {sizes[name]['width']}x{sizes[name]['height']}" for name in ("smallest", "median", "largest")]
        rows.append(("image sizes", f"{', '.join(words)}, {sizes['different']} different"))
    classes = f"{sum(map(bool, by_class.values()))} of {len(by_class)} classes"
    crowds = f", and {numbers['crowd_regions']} crowd regions" if numbers["crowd_regions"] else ""
    rows.append(("objects", f"{objects} of {classes}{crowds}"))
    if objects:
        rows.append(
            (
                "per image",
                f"mean {per_image['mean']:.1f}, median {per_image['median']:g}, "
                f"most {per_image['most']} (image {per_image['image_with_most']})",
            )
        )
        shares = [f"{name} {100 * n / objects:.1f} %" for name, n in numbers["objects_by_size"].items()]
        rows.append(("by area", ", ".join(share for share in shares if not share.startswith("all "))))
    ranked = sorted(by_class.items(), key=lambda one: -one[1])
    listed = ranked if whole else ranked[:CLASSES]
    rest = [f"and {len(ranked) - len(listed)} more"] * (len(ranked) > len(listed))
    rows.append(("by class", ", ".join([*(f"{name} {number}" for name, number in listed), *rest])))
    return [
        f"{name if row == 0 else '':<12} {part}"
        for name, words in rows
        for row, part in enumerate(textwrap.wrap(words, WIDTH - 15, break_long_words=False, break_on_hyphens=False))
    ]
