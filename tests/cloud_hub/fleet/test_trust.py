import datetime
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]
from tuf.api.exceptions import DownloadHTTPError, RepositoryError
from tuf.api.metadata import Metadata, Root, Targets, Timestamp  # type: ignore[attr-defined]
from tuf.ngclient.fetcher import FetcherInterface
from tuf.ngclient.updater import Updater

from cloud_hub.errors import StartRefused
from cloud_hub.fleet.artifacts import Disk
from cloud_hub.fleet.trust import (
    BINS,
    CERTIFICATES,
    DEMO_WARNING,
    KEEP_OLD_S,
    LIFE_S,
    OWNERS,
    KeyMissing,
    Repository,
    role_of,
)

DAY_S = 86_400.0
NOW = datetime.datetime.now(datetime.UTC).timestamp()  # ngclient reads the real clock
INDEX = "digits/1/index.json"
CERTIFICATE = "certificates/digits/1/0123456789abcdef.json"


class PowerCut(Exception):
    """The power went before this operation."""


class LossyDisk(Disk):
    """A disk whose power goes after ``operations``, and which then may forget renames.

    It forgets any of those that were not followed by a sync of their folder.
    """

    def __init__(self, operations: int | None = None) -> None:
        self.left = operations
        self.count = 0
        self.pending: list[tuple[Path, Path, bytes | None]] = []

    def write(self, path: Path, data: bytes, mode: int = 0o644) -> None:
        self._spend()
        path.write_bytes(data)
        path.chmod(mode)

    def rename(self, old: Path, new: Path) -> None:
        self._spend()
        self.pending.append((old, new, new.read_bytes() if new.exists() else None))
        old.replace(new)

    def sync(self, directory: Path) -> None:
        self._spend()
        self.pending = [entry for entry in self.pending if entry[1].parent != directory]

    def forget(self, kept: Callable[[int], bool]) -> None:
        """Undo the pending renames that are not ``kept``, the last one first."""
        for number, (old, new, before) in reversed(list(enumerate(self.pending))):
            if not kept(number):
                new.replace(old)
                if before is not None:
                    new.write_bytes(before)
                    new.chmod(0o600)

    def _spend(self) -> None:
        if self.left is not None:
            if self.left == 0:
                raise PowerCut
            self.left -= 1
        self.count += 1


class Files(FetcherInterface):
    """Serves a hub's folder to ngclient."""

    def __init__(self, tuf: Path) -> None:
        self._tuf = tuf

    def _fetch(self, url: str) -> Iterator[bytes]:
        path = self._tuf / url
        if not path.is_file():
            raise DownloadHTTPError(url, 404)
        return iter([path.read_bytes()])


class Client:
    """A device as the specification has it, with a memory of its own."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder = folder
        self.data = data
        folder.mkdir(exist_ok=True)
        self.anchor = (data / "tuf" / "metadata" / "1.root.json").read_bytes()

    def get(self, target: str) -> bytes | None:
        updater = Updater(
            str(self.folder),
            "metadata/",
            target_base_url="targets/",
            target_dir=str(self.folder),
            fetcher=Files(self.data / "tuf"),
            bootstrap=self.anchor,
        )
        updater.refresh()
        found = updater.get_targetinfo(target)
        return None if found is None else Path(updater.download_target(found)).read_bytes()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def repository(data: Path) -> Repository:
    return Repository(data, now=NOW, disk=LossyDisk())


def test_a_published_target_reaches_a_client(
    repository: Repository, data: Path, tmp_path: Path
) -> None:
    client = Client(tmp_path / "device", data)
    assert client.get(INDEX) is None
    assert repository.publish({INDEX: b"one", CERTIFICATE: b"two"}, now=NOW)
    assert client.get(INDEX) == b"one"
    assert client.get(CERTIFICATE) == b"two"
    assert set(repository.targets()) == {INDEX, CERTIFICATE}


def test_publishing_again_changes_nothing(repository: Repository, data: Path) -> None:
    repository.publish({INDEX: b"one"}, now=NOW)
    before = sorted(p.name for p in (data / "tuf" / "metadata").iterdir())
    assert not repository.publish({INDEX: b"one"}, [CERTIFICATE], now=NOW + 60)
    assert sorted(p.name for p in (data / "tuf" / "metadata").iterdir()) == before


def test_what_is_withdrawn_is_gone_for_clients(
    repository: Repository, data: Path, tmp_path: Path
) -> None:
    client = Client(tmp_path / "device", data)
    repository.publish({CERTIFICATE: b"two"}, now=NOW)
    assert client.get(CERTIFICATE) == b"two"
    repository.publish({}, [CERTIFICATE], now=NOW)
    assert client.get(CERTIFICATE) is None


def test_a_restarted_hub_goes_on_where_it_was(
    repository: Repository, data: Path, tmp_path: Path
) -> None:
    client = Client(tmp_path / "device", data)
    repository.publish({INDEX: b"one"}, now=NOW)
    assert client.get(INDEX) == b"one"
    again = Repository(data, now=NOW)
    assert not again.publish({INDEX: b"one"}, now=NOW)
    assert again.publish({INDEX: b"other"}, now=NOW)
    assert client.get(INDEX) == b"other"


def test_the_demo_root_says_so_in_its_signed_metadata(repository: Repository) -> None:
    root = Metadata[Root].from_bytes(repository.anchor()).signed
    assert root.unrecognized_fields["warning"] == DEMO_WARNING


def test_private_keys_are_for_their_owner_only(repository: Repository, data: Path) -> None:
    keys = sorted((data / "keys").iterdir())
    assert [key.name for key in keys] == sorted(f"{owner}.pem" for owner in OWNERS)
    assert {key.stat().st_mode & 0o777 for key in keys} == {0o600}
    keys[0].chmod(0o640)
    with pytest.raises(StartRefused, match="chmod 600"):
        Repository(data, now=NOW)


def test_every_role_has_a_key_of_its_own(repository: Repository, data: Path) -> None:
    root = Metadata[Root].from_bytes(repository.anchor()).signed
    top = Metadata[Targets].from_file(str(data / "tuf" / "metadata" / "1.targets.json")).signed
    assert top.targets == {}
    assert top.delegations is not None
    assert top.delegations.roles is not None
    delegated = [tuple(role.keyids) for role in top.delegations.roles.values()]
    assert len({*(tuple(role.keyids) for role in root.roles.values()), *delegated}) == 6
    assert list(top.delegations.roles) == [CERTIFICATES, *BINS]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (CERTIFICATE, {CERTIFICATES}),
        (INDEX, set(BINS)),
        ("certificates/1/index.json", set(BINS)),
        ("certificates/a/b/c/d.json", set(BINS)),
    ],
)
def test_only_paths_of_certificates_belong_to_their_role(path: str, expected: set[str]) -> None:
    assert role_of(path) in expected


def test_our_choice_of_a_bin_is_the_one_that_clients_make(
    repository: Repository, data: Path
) -> None:
    top = Metadata[Targets].from_file(str(data / "tuf" / "metadata" / "1.targets.json")).signed
    assert top.delegations is not None
    for number in range(200):
        path = f"model-{number}/{number}/index.json"
        assert [name for name, _ in top.delegations.get_roles_for_target(path)] == [role_of(path)]


@pytest.mark.parametrize("owner", ["timestamp", "snapshot", "certificates", "releases", "root"])
def test_a_role_is_due_when_half_its_life_is_over(repository: Repository, owner: str) -> None:
    roles = set(BINS) if owner == "releases" else {owner}
    half = LIFE_S[owner] / 2
    assert not roles & set(repository.due(NOW + half - 60))
    assert roles <= set(repository.due(NOW + half + 60))


def test_refresh_renews_everything_that_is_due(repository: Repository) -> None:
    repository.publish({INDEX: b"one"}, now=NOW)
    for days in (0.6, 4, 16, 50, 200, 600):
        later = NOW + days * DAY_S
        assert repository.due(later)
        assert repository.refresh(later) == ()
        assert repository.due(later) == ()
    assert set(repository.targets()) == {INDEX}


def test_a_clock_set_back_signs_nothing_that_looks_expired(
    repository: Repository, data: Path
) -> None:
    repository.publish({INDEX: b"one"}, now=NOW + 1000 * DAY_S)
    repository.publish({INDEX: b"other"}, now=NOW)
    timestamp = Metadata[Timestamp].from_file(str(data / "tuf" / "metadata" / "timestamp.json"))
    assert timestamp.signed.expires.timestamp() > NOW + 1000 * DAY_S


def test_refresh_says_which_keys_it_needs_from_elsewhere(
    repository: Repository, data: Path
) -> None:
    (data / "keys" / "root.pem").unlink()
    (data / "keys" / "targets.pem").unlink()
    again = Repository(data, now=NOW, disk=LossyDisk())
    assert again.publish({INDEX: b"one"}, now=NOW)
    assert again.refresh(NOW + 200 * DAY_S) == ("root", "targets")
    with pytest.raises(KeyMissing, match=r"root\.pem"):
        again.rotate("timestamp", now=NOW)


def test_a_hub_without_its_online_key_does_not_start(repository: Repository, data: Path) -> None:
    (data / "keys" / "timestamp.pem").unlink()
    with pytest.raises(StartRefused, match="timestamp"):
        Repository(data, now=NOW)
    (data / "keys" / "timestamp.pem").write_bytes(CryptoSigner.generate_ed25519().private_bytes)
    (data / "keys" / "timestamp.pem").chmod(0o600)
    with pytest.raises(StartRefused, match="not the key that the published metadata"):
        Repository(data, now=NOW)


def test_damaged_metadata_stops_the_hub_with_a_sentence(repository: Repository, data: Path) -> None:
    (data / "tuf" / "metadata" / "1.snapshot.json").write_bytes(b"{}")
    with pytest.raises(StartRefused, match="damaged"):
        Repository(data, now=NOW)


def test_old_versions_are_removed_and_roots_are_kept(repository: Repository, data: Path) -> None:
    metadata = data / "tuf" / "metadata"
    repository.publish({INDEX: b"one", CERTIFICATE: b"two"}, now=NOW)
    repository.publish({INDEX: b"other"}, [CERTIFICATE], now=NOW)
    repository.rotate("timestamp", now=NOW)
    repository.refresh(NOW)
    assert (metadata / "1.snapshot.json").exists()  # somebody may be in the middle of a refresh
    repository.refresh(NOW + KEEP_OLD_S + 3600)
    assert not (metadata / "1.snapshot.json").exists()
    assert (metadata / "1.root.json").exists()
    targets = [p.read_bytes() for p in (data / "tuf" / "targets").rglob("*.json")]
    assert targets == [b"other"]


@pytest.mark.parametrize("owner", OWNERS)
def test_a_rotated_key_is_accepted_by_old_and_new_clients_and_the_old_key_by_none(
    repository: Repository, data: Path, tmp_path: Path, owner: str
) -> None:
    repository.publish({INDEX: b"one", CERTIFICATE: b"two"}, now=NOW)
    old = Client(tmp_path / "old", data)
    assert old.get(INDEX) == b"one"
    before = (data / "keys" / f"{owner}.pem").read_bytes()
    repository.rotate(owner, now=NOW)
    assert (data / "keys" / f"{owner}.pem").read_bytes() != before
    repository.publish({INDEX: b"other"}, now=NOW)
    new = Client(tmp_path / "new", data)
    for client in (old, new):
        assert client.get(INDEX) == b"other"
        assert client.get(CERTIFICATE) == b"two"
    Repository(data, now=NOW).publish({INDEX: b"third"}, now=NOW)
    assert old.get(INDEX) == b"third"


def _create(repository: Repository) -> None:
    repository.refresh(NOW)


def _publish(repository: Repository) -> None:
    repository.publish({INDEX: b"other", CERTIFICATE: b"two"}, ["digits/9/index.json"], now=NOW)


def _refresh(repository: Repository) -> None:
    repository.refresh(NOW + 0.6 * DAY_S)


def _rotation(owner: str) -> Callable[[Repository], None]:
    return lambda repository: repository.rotate(owner, now=NOW)


ACTIONS = {
    "create": _create,
    "publish": _publish,
    "refresh": _refresh,
    **{f"rotate-{owner}": _rotation(owner) for owner in OWNERS},
}


@pytest.mark.parametrize("name", ACTIONS)
def test_a_power_cut_between_any_two_steps_leaves_what_every_client_accepts(
    name: str, tmp_path: Path
) -> None:
    """What a rename not yet synced has become is tried both ways, and each one alone."""
    action = ACTIONS[name]
    start, old = tmp_path / "start", tmp_path / "old"
    if name != "create":
        first = Repository(start, now=NOW, disk=LossyDisk())
        first.publish({INDEX: b"one", "digits/9/index.json": b"nine"}, now=NOW)
        assert Client(old, start).get(INDEX) == b"one"
    for operations in itertools.count():
        case = 0
        while True:
            data = tmp_path / "case"
            shutil.rmtree(data, ignore_errors=True)
            if name != "create":
                shutil.copytree(start, data)
            disk = LossyDisk(operations)
            try:
                action(Repository(data, now=NOW, disk=disk))
                assert operations > 3
                return
            except PowerCut:
                pass
            # 0: nothing is forgotten, 1: everything, then everything but one of them (where they
            # are few: a creation renames two dozen files that nobody has heard of before it ends).
            alone = case - 2
            disk.forget(lambda n, case=case, alone=alone: case == 0 or n == alone)  # type: ignore[misc]
            _check(data, old, tmp_path, action, had_root=name != "create")
            case += 1
            if case > (len(disk.pending) + 1 if len(disk.pending) < 4 else 1):
                break


def _check(
    data: Path, old: Path, tmp_path: Path, action: Callable[[Repository], None], *, had_root: bool
) -> None:
    fresh, known = tmp_path / "fresh", tmp_path / "known"
    for folder in (fresh, known):
        shutil.rmtree(folder, ignore_errors=True)
    if had_root:
        shutil.copytree(old, known)
        for folder in (known, fresh):
            assert Client(folder, data).get(INDEX) in (b"one", b"other")
    again = Repository(data, now=NOW, disk=LossyDisk())
    action(again)
    for folder in (known, fresh):
        client = Client(folder, data)
        expected = {b"one", b"other"} if had_root else {None}
        assert client.get(INDEX) in expected
    again.publish({INDEX: b"afterwards"}, now=NOW)
    assert Client(known, data).get(INDEX) == b"afterwards"


def test_the_check_above_notices_a_timestamp_that_comes_too_early(
    repository: Repository, data: Path, tmp_path: Path
) -> None:
    repository.publish({INDEX: b"one"}, now=NOW)
    (data / "tuf" / "metadata" / "2.snapshot.json").unlink()
    with pytest.raises((RepositoryError, DownloadHTTPError)):
        Client(tmp_path / "device", data).get(INDEX)


def test_a_failed_write_leaves_the_hub_able_to_publish(data: Path) -> None:
    disk = LossyDisk()
    repository = Repository(data, now=NOW, disk=disk)
    disk.left = 6
    with pytest.raises(PowerCut):
        repository.publish({INDEX: b"one"}, now=NOW)
    disk.left = None
    assert repository.publish({INDEX: b"one"}, now=NOW)
    assert set(repository.targets()) == {INDEX}
