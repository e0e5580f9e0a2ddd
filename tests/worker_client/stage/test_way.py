"""The way to a stage or a socket: who could have made, and who could replace, what lies at its end."""

import os
from pathlib import Path

import pytest

from hotweights.worker_client.stage.way import weak_point

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
OTHER = 54321


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """As /dev/shm or /tmp."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


def give(path: Path, uid: int = OTHER) -> Path:
    path.mkdir(exist_ok=True)
    os.chown(path, uid, uid)
    return path


def test_what_is_ours_among_everybodys_is_as_good_as_what_is_not_there(shared: Path) -> None:
    (shared / "ours").mkdir()
    assert weak_point(shared / "ours" / "agent.sock") == ""
    assert weak_point(shared / "nothing" / "agent.sock") == ""


@as_root
def test_what_another_user_made_among_everybodys_is_named(shared: Path) -> None:
    theirs = give(shared / "theirs")
    for path in (theirs, theirs / "agent.sock"):
        assert weak_point(path).startswith(f"{theirs} belongs to user {OTHER}, and everybody may make entries in")
        assert weak_point(path, in_pod=True), "sticky: not how the kubelet makes volumes"


@as_root
def test_what_the_owner_of_a_folder_let_another_user_have_was_chosen_by_naming_it(tmp_path: Path) -> None:
    assert weak_point(give(tmp_path / "run") / "agent.sock") == ""


def test_a_folder_whose_entries_everybody_may_replace_is_weak_but_for_the_volumes_of_a_pod(shared: Path) -> None:
    shared.chmod(0o777)
    (shared / "ours").mkdir()
    assert "everybody may write to" in weak_point(shared / "ours" / "agent.sock")
    assert weak_point(shared / "ours" / "agent.sock", in_pod=True) == ""


@as_root
def test_a_link_of_another_user_is_weak_and_so_is_a_link_to_where_one_could_be(shared: Path, tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.mkdir()
    link = shared / "link"
    link.symlink_to(good)
    assert weak_point(link / "agent.sock") == ""
    os.chown(link, OTHER, OTHER, follow_symlinks=False)
    assert f"{link} belongs to user {OTHER}" in weak_point(link / "agent.sock")
    (tmp_path / "to-theirs").symlink_to(give(shared / "theirs"))
    assert f"belongs to user {OTHER}" in weak_point(tmp_path / "to-theirs" / "agent.sock")


def test_links_in_a_circle_end_somewhere(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert weak_point(tmp_path / "a" / "agent.sock") == ""
