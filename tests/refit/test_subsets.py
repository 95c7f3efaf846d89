from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from whence.errors import ConfigError, DataError, MismatchError
from whence.refit.linear import Linearised
from whence.refit.subsets import (
    Groups,
    bernoulli,
    fixed_share,
    gradient_clusters,
    groups_of,
    leave_one_group_out,
    load_subsets,
    single_groups,
    subsets_from_file,
)


def test_groups_by_label() -> None:
    groups = groups_of(["b", "a", "b", 3])
    assert groups.names == ("b", "a", "3")
    assert groups.numbers.tolist() == [0, 1, 0, 2]
    assert groups.sizes.tolist() == [2, 1, 1]
    assert groups.examples([0, 2]) == (0, 2, 3)
    assert groups.totals(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [4, 2, 4]


def test_clusters_are_by_direction() -> None:
    axes = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    truth = torch.arange(30) % 3
    gradients = axes[truth] * torch.logspace(-2, 2, 30)[:, None]
    # Two tokens each, whose mean is the example's gradient: one alone would be noise.
    noise = torch.randn(30, 3)
    linear = Linearised(
        outputs=torch.zeros(60),
        gradients=torch.stack([gradients + noise, gradients - noise], 1).reshape(60, 3),
        example=torch.arange(30).repeat_interleave(2),
        weights=torch.full((60,), 0.5),
        examples=30,
    )
    found = gradient_clusters(linear, 3)
    assert len({(int(a), int(b)) for a, b in zip(truth[6:], found.numbers[6:], strict=True)}) == 3
    assert found.names == ("cluster 0", "cluster 1", "cluster 2")


def test_fixed_shares() -> None:
    groups = groups_of([number % 7 for number in range(50)])
    by_groups = fixed_share(groups, count=20, share=0.5)
    assert (by_groups.members.sum(1) == 3).all()
    assert (fixed_share(groups, count=20, share=0.5).members == by_groups.members).all()
    assert (fixed_share(groups, count=20, share=0.5, seed=1).members != by_groups.members).any()
    by_rows = fixed_share(groups, count=20, share=0.3, of="rows")
    assert (by_rows.sizes <= 15).all()
    assert (by_rows.sizes >= 8).all()
    singles = fixed_share(single_groups(40), count=3, share=0.25, of="rows")
    assert (singles.sizes == 10).all()
    assert (singles.example_masks().sum(1) == 10).all()


def test_bernoulli_and_leave_one_out() -> None:
    groups = single_groups(20)
    drawn = bernoulli(groups, count=2000, share=0.1, seed=3)
    assert drawn.members.any(1).all()
    # Without the empty ones: 0.1 / (1 - 0.9^20); five standard errors of 40,000 draws.
    assert abs(float(drawn.members.double().mean()) - 0.1 / (1 - 0.9**20)) < 5 * 0.33 / 200
    out = leave_one_group_out(groups)
    assert (out.members.sum(1) == 19).all()
    assert not out.members.diagonal().any()
    with pytest.raises(ConfigError, match="2 groups or more"):
        leave_one_group_out(single_groups(1))


def test_subsets_come_back_from_their_file(tmp_path: Path) -> None:
    made = bernoulli(groups_of("aabbc"), count=6).take([4, 0, 2])
    made.save(tmp_path / "subsets.json")
    again = load_subsets(tmp_path / "subsets.json")
    assert (again.members == made.members).all()
    assert (again.groups.numbers == made.groups.numbers).all()
    assert again.groups.names == made.groups.names
    assert again.settings == made.settings
    assert again.settings["taken"] == [4, 0, 2]
    (tmp_path / "other.json").write_text("[[0]]")
    with pytest.raises(DataError, match="no saved subsets"):
        load_subsets(tmp_path / "other.json")


def test_saved_subsets_are_of_the_groups_they_were_saved_with(tmp_path: Path) -> None:
    made, path = bernoulli(groups_of("aabbc"), count=6), tmp_path / "subsets.json"
    made.save(path)
    assert (subsets_from_file(path, groups_of("aabbc")).members == made.members).all()
    with pytest.raises(MismatchError, match="were saved with other groups: 3 groups of 5 examples are asked for"):
        subsets_from_file(path, groups_of("bbaac"))
    with pytest.raises(MismatchError, match="were saved with the same groups of other examples"):
        subsets_from_file(path, groups_of("abbbc"))


@pytest.mark.parametrize(
    "text", ["# groups\nx, z\ny\n", "x\tz\n\ny\n", '[["x", "z"], ["y"]]', "[[0, 2], [1]]", '{"subsets": [["x", 2], ["y"]]}', "0,2\n1\n"]
)
def test_files_of_subsets(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").write_text(text)
    assert subsets_from_file(tmp_path / "file", groups_of("xyz")).members.tolist() == [[True, False, True], [False, True, False]]


def test_names_go_before_numbers_in_text(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("1\n")
    assert subsets_from_file(tmp_path / "file", groups_of(["1", "0"])).members.tolist() == [[True, False]]


@pytest.mark.parametrize(
    ("text", "told"), [("x,q\n", "no group 'q'"), ("", "holds no subsets"), ("[1, 2]", "holds no subsets"), ("[", "not JSON")]
)
def test_files_that_cannot_be_used(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(DataError, match=told):
        subsets_from_file(tmp_path / "file", groups_of("xyz"))
    with pytest.raises(DataError, match="cannot read"):
        subsets_from_file(tmp_path / "none", groups_of("xyz"))


def test_sizes_are_checked() -> None:
    groups = groups_of("xyz")
    with pytest.raises(ConfigError, match=r"share=1\.0"):
        bernoulli(groups, count=1, share=1.0)
    with pytest.raises(ConfigError, match="of='tokens'"):
        fixed_share(groups, count=1, of="tokens")
    with pytest.raises(DataError, match="every one needs an example"):
        Groups(numbers=torch.tensor([0, 2]), names=("a", "b", "c"))
    with pytest.raises(DataError, match="must be different"):
        Groups(numbers=torch.tensor([0, 1]), names=("a", "a"))
    assert json.dumps(bernoulli(groups, count=2).to_json())
