# syntax=docker/dockerfile:1
# Streams completions, and swaps adapters while they run. How to build it, and how releases pin the base by digest: README.md.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /build
# PyPI's torch brings CUDA. For processors only: --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG PIP_EXTRA_INDEX_URL=""
COPY pyproject.toml constraints.txt deploy/images/install.py ./
RUN --mount=type=cache,target=/root/.cache/pip python install.py dependencies inference
COPY hatch_build.py README.md LICENSE NOTICE ./
COPY protos protos
COPY services services
RUN --mount=type=cache,target=/root/.cache/pip python install.py service

FROM ${PYTHON_IMAGE}
# tini forwards signals from the first moment and reaps what is orphaned, which a service as process 1 would not.
# Versions are those of the base image's Debian, which takes security fixes in place: a pin would only break the build.
# libgomp starts the threads of the compiled products; without it they are left to torch.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 tini \
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
    CODEGRAFT_LISTEN=0.0.0.0:50054
# The GPUs themselves are given by the device plugin or by compose, never by the image: "all" here would hand every GPU of
# a node to pods that asked for none.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="codegraft-inference" \
      org.opencontainers.image.description="Streams completions, and swaps adapters while they run." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
USER 10001:10001
WORKDIR /cache
VOLUME ["/cache"]
EXPOSE 50054
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["python", "-m", "services.core.rpc.probe"]
ENTRYPOINT ["tini", "--", "python", "-m", "services.inference"]
