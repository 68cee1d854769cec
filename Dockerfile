# One file for both targets; the wheel is built first, so that every step can be repeated without this repository:
#   pip wheel --no-deps -w dist .
#   docker build -t internvl-edge .                                   CPU, any x86-64 or Arm machine
# Base images for NVIDIA devices are arguments: --build-arg BASE=... --build-arg EXTRA=...
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

ARG EXTRA=cpu
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

RUN useradd --create-home --uid 1000 edge
COPY dist/*.whl /tmp/
RUN python3 -m pip install "$(ls /tmp/internvl_edge-*.whl)[${EXTRA}]" && rm /tmp/*.whl

USER edge
WORKDIR /home/edge
HEALTHCHECK --interval=60s --timeout=20s CMD ["internvl-edge", "doctor"]
ENTRYPOINT ["internvl-edge"]
CMD ["--help"]
