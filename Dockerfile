# llave_jax for CPUs, NVIDIA GPUs or TPUs:
#
#   docker build -t llave .
#   docker build -t llave:cuda --build-arg EXTRAS=cuda .
#   docker build -t llave:tpu --build-arg EXTRAS=tpu --build-arg RUN_AS=root .
#
# CUDA comes as Python packages, so the base is the same; the driver and the NVIDIA Container Toolkit are
# the host's.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim-bookworm

# Optional dependencies as in pyproject.toml, such as "cuda" or "cuda,video"; none for CPUs.
ARG EXTRAS=""
# root, where a cluster's devices belong to root.
ARG RUN_AS=llave

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

# Python as a container's first process would not be ended by SIGTERM.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini=0.19.* \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 llave

WORKDIR /opt/llave_jax

# What the package depends on is a layer of its own, which a change of the code leaves as it is.
COPY pyproject.toml setup.py README.md LICENSE NOTICE ./
COPY configs configs
COPY llave_jax/__init__.py llave_jax/
RUN pip install --editable ".${EXTRAS:+[$EXTRAS]}"

COPY llave_jax llave_jax
COPY tools tools

USER ${RUN_AS}
# What these docs write behind "python" goes behind the image's name.
ENTRYPOINT ["tini", "--", "python"]
CMD ["-c", "import jax; print(jax.devices())"]
