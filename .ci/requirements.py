"""Print the installed versions of everything that evomerge needs to run, as a requirements file."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

done: set[tuple[str, str]] = set()
pins: set[str] = set()
waiting = [("evomerge", "")]
while waiting:
    name, extra = waiting.pop()
    if (name, extra) in done:
        continue
    done.add((name, extra))
    try:
        found = distribution(name)
    except PackageNotFoundError:
        continue  # an optional dependency of a dependency
    if name != "evomerge":
        pins.add(f"{name}=={found.version.partition('+')[0]}")
    for requirement in map(Requirement, found.requires or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            needed = canonicalize_name(requirement.name)
            waiting += [(needed, part) for part in ("", *requirement.extras)]
print("\n".join(sorted(pins)))
