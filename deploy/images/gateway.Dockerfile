# syntax=docker/dockerfile:1
# HTTP for editors over the services' gRPC. How to build it, and how releases pin the base by digest: README.md.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /build
COPY pyproject.toml constraints.txt deploy/images/install.py ./
RUN --mount=type=cache,target=/root/.cache/pip python install.py dependencies gateway
COPY hatch_build.py README.md LICENSE NOTICE ./
COPY protos protos
COPY services services
RUN --mount=type=cache,target=/root/.cache/pip python install.py service

FROM ${PYTHON_IMAGE}
# tini forwards signals from the first moment and reaps what is orphaned, which a service as process 1 would not.
# Versions are those of the base image's Debian, which takes security fixes in place: a pin would only break the build.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 codegraft \
    && useradd --uid 10001 --gid 10001 --home-dir /cache --no-create-home --shell /usr/sbin/nologin codegraft \
    && install --directory --owner=10001 --group=10001 /cache
COPY --from=build /opt/codegraft /opt/codegraft
# PYTHONSAFEPATH: nothing that lies in the working folder, which can be written to, is taken for a module.
ENV PATH=/opt/codegraft/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    HOME=/cache \
    CODEGRAFT_CACHE_DIR=/cache \
    CODEGRAFT_LISTEN=0.0.0.0:8080
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="codegraft-gateway" \
      org.opencontainers.image.description="HTTP for editors over the services' gRPC." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
USER 10001:10001
WORKDIR /cache
VOLUME ["/cache"]
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["python", "-m", "services.gateway.probe"]
ENTRYPOINT ["tini", "--", "python", "-m", "services.gateway"]
