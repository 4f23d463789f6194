"""Signatures of registered versions, in the format of OpenSSF Model Signing with a key of the signer's own
(https://github.com/ossf/model-signing-spec). All files of a version are signed, its evidence among them, so that
`model_signing verify key` checks a version that was fetched, without Pennyweight.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pennyweight.errors import TrackingError, UsageError
from pennyweight.installed import installed_version
from pennyweight.tracking.evidence import SIGNATURE

#: Variables that name PEM files: the private key to sign with, and the public one that promoting asks for.
SIGNING_KEY, VERIFY_KEY = "PENNYWEIGHT_SIGNING_KEY", "PENNYWEIGHT_VERIFY_KEY"


def signing_key() -> Path | None:
    """The private key that versions are signed with when they are registered, or None."""
    return _named_in(SIGNING_KEY)


def verify_key() -> Path | None:
    """The public key that versions must be signed with to be promoted or served, or None."""
    return _named_in(VERIFY_KEY)


def sign(folders: Sequence[Path], key: Path, signature: Path) -> str:
    """Sign the files of several folders as those of one, and write the signature. Returns the key's fingerprint.

    Raises UsageError where the key is not an elliptic-curve key in PEM that can be read without a password, or
    model-signing is not installed.
    """
    model_signing = _library()
    fingerprint = _fingerprint(_private(key).public_key())
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch)
        for folder in folders:
            for path in folder.rglob("*"):
                if path.is_file():
                    link = whole / path.relative_to(folder)
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.symlink_to(path.resolve())
        hashing = model_signing.hashing.Config().set_ignored_paths(paths=[SIGNATURE]).set_allow_symlinks(True)
        signer = model_signing.signing.Config().use_elliptic_key_signer(private_key=key)
        signer.set_hashing_config(hashing).sign(whole, signature)
    return fingerprint


def check(folder: Path, key: Path, name: str) -> str:
    """The fingerprint of a public key, where all files in `folder` are signed with its private half.

    Raises TrackingError where they are not, and UsageError for a key that cannot be used, or without model-signing.
    """
    model_signing = _library()
    fingerprint = _fingerprint(_public(key))
    signature = folder / SIGNATURE
    if not signature.is_file():
        raise TrackingError(
            f"{name} is not signed, and {key} asks for a signature",
            f"set {SIGNING_KEY} where the recipe is run, and run it again: the winner is registered anew",
        )
    try:
        model_signing.verifying.Config().use_elliptic_key_verifier(public_key=key).verify(folder, signature)
    except Exception as error:  # the library raises what its parsers and its cryptography do
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise TrackingError(f"{name}: its signature is not that of {key} over these files: {reason}") from error
    return fingerprint


def fingerprint_of(key: Path) -> str:
    """sha256 of the public half of a private key. Raises UsageError."""
    return _fingerprint(_private(key).public_key())


def _named_in(variable: str) -> Path | None:
    text = os.environ.get(variable)
    if not text:
        return None
    path = Path(text).expanduser()
    if not path.is_file():
        raise UsageError(f"{variable} names {path}, and there is no such file")
    return path


def _library() -> Any:
    if installed_version("model-signing") is None:
        raise UsageError("signatures need model-signing, which is not installed", "pip install 'pennyweight[signing]'")
    import model_signing

    return model_signing


def _private(path: Path) -> Any:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    return _load(path, "private", lambda text: load_pem_private_key(text, None))


def _public(path: Path) -> Any:
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    return _load(path, "public", load_pem_public_key)


def _load(path: Path, kind: str, load: Any) -> Any:
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = load(path.read_bytes())
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"{path} is no {kind} key that can be read: {next(iter(str(error).splitlines()), error)}",
            "`openssl ecparam -name prime256v1 -genkey -noout -out key.pem` makes one, "
            "`openssl ec -in key.pem -pubout -out key.pub` its public half",
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey):
        raise UsageError(f"{path} is no elliptic-curve key")
    return key


def _fingerprint(public: Any) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()
