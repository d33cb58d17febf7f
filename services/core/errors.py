"""The error table: every failure a caller can be told about, with its status code and its reason.

A domain function raises one of these classes; the rpc interceptor turns it into a ``google.rpc.Status`` whose
``ErrorInfo.reason`` is the class's reason, and the client turns that back into the same class. The table below is
therefore the documentation of the errors on both sides. Nothing here knows gRPC: :class:`Code` holds the canonical
names, and services/core/rpc maps them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

DOMAIN = "codegraft.dev"
"""``ErrorInfo.domain`` of every error of this system."""


class Code(StrEnum):
    """Canonical status codes, named as gRPC names them."""

    CANCELLED = "CANCELLED"
    UNKNOWN = "UNKNOWN"
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    ABORTED = "ABORTED"
    OUT_OF_RANGE = "OUT_OF_RANGE"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    INTERNAL = "INTERNAL"
    UNAVAILABLE = "UNAVAILABLE"
    DATA_LOSS = "DATA_LOSS"
    UNAUTHENTICATED = "UNAUTHENTICATED"


CALLER_FAULTS = frozenset(
    {
        Code.INVALID_ARGUMENT,
        Code.NOT_FOUND,
        Code.ALREADY_EXISTS,
        Code.PERMISSION_DENIED,
        Code.FAILED_PRECONDITION,
        Code.OUT_OF_RANGE,
        Code.UNAUTHENTICATED,
        Code.UNIMPLEMENTED,
        Code.DATA_LOSS,
    }
)
"""Codes for which the same attempt would fail again: jobs do not retry them."""


class CodegraftError(Exception):
    """The root of every error of this system.

    Args:
        message: what went wrong, in one sentence a person can act on.
        field: the request field (or setting) at fault, as the proto spells it; empty when none is.
        hint: how to mend it, in one sentence.
        retry_after: seconds after which the same call may succeed; None when it will not.
        metadata: facts a program can use (``ErrorInfo.metadata``).
    """

    code: ClassVar[Code] = Code.INTERNAL
    reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self, message: str, *, field: str = "", hint: str = "", retry_after: float | None = None, **metadata: str
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.hint = hint
        self.retry_after = retry_after
        self.metadata = metadata

    @property
    def is_callers_fault(self) -> bool:
        """Whether repeating the same attempt can only fail in the same way."""
        return self.code in CALLER_FAULTS


class InternalError(CodegraftError):
    """A defect of ours; the message carries only a request id to look up in the logs."""


# --- invalid requests -------------------------------------------------------------------------------------------


class InvalidArgument(CodegraftError):
    """A field's value is out of its documented range."""

    code = Code.INVALID_ARGUMENT
    reason = "INVALID_ARGUMENT"


class InvalidName(InvalidArgument):
    """A resource name or id does not have the documented form."""

    reason = "INVALID_NAME"


class InvalidPageSize(InvalidArgument):
    """A page size below zero."""

    reason = "INVALID_PAGE_SIZE"


class InvalidPageToken(InvalidArgument):
    """A page token that this list did not give out."""

    reason = "INVALID_PAGE_TOKEN"


class InvalidMask(InvalidArgument):
    """A file mask that is no .gitignore pattern."""

    reason = "INVALID_MASK"


class InvalidGitUrl(InvalidArgument):
    """A git URL of a form that is refused (other schemes, options, embedded credentials, control characters)."""

    reason = "INVALID_GIT_URL"


class InvalidHyperparameter(InvalidArgument):
    """A training setting outside its range, or two that contradict each other."""

    reason = "INVALID_HYPERPARAMETER"


class EmptyPrompt(InvalidArgument):
    """A completion request without prefix and suffix."""

    reason = "EMPTY_PROMPT"


class PromptTooLong(InvalidArgument):
    """A prompt that cannot fit the model's context however it is cut."""

    reason = "PROMPT_TOO_LONG"


class BrokenArchive(InvalidArgument):
    """An archive that is truncated, corrupt or of an unknown format."""

    reason = "BROKEN_ARCHIVE"


class BrokenBundle(InvalidArgument):
    """A git bundle that does not verify."""

    reason = "BROKEN_BUNDLE"


class InvalidCredential(InvalidArgument):
    """A secret or host key that cannot be read (no key, a wrong passphrase, a damaged known_hosts line)."""

    reason = "INVALID_CREDENTIAL"


class UploadMismatch(InvalidArgument):
    """The bytes received are not those announced (size, offset or sha256)."""

    reason = "UPLOAD_MISMATCH"


class LimitExceeded(InvalidArgument):
    """An input larger than a limit of the settings (bytes, members, ratio, path length)."""

    reason = "LIMIT_EXCEEDED"


# --- things that are not there ----------------------------------------------------------------------------------


class NotFound(CodegraftError):
    """The named thing does not exist."""

    code = Code.NOT_FOUND
    reason = "NOT_FOUND"


class ProjectNotFound(NotFound):
    """No project of that name."""

    reason = "PROJECT_NOT_FOUND"


class SourceNotFound(NotFound):
    """No source of that name in the project."""

    reason = "SOURCE_NOT_FOUND"


class CredentialNotFound(NotFound):
    """No credential of that name in the project."""

    reason = "CREDENTIAL_NOT_FOUND"


class UploadNotFound(NotFound):
    """No finished upload of that digest in the project."""

    reason = "UPLOAD_NOT_FOUND"


class SnapshotNotFound(NotFound):
    """No snapshot of that digest in the project."""

    reason = "SNAPSHOT_NOT_FOUND"


class ScanNotFound(NotFound):
    """No scan of that name in the project."""

    reason = "SCAN_NOT_FOUND"


class DatasetNotFound(NotFound):
    """No dataset of that digest in the project."""

    reason = "DATASET_NOT_FOUND"


class VerdictNotFound(NotFound):
    """The scan has no file of that path."""

    reason = "VERDICT_NOT_FOUND"


class RunNotFound(NotFound):
    """No run of that name in the project."""

    reason = "RUN_NOT_FOUND"


class CheckpointNotFound(NotFound):
    """The run has no checkpoint at that step."""

    reason = "CHECKPOINT_NOT_FOUND"


class ModelNotFound(NotFound):
    """No such model in the catalogue, or no such folder."""

    reason = "MODEL_NOT_FOUND"


class ServingNotFound(NotFound):
    """The project has no serving policy of its own yet."""

    reason = "SERVING_NOT_FOUND"


class KeyNotFound(NotFound):
    """No API key of that name."""

    reason = "KEY_NOT_FOUND"


class ObjectNotFound(NotFound):
    """The object store has no object under that key."""

    reason = "OBJECT_NOT_FOUND"


class ArtifactNotFound(NotFound):
    """No committed artifact of that name."""

    reason = "ARTIFACT_NOT_FOUND"


# --- things in the way ------------------------------------------------------------------------------------------


class ResourceExists(CodegraftError):
    """A thing of that name exists already, with other content."""

    code = Code.ALREADY_EXISTS
    reason = "RESOURCE_EXISTS"


class RequestIdReused(ResourceExists):
    """The same request_id came before with another request."""

    reason = "REQUEST_ID_REUSED"


class FailedPrecondition(CodegraftError):
    """The state of the system does not allow this now."""

    code = Code.FAILED_PRECONDITION
    reason = "FAILED_PRECONDITION"


class ProjectNotEmpty(FailedPrecondition):
    """A project is deleted with its contents only when that is asked for (force)."""

    reason = "PROJECT_NOT_EMPTY"


class CredentialsDisabled(FailedPrecondition):
    """The service has no key to encrypt credentials with, or not the one with which this was encrypted."""

    reason = "CREDENTIALS_DISABLED"


class CredentialInUse(FailedPrecondition):
    """A source still uses the credential."""

    reason = "CREDENTIAL_IN_USE"


class SnapshotInUse(FailedPrecondition):
    """A dataset was made of the snapshot."""

    reason = "SNAPSHOT_IN_USE"


class NoSources(FailedPrecondition):
    """The project has no source in state READY."""

    reason = "NO_SOURCES"


class EmptySource(FailedPrecondition):
    """The repository or archive holds no file."""

    reason = "EMPTY_SOURCE"


class SourceUnreachable(FailedPrecondition):
    """The repository or URL could not be fetched."""

    reason = "SOURCE_UNREACHABLE"


class EmptyDataset(FailedPrecondition):
    """No file passed the filters, so there is nothing to train on."""

    reason = "EMPTY_DATASET"


class NoDataset(FailedPrecondition):
    """The project has no dataset: it was never scanned with success."""

    reason = "NO_DATASET"


class InvalidTransition(FailedPrecondition):
    """A job in this state cannot go to the wanted one."""

    reason = "INVALID_TRANSITION"


class AdapterRejected(FailedPrecondition):
    """An adapter that does not verify (digest, base model, rank, values): the old one keeps serving."""

    reason = "ADAPTER_REJECTED"


class BaseModelMismatch(AdapterRejected):
    """An adapter that was trained on another base model."""

    reason = "BASE_MODEL_MISMATCH"


class TrainingDiverged(FailedPrecondition):
    """A loss or a gradient that is no number any more: the last checkpoint stays as it is."""

    reason = "TRAINING_DIVERGED"


class OutOfMemory(FailedPrecondition):
    """A run that does not fit in its worker's memory, whatever is tried."""

    reason = "OUT_OF_MEMORY"


class ChatUnsupported(FailedPrecondition):
    """The served model has no chat template."""

    reason = "CHAT_UNSUPPORTED"


class NotSupported(CodegraftError):
    """An operation of the contract that this version does not offer."""

    code = Code.UNIMPLEMENTED
    reason = "NOT_SUPPORTED"


# --- who may what -----------------------------------------------------------------------------------------------


class Unauthenticated(CodegraftError):
    """The call has no credentials, or such as nobody knows."""

    code = Code.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"


class KeyExpired(Unauthenticated):
    """The API key, or this secret of it, has ended by itself."""

    reason = "KEY_EXPIRED"


class KeyRevoked(Unauthenticated):
    """The API key was revoked."""

    reason = "KEY_REVOKED"


class InvalidToken(Unauthenticated):
    """An OIDC token that is not valid here: signature, issuer, audience, time, or what it says of roles."""

    reason = "INVALID_TOKEN"


class PermissionDenied(CodegraftError):
    """The caller is known, but may not do this: its role is too low, or it is in another project."""

    code = Code.PERMISSION_DENIED
    reason = "PERMISSION_DENIED"


# --- races ------------------------------------------------------------------------------------------------------


class Aborted(CodegraftError):
    """Another writer was faster: read again, then repeat."""

    code = Code.ABORTED
    reason = "ABORTED"


class EtagMismatch(Aborted):
    """The resource changed since the etag was read."""

    reason = "ETAG_MISMATCH"


class RevisionMismatch(Aborted):
    """The key's revision is not the expected one (compare-and-set lost)."""

    reason = "REVISION_MISMATCH"


class LeaseLost(Aborted):
    """The job belongs to another worker by now: this one's writes count no more."""

    reason = "LEASE_LOST"


class JobCancelled(CodegraftError):
    """The job ended because its cancellation was asked for."""

    code = Code.CANCELLED
    reason = "JOB_CANCELLED"


class Cancelled(CodegraftError):
    """The caller went away."""

    code = Code.CANCELLED
    reason = "CANCELLED"


class DeadlineExceeded(CodegraftError):
    """The caller's deadline passed."""

    code = Code.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"


# --- capacity and outages ---------------------------------------------------------------------------------------


class ResourceExhausted(CodegraftError):
    """A queue or quota is full; retry_after says when to come back."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "RESOURCE_EXHAUSTED"


class QueueFull(ResourceExhausted):
    """The engine's admission queue is full."""

    reason = "QUEUE_FULL"


class QuotaExceeded(ResourceExhausted):
    """A project or a key is over a limit of its quota; metadata says which, whose, the limit and what is used of it."""

    reason = "QUOTA_EXCEEDED"

    @property
    def is_callers_fault(self) -> bool:
        """A job that found no room ends: somebody has to make some, and no further attempt does."""
        return True


class DiskFull(ResourceExhausted):
    """A folder in which a service writes has no room left."""

    reason = "DISK_FULL"

    @classmethod
    def of(cls, folder: object, why: str) -> DiskFull:
        """What to tell of a folder that cannot be written to."""
        return cls(
            f"the disk of {folder} is full ({why})",
            hint="Free some space there, or point CODEGRAFT_CACHE_DIR and TMPDIR to a larger disk; then try again.",
            retry_after=60,
            folder=str(folder),
        )


class Unavailable(CodegraftError):
    """A service this one stands on cannot be reached now; the call may be repeated."""

    code = Code.UNAVAILABLE
    reason = "UNAVAILABLE"


class StoreUnavailable(Unavailable):
    """The object store does not answer or refuses."""

    reason = "STORE_UNAVAILABLE"


class StateUnavailable(Unavailable):
    """NATS does not answer."""

    reason = "STATE_UNAVAILABLE"


class ModelLoading(Unavailable):
    """The model is still being loaded."""

    reason = "MODEL_LOADING"


class ShuttingDown(Unavailable):
    """This replica is draining; another one will take the call."""

    reason = "SHUTTING_DOWN"


class DigestMismatch(CodegraftError):
    """Stored bytes do not have the digest under which they were stored."""

    code = Code.DATA_LOSS
    reason = "DIGEST_MISMATCH"


# --- the table --------------------------------------------------------------------------------------------------


def all_errors() -> list[type[CodegraftError]]:
    """Every class above, roots first."""
    found: list[type[CodegraftError]] = [CodegraftError]
    for error in found:
        found.extend(error.__subclasses__())
    return found


def by_reason(reason: str) -> type[CodegraftError]:
    """The class whose reason that is.

    An unknown reason (a newer server's) gives :class:`CodegraftError` itself.
    """
    return _BY_REASON.get(reason, CodegraftError)


_BY_REASON = {error.reason: error for error in all_errors() if error is not CodegraftError}
