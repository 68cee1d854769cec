# One Dockerfile for the command line and for the server (`--target serve`), on all devices. It builds the wheel itself, so a clone and BuildKit (Docker 23 or newer) are enough:
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
# The server is the target `serve` of any of these: the same command with `--target serve`. docs/containers.md has more.
#
#   docker build -t internvl-edge:serve --target serve .
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
# The server reads a bundle, and writes only into its cache:
#
#   docker run --rm --read-only --tmpfs /tmp -v internvl-edge-cache:/cache -v "$PWD/bundle:/bundle:ro" \
#       -p 127.0.0.1:23333:23333 -e INTERNVL_EDGE_API_KEY internvl-edge:serve
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
FROM ${BASE} AS command

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


FROM command AS serve
# The server's own packages, and those for answers in a given form.
USER 0
# hadolint ignore=DL3013
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    if python3 -c "import sys; sys.exit(sys.version_info < (3, 11))"; then tested="--constraint /dist/constraints.txt"; fi \
    && pip install ${tested:+$tested} "$(echo /dist/internvl_edge-*.whl)[serve,structured]"
# A bundle of another user is only read: it must be readable by all, or the container must run as its owner (`--user`).
USER 10001
EXPOSE 23333
# Live, not ready: a server that loads or drains must not be restarted for it. A proxy in the environment is not asked.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:23333/livez', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["internvl-edge", "serve"]
# All addresses of the container, which nothing reaches unless a port is published. The server refuses this without a key.
CMD ["/bundle", "--host", "0.0.0.0"]

# Without --target: the command line.
FROM command
