"""What is in the cache is what was put there, or built again."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from bakeout.editor.errors import InputError
from bakeout.export.tensorrt import cache as caching
from bakeout.export.tensorrt.cache import Cache, CacheWarning, graph_digests, key_of


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Cache()


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan"
    path.write_bytes(bytes(range(256)) * 100)
    return path


def test_a_key_is_of_facts_in_any_order():
    assert key_of({"a": 1, "b": {"c": (1, 2)}}) == key_of({"b": {"c": [1, 2]}, "a": 1})
    assert key_of({"a": 1}) != key_of({"a": "1"}) != key_of({"b": "1"})


def test_what_is_kept_comes_back(cache, plan, tmp_path):
    assert not cache.fetch("key", tmp_path / "out")
    cache.keep("key", plan)
    assert Cache().fetch("key", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == plan.read_bytes()
    assert {it.name for it in cache.folder.iterdir()} == {"key", "key.json"}
    assert all(it.stat().st_mode & 0o777 == 0o600 for it in cache.folder.iterdir())
    assert cache.folder.stat().st_mode & 0o777 == 0o700


def test_what_is_kept_twice_is_the_second(cache, plan, tmp_path):
    cache.keep("key", plan)
    plan.write_bytes(b"second")
    cache.keep("key", plan)
    assert cache.fetch("key", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"second"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("key", b""),
        ("key", bytes(range(256)) * 99 + bytes(256)),
        ("key.json", b""),
        ("key.json", b"{}"),
        ("key.json", b"[" * 900),
        ("key.json", json.dumps({"sha256": "0" * 64}).encode()),
        ("key.json", json.dumps({"sha256": None}).encode()),
    ],
)
def test_what_is_damaged_is_gone(cache, plan, tmp_path, name, content):
    cache.keep("key", plan)
    (cache.folder / name).write_bytes(content)
    assert not cache.fetch("key", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert list(cache.folder.iterdir()) == []
    cache.keep("key", plan)
    assert cache.fetch("key", tmp_path / "out")


@pytest.mark.parametrize("missing", ["key", "key.json"])
def test_half_of_an_entry_is_none(cache, plan, tmp_path, missing):
    cache.keep("key", plan)
    (cache.folder / missing).unlink()
    assert not cache.fetch("key", tmp_path / "out")


@pytest.mark.parametrize("name", ["key", "key.json"])
@pytest.mark.skipif(os.name != "posix", reason="elsewhere files have no such modes")
def test_what_others_may_write_is_refused(cache, plan, tmp_path, name):
    cache.keep("key", plan)
    (cache.folder / name).chmod(0o666)
    with pytest.raises(InputError, match="may have been written by somebody else"):
        cache.fetch("key", tmp_path / "out")


def test_a_link_is_refused(cache, plan, tmp_path):
    cache.keep("key", plan)
    (cache.folder / "key").unlink()
    (cache.folder / "key").symlink_to(plan)
    with pytest.raises(InputError, match="may have been written by somebody else"):
        cache.fetch("key", tmp_path / "out")


@pytest.mark.skipif(os.name != "posix", reason="elsewhere folders have no such modes")
def test_a_folder_that_others_may_write_to_is_refused(cache):
    cache.folder.chmod(0o777)
    with pytest.raises(InputError, match="remove it and try again"):
        Cache()


def test_what_was_not_used_for_longest_makes_room(cache, plan, tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "MAX_BYTES", 60_000)
    for age, name in enumerate(("a", "b")):
        cache.keep(name, plan)
        os.utime(cache.folder / f"{name}.json", (age, age))
    assert cache.fetch("a", tmp_path / "used")
    cache.keep("c", plan)
    assert {it.name for it in cache.folder.iterdir()} == {"a", "a.json", "c", "c.json"}
    monkeypatch.setattr(caching, "MAX_BYTES", 1)
    cache.keep("d", plan)
    assert {it.name for it in cache.folder.iterdir()} == {"d", "d.json"}


def test_what_a_killed_program_left_is_removed_after_a_week(cache, plan):
    old, new = cache.folder / "keeping-old", cache.folder / "keeping-new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "new").write_bytes(b"half")
    long_ago = time.time() - 8 * 24 * 3600
    os.utime(old, (long_ago, long_ago))
    cache.keep("key", plan)
    assert not old.exists()
    assert new.exists()


def test_a_full_disk_is_a_warning(cache, plan, monkeypatch):
    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caching, "_copy", full)
    with pytest.warns(CacheWarning, match="does not keep what was built .No space left on device."):
        cache.keep("key", plan)
    assert list(cache.folder.iterdir()) == []


def test_weights_that_are_not_there(tmp_path):
    from graphs import small_graph
    from onnx import load, save

    path = small_graph(tmp_path / "model.onnx")
    alone = graph_digests(path)
    assert list(alone) == ["model.onnx"]
    save(load(path), path, save_as_external_data=True, location="other_data", size_threshold=0)
    assert list(graph_digests(path)) == ["model.onnx", "other_data"]
    (tmp_path / "other_data").unlink()
    with pytest.raises(InputError, match=r"weights of .* cannot be read"):
        graph_digests(path)
