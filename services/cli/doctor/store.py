"""The bucket in the object store: whether it is there, closed, and keeps what records name."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote

import urllib3
from minio import Minio
from minio.error import MinioException, S3Error
from minio.lifecycleconfig import LifecycleConfig, Rule
from urllib3.exceptions import HTTPError

from services.cli.control.installation import Installation
from services.cli.doctor.check import Check, failed, ok, warning
from services.core.store.s3 import PROBE_KEY

_TIMEOUT = 5.0


def check(place: Installation) -> list[Check]:
    """The bucket with the credentials at hand. Blocks."""
    settings = place.settings
    http = urllib3.PoolManager(timeout=_TIMEOUT, retries=False)
    client = Minio(
        settings.s3_endpoint,
        access_key=settings.s3_access_key.get_secret_value(),
        secret_key=settings.s3_secret_key.get_secret_value(),
        secure=settings.s3_secure,
        http_client=http,
    )
    bucket = settings.s3_bucket
    scheme = "https" if settings.s3_secure else "http"
    try:
        if not client.bucket_exists(bucket):
            return [failed("bucket", f"there is no {bucket}", "Make it, or restart a service that may make it.")]
        return [
            ok("bucket", bucket),
            _conditions(client, bucket),
            *_settings(client, bucket),
            _closed(http, f"{scheme}://{settings.s3_endpoint}/{quote(bucket)}"),
        ]
    except (MinioException, HTTPError) as error:
        return [failed("bucket", f"a signed call fails: {error}", "Correct CODEGRAFT_S3_ACCESS_KEY and …_SECRET_KEY.")]


def _conditions(client: Minio, bucket: str) -> Check:
    """Every service proves at its start that the store keeps conditions, and leaves a mark."""
    name = "conditional writes"
    try:
        client.stat_object(bucket, PROBE_KEY)
    except S3Error as error:
        if error.code != "NoSuchKey":
            raise
        return warning(name, "no service has proved them yet", "Start one: it refuses a store that does not keep them.")
    return ok(name, "proved")


def _settings(client: Minio, bucket: str) -> Iterator[Check]:
    try:
        versioned = client.get_bucket_versioning(bucket).status == "Enabled"
        rules = (client.get_bucket_lifecycle(bucket) or LifecycleConfig([])).rules
    except S3Error as error:
        yield warning("bucket settings", f"not to be seen: {error.code}", "Come with credentials that may read them.")
        return
    yield judge_rules(rules)
    yield judge_versions(rules, versioned=versioned)


def judge_rules(rules: list[Rule]) -> Check:
    """Whether a lifecycle rule deletes what records name: objects end with their records, never by their age."""
    deadly = [rule for rule in rules if rule.status == "Enabled" and rule.expiration and _deletes(rule)]
    if deadly:
        told = ", ".join(rule.rule_id or "one without a name" for rule in deadly)
        return failed(
            "lifecycle", f"rules delete objects by their age: {told}", "Remove them: codegraft snapshot gc removes."
        )
    return ok("lifecycle", f"{len(rules)} rules, none deletes what is in use" if rules else "no rules, and none needed")


def _deletes(rule: Rule) -> bool:
    expiration = rule.expiration
    return expiration is not None and (expiration.days is not None or expiration.date is not None)


def judge_versions(rules: list[Rule], *, versioned: bool) -> Check:
    """With versioning, what is deleted stays until a rule ends it."""
    if not versioned:
        return ok("versioning", "off: what is deleted is gone; objects never change, so nothing else needs it")
    ends = any(rule.status == "Enabled" and rule.noncurrent_version_expiration for rule in rules)
    if ends:
        return ok("versioning", "on, and older versions end")
    return warning("versioning", "on, and what is deleted stays for ever", "Add a rule that ends noncurrent versions.")


def _closed(http: urllib3.PoolManager, url: str) -> Check:
    if http.request("GET", url).status == 200:
        return failed("closed bucket", "anybody may list it", "Remove the bucket's policy for anonymous callers.")
    return ok("closed bucket", "a caller without credentials is refused")
