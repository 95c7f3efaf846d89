"""Groups of training examples and designs: which groups are in which subset. Seeded, and saved as JSON with the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whence.errors import ConfigError, DataError, MismatchError
from whence.evaluate.clusters import cluster_rows
from whence.refit.linear import Linearised
from whence.storage.run import read_json, write_json_atomic


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Training examples in groups.

    Attributes:
        numbers: group of every example, int64 `[example]`, from 0; every group has an example.
        names: of the groups, all different.

    Raises:
        DataError: names are not different, or a group has no example.
    """

    numbers: Tensor
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.numbers.dtype != torch.int64 or self.numbers.dim() != 1 or not len(self.numbers):
            raise DataError(f"numbers is {self.numbers.dtype} {tuple(self.numbers.shape)}; give an int64 number for each example.")
        if len(set(self.names)) != len(self.names):
            raise DataError("names of groups must be different.")
        if int(self.numbers.min()) < 0 or len(self.sizes) != len(self.names) or not self.sizes.all():
            raise DataError(f"{len(self.names)} groups are named; every one needs an example, and numbers go from 0 to one less.")

    @property
    def sizes(self) -> Tensor:
        """Examples of each group, int64 `[group]`."""
        return self.numbers.bincount(minlength=len(self.names))

    def __len__(self) -> int:
        return len(self.names)

    def examples(self, chosen: Sequence[int]) -> tuple[int, ...]:
        """Return the places of the chosen groups' examples, rising."""
        member = torch.zeros(len(self.names), dtype=torch.bool)
        member[list(chosen)] = True
        return tuple(member[self.numbers].nonzero()[:, 0].tolist())

    def totals(self, values: Tensor) -> Tensor:
        """Return the sums of values `[example]` over each group's examples, `[group]`."""
        return values.new_zeros(len(self.names)).index_add_(0, self.numbers, values)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"numbers": self.numbers.tolist(), "names": list(self.names)}


def groups_of(labels: Sequence[Any]) -> Groups:
    """Return groups by label, one for each example: a task, a source, a class. They are in the order of their first example."""
    numbers: dict[str, int] = {}
    places = [numbers.setdefault(str(label), len(numbers)) for label in labels]
    return Groups(numbers=torch.tensor(places, dtype=torch.int64), names=tuple(numbers))


def single_groups(examples: int) -> Groups:
    """Return every example as a group of its own."""
    return Groups(numbers=torch.arange(examples), names=tuple(map(str, range(examples))))


def gradient_clusters(linear: Linearised, clusters: int, *, seed: int = 0) -> Groups:
    """Return groups of examples whose gradients point the same way: k-means of the mean gradients, each scaled to length 1.

    Raises:
        ConfigError: fewer than 2 clusters, or more than there are different gradients.
    """
    gradients = linear.example_sums(linear.gradients.T).T
    lengths = gradients.norm(dim=1, keepdim=True)
    found = cluster_rows((gradients / torch.where(lengths > 0, lengths, 1.0)).cpu(), clusters, seed=seed)
    return Groups(numbers=found.numbers, names=tuple(f"cluster {number}" for number in range(clusters)))


@dataclass(frozen=True, kw_only=True)
class Subsets:
    """Which groups are in which subset.

    Attributes:
        members: bool `[subset, group]`.
        groups: the groups.
        settings: how the subsets were made, JSON.
    """

    members: Tensor
    groups: Groups
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (
            self.members.dtype != torch.bool
            or self.members.dim() != 2
            or self.members.shape[1] != len(self.groups)
            or not len(self.members)
        ):
            raise DataError(
                f"members is {self.members.dtype} {tuple(self.members.shape)}; give bool [subset, group] of {len(self.groups)} groups, "
                "one subset at least."
            )

    def __len__(self) -> int:
        return len(self.members)

    @property
    def sizes(self) -> Tensor:
        """Examples of each subset, int64 `[subset]`."""
        return (self.members.double() @ self.groups.sizes.double()).long()

    def example_masks(self) -> Tensor:
        """Return which examples are in which subset, bool `[subset, example]`."""
        return self.members[:, self.groups.numbers]

    def take(self, places: Sequence[int]) -> Subsets:
        """Return some of the subsets, in the order given."""
        return Subsets(members=self.members[list(places)], groups=self.groups, settings=self.settings | {"taken": list(places)})

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, those of a file that `load_subsets` and `subsets_from_file` read."""
        subsets = [own.nonzero()[:, 0].tolist() for own in self.members]
        return {"groups": self.groups.to_json(), "subsets": subsets, "settings": self.settings}

    def save(self, path: Path | str) -> None:
        """Write the subsets, their groups and settings as JSON, atomically.

        Raises:
            StorageError: the file cannot be written.
        """
        write_json_atomic(Path(path), self.to_json())


def load_subsets(path: Path | str) -> Subsets:
    """Return what `Subsets.save` wrote.

    Raises:
        StorageError: the file cannot be read. DataError: it holds no subsets.
    """
    found = read_json(Path(path))
    try:
        groups = Groups(numbers=torch.tensor(found["groups"]["numbers"], dtype=torch.int64), names=tuple(found["groups"]["names"]))
        return Subsets(members=_members(found["subsets"], groups, str(path)), groups=groups, settings=found["settings"])
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} holds no saved subsets ({error!r}); for lists of groups use subsets_from_file.") from None


def fixed_share(groups: Groups, *, count: int, share: float = 0.5, of: str = "groups", seed: int = 0) -> Subsets:
    """Return random subsets of a fixed share.

    Args:
        groups: the groups.
        count: how many subsets.
        share: between 0 and 1.
        of: `groups`: `floor(share * groups)` of them, 1 at least, as the published method; `rows`: groups in random order as long
            as they fit into `share` of all examples (one group at least).
        seed: of the draws.

    Raises:
        ConfigError: a number is out of range.
    """
    _check_count(count, share)
    if of not in {"groups", "rows"}:
        raise ConfigError(f"of={of!r}: choose 'groups' or 'rows'.")
    generator, sizes = torch.Generator().manual_seed(seed), groups.sizes
    members = torch.zeros(count, len(groups), dtype=torch.bool)
    for own in members:
        order = torch.randperm(len(groups), generator=generator)
        if of == "groups":
            own[order[: max(1, int(share * len(groups)))]] = True
            continue
        room = share * int(sizes.sum())
        for group in order.tolist():
            if int(sizes[group]) <= room or not own.any():
                own[group] = True
                room -= int(sizes[group])
    return Subsets(members=members, groups=groups, settings={"design": "fixed", "share": share, "of": of, "seed": seed})


def bernoulli(groups: Groups, *, count: int, share: float = 0.5, seed: int = 0) -> Subsets:
    """Return random subsets that each hold every group with the probability `share`, independently; empty ones are drawn anew.

    Raises:
        ConfigError: a number is out of range.
    """
    _check_count(count, share)
    generator = torch.Generator().manual_seed(seed)
    members = torch.rand(count, len(groups), generator=generator) < share
    while (empty := ~members.any(1)).any():
        members[empty] = torch.rand(int(empty.sum()), len(groups), generator=generator) < share
    return Subsets(members=members, groups=groups, settings={"design": "bernoulli", "share": share, "seed": seed})


def leave_one_group_out(groups: Groups) -> Subsets:
    """Return as many subsets as there are groups: subset g holds all groups but g.

    Raises:
        ConfigError: there is one group only.
    """
    if len(groups) < 2:
        raise ConfigError("there is one group, and nothing is left without it; make 2 groups or more.")
    return Subsets(members=~torch.eye(len(groups), dtype=torch.bool), groups=groups, settings={"design": "leave one group out"})


def subsets_from_file(path: Path | str, groups: Groups) -> Subsets:
    """Return subsets from a file: JSON, a list of lists; or one subset per line, its groups separated by commas or tabs.

    A file of `Subsets.save` is read too, for the groups it was saved with.
    A group is named, or given as its number where no group has that name.

    Raises:
        DataError: the file cannot be read or holds no subsets, or a group is unknown. MismatchError: subsets were saved with other
            groups, so that numbers mean others.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read subsets from {path}: {error}.") from None
    if text.lstrip().startswith(("[", "{")):
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} is not JSON: {error}.") from None
        listed = found.get("subsets") if isinstance(found, dict) else found
        if isinstance(found, dict) and "groups" in found:
            _check_saved(found["groups"], groups, path)
    else:
        lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
        listed = [[name.strip() for name in line.replace("\t", ",").split(",") if name.strip()] for line in lines]
    return Subsets(members=_members(listed, groups, str(path)), groups=groups, settings={"design": "file", "file": Path(path).name})


def _check_saved(saved: Any, groups: Groups, path: Path | str) -> None:
    own = groups.to_json()
    if not isinstance(saved, dict) or (differs := [name for name in own if saved.get(name) != own[name]]):
        what = {"names": "other groups", "numbers": "the same groups of other examples"}
        why = what["names"] if not isinstance(saved, dict) or "names" in differs else what["numbers"]
        raise MismatchError(
            f"the subsets in {path} were saved with {why}: {len(groups)} groups of {len(groups.numbers)} examples are asked for. Group the "
            "rows as then (the same data, grouping and seed), or give the subsets as lists of names."
        )


def _check_count(count: int, share: float) -> None:
    if count < 1 or not 0 < share < 1:
        raise ConfigError(f"count={count!r}, share={share!r}: give 1 subset or more, and a share between 0 and 1.")


def _members(listed: Any, groups: Groups, where: str) -> Tensor:
    if not isinstance(listed, list) or not listed or not all(isinstance(own, list) for own in listed):
        raise DataError(f"{where} holds no subsets; give a list of lists of groups, or one subset per line.")
    places = {str(number): number for number in range(len(groups))} | {name: number for number, name in enumerate(groups.names)}
    members = torch.zeros(len(listed), len(groups), dtype=torch.bool)
    for number, own in enumerate(listed):
        for name in own:
            if str(name) not in places:
                known = ", ".join(groups.names[:5])
                raise DataError(f"{where}, subset {number}: no group {name!r}; the first of {len(groups)} are {known}.")
            # Numbers in JSON are numbers, whatever names look like.
            members[number, name if isinstance(name, int) and 0 <= name < len(groups) else places[str(name)]] = True
    return members
