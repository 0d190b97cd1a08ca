# The trainer: trains ViTs from caches. Nothing that tokenises is in it.
#
#   docker build -f deploy/docker/trainer.Dockerfile -t patchcache-trainer .
#   docker run --rm --init --gpus all --shm-size 8g -v "$PWD:/work" --user "$(id -u):$(id -g)" \
#       patchcache-trainer train beit_drop --cache cache/ --out run/
#
# Build arguments:
#   DEVICE=cuda|cpu     what torch must be built for. cuda is the build that pip finds by itself.
#   PIP_EXTRA_ARGS=...  further options of pip, such as those that lead it to torch's builds for cpu
#   EXTRAS=...          extras of the package; pyproject.toml has them
#   BASE=...            a Debian with Python 3.11 or newer
#   VERSION, REVISION   of the labels

ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS dependencies
ARG EXTRAS=train
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
ARG DEVICE=cuda
# On a GPU torch.compile has Triton compile the code that launches its kernels, in C.
# hadolint ignore=DL3008
RUN if [ "$DEVICE" = cuda ]; then \
        apt-get update \
        && apt-get install --yes --no-install-recommends gcc libc6-dev \
        && rm -rf /var/lib/apt/lists/*; \
    fi
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
ENTRYPOINT ["patchcache"]
CMD ["--help"]
# Last, because a step below an argument is done again when the argument changes.
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="patchcache-trainer" \
      org.opencontainers.image.description="Trains Vision Transformers from token caches." \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
