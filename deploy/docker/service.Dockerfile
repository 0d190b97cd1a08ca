# The service: token ids over HTTP at port 8000.
#
#   docker build -f deploy/docker/service.Dockerfile -t patchcache-service .
#   docker run --rm --init -p 127.0.0.1:8000:8000 -v "$PWD:/work:ro" patchcache-service \
#       --codebook codebook.safetensors --insecure
#
# Build arguments:
#   DEVICE=cuda|cpu     what torch must be built for. cuda is the build that pip finds by itself.
#   PIP_EXTRA_ARGS=...  further options of pip, such as those that lead it to torch's builds for cpu
#   EXTRAS=...          extras of the package; pyproject.toml has them
#   BASE=...            a Debian with Python 3.11 or newer
#   VERSION, REVISION   of the labels

ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS dependencies
ARG EXTRAS=serve,tracing
ARG DEVICE=cuda
ARG PIP_EXTRA_ARGS=
WORKDIR /src
COPY pyproject.toml deploy/constraints.txt deploy/docker/install.py ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python install.py --extras "$EXTRAS" --device "$DEVICE" --project pyproject.toml \
        --constraints constraints.txt --into /opt/patchcache

# The same text in every Dockerfile here, so that it is built once.
FROM ${BASE} AS wheel
# Debian keeps one version of a package: a version that is named here would soon be gone.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md ./
COPY deploy/build_hook.py deploy/
COPY cache_builder cache_builder/
COPY tokenizers_svc tokenizers_svc/
COPY trainer trainer/
# A wheel without kernels would be called -any.whl.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip wheel --no-deps --wheel-dir /wheels . && ls /wheels/patchcache-*-linux_*.whl

FROM ${BASE}
# What libraries keep between runs is in /cache, what they need for one run in /tmp; everything else
# may be read-only. Both, and the working directory, can be written by any user, for `--user`.
ENV PATH=/opt/patchcache/bin:$PATH \
    HOME=/cache \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    TORCH_HOME=/cache/torch \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    TRITON_CACHE_DIR=/cache/triton \
    TMPDIR=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN groupadd --gid 10001 patchcache \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /cache \
        --shell /usr/sbin/nologin patchcache \
    && install --directory --mode 1777 /cache /work
COPY --from=dependencies /opt/patchcache /opt/patchcache
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip --python /opt/patchcache/bin/python install --no-cache-dir --no-deps /wheels/*.whl
WORKDIR /work
USER 10001:10001
EXPOSE 8000
# Healthy is ready: while models are loaded and after SIGTERM it is not. A service that is stuck ends.
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --start-interval=2s --retries=3 \
    CMD ["python", "-c", "from http.client import HTTPConnection; service = HTTPConnection('127.0.0.1', 8000, timeout=4); service.request('GET', '/readyz'); raise SystemExit(service.getresponse().status != 200)"]
ENTRYPOINT ["patchcache", "serve", "--host", "0.0.0.0", "--port", "8000"]
# Last, because a step below an argument is done again when the argument changes.
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="patchcache-service" \
      org.opencontainers.image.description="Answers token ids of images over HTTP." \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
