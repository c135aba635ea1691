"""The policy that a start goes on from is the one that the journal names."""

from __future__ import annotations

from pathlib import Path

import pytest

from rloop_mcore import platform
from rloop_mcore.compose import load_config
from rloop_mcore.data.countdown_model import write_model
from rloop_mcore.errors import UserError
from rloop_mcore.journal import Journal
from rloop_mcore.weights.digest import digest_of

platform.setup("cpu", 1)  # before Megatron is imported

from rloop_mcore.main import rooms  # noqa: E402
from rloop_mcore.main.rooms import base_policy  # noqa: E402


@pytest.mark.parametrize(("exploited", "needed"), [(0, 0), (1, 1)])
def test_a_theta_that_is_no_longer_what_it_was_is_not_gone_on_from(exploited: int, needed: int, tmp_path: Path) -> None:
    """A later one may be named and half written anew: then it is about to be made again."""
    config, journal = load_config(["experiment=tiny", "model.path=m"]), Journal(tmp_path / "journal.jsonl")
    journal.record("done", iteration=0, phase="base")
    for index in range(2):
        write_model(tmp_path / "policies" / f"theta_{index}", seed=index)
        path = f"policies/theta_{index}"
        journal.record("policy", iteration=index, path=path, digest=digest_of(tmp_path / path))
    for iteration in range(exploited):
        journal.record("done", iteration=iteration, phase="exploit")
    for index in (1 - needed, needed):
        damage(tmp_path / "policies" / f"theta_{index}")
        if index != needed:
            assert base_policy(config, journal) == journal.start_policy(needed)
    with pytest.raises(UserError, match=rf"theta_{needed} holds other weights than "):
        base_policy(config, journal)


def test_a_model_that_was_moved_since_is_gone_on_from_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever says so by model.path, forced: the journal has where it was. Its weights, hundreds of GB perhaps, are
    read once."""
    read: list[Path] = []
    monkeypatch.setattr(rooms, "digest_of", lambda folder: (read.append(folder), digest_of(folder))[1])
    journal = Journal(tmp_path / "journal.jsonl")
    write_model(tmp_path / "old", seed=0)
    journal.record("policy", iteration=0, path=str(tmp_path / "old"), digest=digest_of(tmp_path / "old"))
    journal.record("done", iteration=0, phase="base")
    (tmp_path / "old").rename(tmp_path / "new")
    config = load_config(["experiment=tiny", f"model.path={tmp_path}/new"])
    assert base_policy(config, journal).path == tmp_path / "new"
    assert read == [tmp_path / "new"]
    assert Journal(journal.path).start_policy(0).path == tmp_path / "new"
    (tmp_path / "new").rename(tmp_path / "newer")
    damage(tmp_path / "newer")
    with pytest.raises(UserError, match="new is not a folder"):
        base_policy(load_config(["experiment=tiny", f"model.path={tmp_path}/newer"]), Journal(journal.path))


@pytest.mark.parametrize("override", ["algorithm.reset=true", "algorithm.reset=false", "rft.enabled=false"])
def test_an_rl_policy_that_is_gone_on_from_has_to_be_what_it_was_too(override: str, tmp_path: Path) -> None:
    """With the reset nothing is trained from it: what it was is measured already."""
    config, journal = load_config(["experiment=tiny", "model.path=m", override]), Journal(tmp_path / "journal.jsonl")
    journal.record("done", iteration=0, phase="base")
    for index, (event, name) in enumerate({"policy": "theta_0", "measured": "i0_explore_000001"}.items()):
        path = f"policies/{name}"
        write_model(tmp_path / path, seed=index)
        journal.record(event, iteration=0, name=name, path=path, digest=digest_of(tmp_path / path))
    damage(tmp_path / path)
    assert base_policy(config, journal) == journal.start_policy(0)  # until the exploration is done, it is not the last
    journal.record("done", iteration=0, phase="explore", step=1)
    if override == "algorithm.reset=true":
        assert base_policy(config, journal) == journal.start_policy(0)
    else:
        with pytest.raises(UserError, match="i0_explore_000001 holds other weights than "):
            base_policy(config, journal)


def damage(policy: Path) -> None:
    (weights,) = policy.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
