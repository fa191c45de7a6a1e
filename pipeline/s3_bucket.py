"""The objects of a bucket below a prefix, through the SDK of S3 (boto3, extra `logicrd[s3]`), and what its errors mean.

A put is whole or nothing, and on condition of what was there before: two writers cannot both succeed. It carries its
SHA-256, which the server compares; from one that says nothing of it the object is read back. Every call has a time
limit and is tried again a few times. The SDK takes keys from its own environment and files; none is part of an address,
a message or a log. Called by `s3_store` and `s3_lock`.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import IO, Any

from pipeline.errors import CheckError, ConfigError, DependencyError
from pipeline.places import S3Address

_CONNECT_S, _READ_S, _ATTEMPTS = 10.0, 60.0, 4
_REGION = "us-east-1"  # what stores of one's own call theirs, unless they are told otherwise
# What the codes of an answer mean for whoever runs the command; the servers' own words follow.
_KEY = "the key that the SDK found is not the server's: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
_RIGHT = "the key needs the rights to list the bucket, and to get, put and delete objects below the prefix"
_HINTS = {
    "AccessDenied": _RIGHT,
    "403": f"the key is not the server's, or has too few rights: {_RIGHT}",
    "InvalidAccessKeyId": _KEY,
    "SignatureDoesNotMatch": _KEY,
    "ExpiredToken": _KEY,
    "InvalidToken": _KEY,
    "NoSuchBucket": "make it, or correct the address in triton.models_repo",
    "AuthorizationHeaderMalformed": "AWS_REGION names the region that the server calls its own",
    "PermanentRedirect": "AWS_REGION names the region of the bucket",
    "301": "AWS_REGION names the region of the bucket",
    "RequestTimeTooSkewed": "set this machine's clock",
    "EntityTooLarge": "one file has 5 GB at most",
}
_KEYS_IN_URL = re.compile(r"//[^/\s]*@")
_CHANGED = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409"}
_DAMAGED = {"BadDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch", "InvalidDigest"}


class _Changed(Exception):  # noqa: N818 (an answer, not a fault)
    """Something else is there than the condition says."""


class _Absent(Exception):  # noqa: N818 (the same)
    """No such object."""


@dataclass(frozen=True, slots=True)
class Found:
    """An object. `etag` is '' where a gateway has none; `is_new`: it was put in this second of the server's clock."""

    content: bytes
    etag: str
    is_new: bool


class Bucket:
    """Names are relative to the address. Any thread; connects with the first call. Raises DependencyError where the
    server does not answer or refuses, and ConfigError without the SDK."""

    def __init__(self, address: S3Address) -> None:
        self._address = address
        # Cleared when the server turns out to know no conditions.
        self.has_conditions = True

    def path(self, name: str = "") -> str:
        """Tell where an object is, for messages."""
        return f"{self._address}/{name}" if name else str(self._address)

    def require(self) -> None:
        """Raise DependencyError unless the bucket is there."""
        try:
            self._call("head_bucket")
        except _Absent:
            raise DependencyError(f"{self.path()}: no such bucket", hint=_HINTS["NoSuchBucket"]) from None

    def list(self, begins: str) -> dict[str, str]:
        """Give the objects whose names begin so, with their ETags, in the order of their names."""
        pages = self._client.get_paginator("list_objects_v2")
        found: dict[str, str] = {}
        try:
            with _explained(self.path()):
                for page in pages.paginate(Bucket=self._address.bucket, Prefix=self._key(begins)):
                    found |= {self._name(each["Key"]): each.get("ETag", "") for each in page.get("Contents", ())}
        except _Absent:  # the words of a server that is none of S3
            raise DependencyError(f"{self.path()}: no such bucket", hint=_HINTS["NoSuchBucket"]) from None
        return found

    def get(self, name: str) -> Found | None:
        """Give an object; None when it is not there."""
        for attempt in range(_ATTEMPTS):
            try:
                answer = self._call("get_object", name)
            except _Absent:
                return None
            try:
                with _explained(self.path(name)):
                    return Found(answer["Body"].read(), answer.get("ETag", ""), _is_new(answer))
            except DependencyError:  # in the middle of the answer, where the SDK does not try again
                if attempt == _ATTEMPTS - 1:
                    raise
        return None

    def digest(self, name: str) -> str | None:
        """Give an object's SHA-256 in hexadecimal digits, as the server has it or as it is read; None without one."""
        try:
            known = self._call("head_object", name, ChecksumMode="ENABLED")
        except _Absent:
            return None
        digest = known.get("ChecksumSHA256", "-")
        # One of hashes of parts is none of the object; older servers say so by the number of parts behind it alone.
        if known.get("ChecksumType", "FULL_OBJECT") != "FULL_OBJECT" or "-" in digest:
            digest = self._read_digest(name)
        return base64.b64decode(digest).hex()

    def put(self, name: str, body: bytes | IO[bytes], etag: str | None) -> str:
        """Put an object in place of the one with this ETag, None where there is none; gives the new ETag.

        Raises CheckError when something else is there, and when what arrived is not what was sent.
        """
        digest = base64_sha256(body)
        try:
            answer = self._put(name, body, digest, etag)
        except (_Changed, _Absent):
            # Perhaps it is ours: the SDK tries again when an answer is lost.
            if (found := self.get(name)) is None or base64_sha256(found.content) != digest:
                raise CheckError(f"{self.path(name)} was changed by another command", hint="try again") from None
            return found.etag
        if "ChecksumSHA256" not in answer and self._read_digest(name) != digest:
            raise CheckError(f"{self.path(name)} did not arrive as it was sent", hint="try again")
        return str(answer["ETag"])

    def delete(self, name: str) -> None:
        """Remove an object; nothing when it is not there."""
        with suppress(_Absent):
            self._call("delete_object", name)

    # Parts

    def _put(self, name: str, body: bytes | IO[bytes], digest: str, etag: str | None) -> Any:  # noqa: ANN401 (untyped)
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag} if etag else {}
        try:
            return self._call("put_object", name, Body=body, ChecksumSHA256=digest, **condition)
        except NotImplementedError:
            self.has_conditions = False
            if not isinstance(body, bytes):
                body.seek(0)
            return self._call("put_object", name, Body=body, ChecksumSHA256=digest)

    def _read_digest(self, name: str) -> str:
        found = self.get(name)
        return "" if found is None else base64_sha256(found.content)

    def _call(self, what: str, name: str | None = None, **arguments: object) -> Any:  # noqa: ANN401 (untyped)
        key = {} if name is None else {"Key": self._key(name)}
        call = getattr(self._client, what)
        with _explained(self.path(name or "")):
            return call(Bucket=self._address.bucket, **key, **arguments)

    def _key(self, name: str) -> str:
        return f"{self._address.prefix}/{name}" if self._address.prefix else name

    def _name(self, key: str) -> str:
        return key[len(self._key("")) :]

    @cached_property
    def _client(self) -> Any:  # noqa: ANN401 (the SDK makes its class at run time)
        try:
            import boto3
            from botocore.config import Config
        except ImportError:
            raise ConfigError(
                f"{self.path()}: the SDK of S3 is not installed", hint="pip install 'logicrd[s3]'"
            ) from None
        settings = Config(
            connect_timeout=_CONNECT_S,
            read_timeout=_READ_S,
            retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
            # Checksums that only AWS knows are left out; SHA-256 is given with each put.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "path"} if self._address.endpoint else None,
        )
        with _explained(self.path()):
            session = boto3.session.Session()
            return session.client(
                "s3",
                endpoint_url=self._address.endpoint or None,
                region_name=session.region_name or _REGION,
                config=settings,
            )


def base64_sha256(body: bytes | IO[bytes]) -> str:
    """Hash bytes, or a file from its beginning, which is where it is left."""
    if isinstance(body, bytes):
        return base64.b64encode(hashlib.sha256(body).digest()).decode()
    digest = hashlib.file_digest(body, "sha256")  # type: ignore[arg-type]  # any readable file will do
    body.seek(0)
    return base64.b64encode(digest.digest()).decode()


def _is_new(answer: Any) -> bool:  # noqa: ANN401 (untyped)
    now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    return bool(answer["LastModified"] >= now)


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turn the SDK's errors into ours."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        raise _refusal(path, error) from None
    except (BotoCoreError, ValueError) as error:  # the latter for an endpoint that is none
        raise _no_answer(path, error) from None


def _refusal(path: str, error: Any) -> Exception:  # noqa: ANN401 (untyped)
    """Say what an answer of the server means."""
    code, words = str(error.response["Error"].get("Code", "")), str(error.response["Error"].get("Message", ""))
    if code in {"NoSuchKey", "404"}:
        return _Absent()
    if code in _CHANGED:
        return _Changed()
    if code == "NotImplemented" and error.operation_name == "PutObject":
        return NotImplementedError()
    if code in _DAMAGED:
        return CheckError(f"{path} did not arrive as it was sent: {words}", hint="try again")
    hint = _HINTS.get(code) or (_KEY if "access key" in words.lower() else "see the log of that server")
    return DependencyError(f"{path}: {code}: {words}", hint=hint)


def _no_answer(path: str, error: Exception) -> DependencyError:
    """Say why there was no answer, by the SDK's names for it."""
    kind = type(error).__name__
    hint = "look whether it is up, and whether address and port are right (http:// or https://)"
    if "SSL" in kind:
        hint = "AWS_CA_BUNDLE names a file of the authorities that vouch for it"
    elif any(word in kind for word in ("Credential", "Profile", "Token", "SSO", "Login")):
        hint = _KEY
    words = _KEYS_IN_URL.sub("//", str(error))  # AWS_ENDPOINT_URL may have some
    return DependencyError(f"{path}: no answer: {words}", hint=hint)
