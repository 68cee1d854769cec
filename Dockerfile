# One Dockerfile for all targets. Build the wheel first; the image then needs only dist/ from this repository:
#
#   pip wheel --no-deps -w dist .
#   docker build -t internvl-edge .                                              CPU, x86-64 or Arm
#   docker build -t internvl-edge:rtx --build-arg EXTRA=rtx \
#       --build-arg BASE=nvidia/cuda:13.0.2-base-ubuntu24.04 .                   GeForce and RTX cards
#   docker build -t internvl-edge:jetson --build-arg EXTRA=jetson \
#       --build-arg BASE=nvcr.io/nvidia/tensorrt:26.05-py3 .                     Jetson, JetPack 7.2: TensorRT 10.16
#       --build-arg BASE=nvcr.io/nvidia/l4t-jetpack:r36.4.0 .                    Jetson, JetPack 6.2: TensorRT 10.3
#
#   docker run --rm -v "$PWD:/data" internvl-edge run /data/bundle --image /data/receipt.jpg "What is the total?"
#   docker run --rm --gpus all -v "$PWD:/data" internvl-edge:rtx build /data/bundle
#   docker run --rm --runtime nvidia -v "$PWD:/data" internvl-edge:jetson build /data/bundle --device orin-nano-8gb
ARG BASE=python:3.11-slim-bookworm
# hadolint ignore=DL3006
FROM ${BASE}

ARG EXTRA=cpu
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/internvl-edge/bin:$PATH

# CUDA images have no Python. hadolint DL3008 asks for pinned versions, but these differ between base images.
# hadolint ignore=DL3008
RUN python3 -c "import ensurepip" 2>/dev/null \
    || { apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*; }

# JetPack installs TensorRT for the system's Python, so the environment must also use the system's packages.
COPY dist/*.whl /tmp/
RUN python3 -m venv --system-site-packages /opt/internvl-edge \
    && pip install "$(ls /tmp/internvl_edge-*.whl)[${EXTRA}]" \
    && rm /tmp/*.whl \
    && useradd --create-home --uid 10001 edge

USER 10001
WORKDIR /home/edge
HEALTHCHECK --interval=60s --timeout=20s CMD ["internvl-edge", "doctor"]
ENTRYPOINT ["internvl-edge"]
CMD ["--help"]
