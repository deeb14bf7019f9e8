"""The private keys of the signed repository, one file per role, and how one replaces another.

    DATA/keys/<owner>.pem         the key that the published metadata names; mode 0600
    DATA/keys/<owner>.next.pem    its successor, from the start of a rotation to its end

Which of the two is valid is written in the signed metadata and nowhere else, so a rotation that
the power cut can always be told from one that never began.
"""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner, SSlibKey  # type: ignore[attr-defined]

from cloud_hub.errors import StartRefused
from cloud_hub.fleet.artifacts import Disk, replace_file


class KeyMissing(Exception):
    """The key of a role is not on this hub: sign where it is kept, or bring it back."""


class Keys:
    """Private keys in files of mode 0600: ``<owner>.pem``, and ``<owner>.next.pem`` while rotating."""

    def __init__(self, directory: Path, owners: Collection[str], disk: Disk) -> None:
        self.directory = directory
        self._owners = owners
        self._disk = disk
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.current: dict[str, CryptoSigner] = {}
        for owner in owners:
            path = self._path(owner)
            if path.exists():
                self.current[owner] = _read_key(path)

    def create_missing(self) -> None:
        """Make a key for every owner that has none."""
        for owner in self._owners:
            if owner not in self.current:
                self.current[owner] = self._create(self._path(owner))

    def incoming(self, owner: str) -> CryptoSigner:
        """Return the next key of ``owner``: the one of an interrupted rotation, or a new one."""
        path = self._path(owner, ".next")
        return _read_key(path) if path.exists() else self._create(path)

    def promote(self, owner: str) -> None:
        """Replace the current key by the next one; the old one is gone."""
        path = self._path(owner, ".next")
        self.current[owner] = _read_key(path)
        self._disk.rename(path, self._path(owner))
        self._disk.sync(self.directory)

    def settle(self, trusted: Mapping[str, Collection[str]]) -> None:
        """Finish rotations that the power cut interrupted after the world had been told."""
        for owner in self._owners:
            path = self._path(owner, ".next")
            if path.exists() and _read_key(path).public_key.keyid in trusted[owner]:
                self.promote(owner)

    def signers(self, owner: str, trusted: Iterable[str]) -> list[CryptoSigner]:
        """Return the keys of ``owner`` among the trusted key ids.

        Raises:
            KeyMissing: there is none.
        """
        known = [self.current[owner]] if owner in self.current else []
        path = self._path(owner, ".next")
        if path.exists():
            known.append(_read_key(path))
        trusted = set(trusted)
        found = [signer for signer in known if signer.public_key.keyid in trusted]
        if not found:
            raise KeyMissing(
                f"the key of {owner} is not in {self.directory}: sign where it is kept, or bring "
                f"back {owner}.pem"
            )
        return found

    def _path(self, owner: str, suffix: str = "") -> Path:
        return self.directory / f"{owner}{suffix}.pem"

    def _create(self, path: Path) -> CryptoSigner:
        signer = CryptoSigner.generate_ed25519()
        replace_file(self._disk, path, signer.private_bytes, mode=0o600)
        self._disk.sync(self.directory)
        return signer


def _read_key(path: Path) -> CryptoSigner:
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise StartRefused(f"{path} may be read by others (mode {mode:o}): chmod 600 {path}")
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise StartRefused(f"{path} is not a private key without a password: {error}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise StartRefused(f"{path} is not an Ed25519 key")
    return CryptoSigner(key, SSlibKey.from_crypto(key.public_key()))
