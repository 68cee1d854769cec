# One Dockerfile for all targets. It builds the wheel itself, so a clone and BuildKit (Docker 23 or newer) are enough:
#
#   CPU, x86-64 or Arm:
#     docker build -t internvl-edge .
#   GeForce and RTX cards:
#     docker build -t internvl-edge:rtx --build-arg EXTRA=rtx --build-arg BASE=nvidia/cuda:13.0.2-base-ubuntu24.04 .
#   Jetson with JetPack 7.2 (TensorRT 10.16):
#     docker build -t internvl-edge:jetson --build-arg EXTRA=jetson --build-arg BASE=nvcr.io/nvidia/tensorrt:26.05-py3 .
#   Jetson with JetPack 6.2 (TensorRT 10.3):
#     docker build -t internvl-edge:jetson --build-arg EXTRA=jetson --build-arg BASE=nvcr.io/nvidia/l4t-jetpack:r36.4.0 .
#
# Run it as yourself, so that what it writes into your folders is yours, and keep its cache in a volume:
#
#   docker run --rm --user "$(id -u):$(id -g)" -v internvl-edge-cache:/cache -v "$PWD:/data" internvl-edge \
#       run bundle --image receipt.jpg "What is the total?"
#   docker run --rm --user "$(id -u):$(id -g)" -v internvl-edge-cache:/cache -v "$PWD:/data" --gpus all \
#       internvl-edge:rtx build bundle
#   docker run --rm --user "$(id -u):$(id -g)" -v internvl-edge-cache:/cache -v "$PWD:/data" --runtime nvidia \
#       internvl-edge:jetson build bundle --device orin-nano-8gb
#
# Base images are named by tag. To pin them, look a digest up and give it instead; none is written here, because a digest
# is right for one moment and one registry, and nobody could have checked it:
#
#   docker buildx imagetools inspect python:3.11-slim-bookworm --format '{{.Manifest.Digest}}'
#   docker build --build-arg BASE=python:3.11-slim-bookworm@sha256:... .      (and BUILDER, for the stage of the wheel)
ARG BUILDER=python:3.11-slim-bookworm
ARG BASE=python:3.11-slim-bookworm

# hadolint ignore=DL3006
FROM ${BUILDER} AS wheel
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist /source && cp /source/constraints.txt /dist

# hadolint ignore=DL3006
FROM ${BASE}

ARG EXTRA=cpu
LABEL org.opencontainers.image.title="internvl-edge" \
      org.opencontainers.image.description="InternVL on the edge: export, quantize and run" \
      org.opencontainers.image.source="https://github.com/internvl-edge/internvl-edge" \
      org.opencontainers.image.documentation="https://github.com/internvl-edge/internvl-edge/tree/main/docs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      internvl-edge.extra="${EXTRA}"
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/internvl-edge/bin:$PATH

# CUDA images have no Python. hadolint DL3008 asks for pinned versions, but these differ between base images.
# hadolint ignore=DL3008
RUN python3 -c "import ensurepip" 2>/dev/null \
    || { apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*; }

# JetPack installs TensorRT for the system's Python, so the environment must also use the system's packages. The tested
# versions are those for Python 3.11 and newer; JetPack 6 has 3.10. The wheel is mounted and thus in no layer. hadolint
# DL3013 asks for a version, which the name of the wheel has.
# hadolint ignore=DL3013
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    python3 -m venv --system-site-packages /opt/internvl-edge \
    && if python3 -c "import sys; sys.exit(sys.version_info < (3, 11))"; then tested="--constraint /dist/constraints.txt"; fi \
    && pip install ${tested:+$tested} "$(echo /dist/internvl_edge-*.whl)[${EXTRA}]"

# Whoever runs it has a home and a cache to write into, also with a number that has no name here. Libraries that ask for
# the user's name take it from USER.
RUN useradd --no-create-home --home-dir /home/edge --uid 10001 edge \
    && mkdir -p /home/edge /cache /data && chmod 1777 /home/edge /cache
ENV HOME=/home/edge USER=edge XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface
USER 10001
WORKDIR /data
ENTRYPOINT ["internvl-edge"]
CMD ["--help"]
