# syntax=docker/dockerfile:1.7
# Producers: the driver, Ray's head and Ray's workers, all from this one image. Built from the repository's root:
#   docker build -f deploy/containers/pipeline.Dockerfile --build-arg FLAVOUR=cuda -t limbeck-pipeline:0.1.0-cuda .
ARG FLAVOUR=cpu

FROM python:3.12.12-slim-bookworm AS base-cpu

# Any driver of CUDA 13 serves it; the CUDA libraries themselves come with the torch wheel.
FROM nvidia/cuda:13.0.3-base-ubuntu24.04 AS base-cuda
# Ubuntu has a user 1000 of its own.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && userdel --remove ubuntu

# hadolint ignore=DL3006
FROM base-${FLAVOUR}
# bash, procps and wget: KubeRay starts and probes a node through them. g++: --compile.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends bash ca-certificates g++ procps tini wget \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 --shell /bin/bash limbeck \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1

# torch first and pinned, in a layer of its own. TORCH_INDEX: PyTorch's index of CPU wheels, where the CPU image
# shall not carry CUDA's gigabytes; by default pip's own index, which offers the CUDA wheel on Linux.
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=
# hadolint ignore=DL3013
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH"

# setuptools writes beside the sources: rw lets it, and what it writes is not kept.
ARG EXTRAS=pipeline,s3,diffusers
RUN --mount=type=bind,target=/source,rw \
    pip install --constraint /source/deploy/containers/constraints.txt "/source[$EXTRAS]"

# Nothing is downloaded at run time, and nothing is reported.
ENV PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    HF_HUB_OFFLINE=1 \
    TRANSFORMERS_OFFLINE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# By number, so that Kubernetes can tell that it is not root.
USER 1000:1000
WORKDIR /home/limbeck
# tini hands signals on and collects Ray's orphans. KubeRay puts its own command in the place of both.
ENTRYPOINT ["tini", "--"]
CMD ["limbeck", "--help"]
