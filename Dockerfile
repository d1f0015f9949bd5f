# docker build -t tightrope .                              for CPUs with AVX2 (any of the last ten years)
# docker build -t tightrope --build-arg DEVICE=cuda .      for NVIDIA cards of compute capability 8.6 to 9.0, driver 580 or newer
#
# docker run -p 8080:80 tightrope                          serves the bundled model
# docker run --gpus all --shm-size 1g -p 8080:80 -v $volume:/data tightrope --model-id ORG/NAME
ARG DEVICE=cpu

FROM ubuntu:24.04 AS build-cpu
# not for this machine's processor alone: the image may run elsewhere
ENV CMAKE_ARGS="-DGGML_NATIVE=OFF"
# the build of torch without CUDA libraries
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
ENV EXTRAS=demo,cluster

# The toolkit is the one that torch is built with, as exllamav2's kernels are linked to both.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04 AS build-cuda
ENV CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=86;89;90"
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cu130
ENV EXTRAS=demo,exl2,cluster

FROM build-${DEVICE} AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-dev python3-venv g++ make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/tightrope
# llama.cpp first, so that a change of our own code doesn't build it again
COPY Makefile ./
COPY .ci/constraints.txt .ci/
COPY backends/gguf/llama_build.cmake backends/gguf/
RUN make llama
COPY pyproject.toml setup.py README.md ./
COPY tightrope/__init__.py tightrope/__main__.py tightrope/processes.py tightrope/
COPY server server
COPY engine engine
COPY backends backends
COPY kernels kernels
RUN .venv/bin/python -m pip install --quiet -c .ci/constraints.txt ".[${EXTRAS}]"

FROM build AS installed-cpu

# exllamav2 compiles its kernels when it is imported, with a compiler that the image has no room for.
FROM build AS installed-cuda
RUN TORCH_CUDA_ARCH_LIST="8.6;8.9;9.0" TORCH_EXTENSIONS_DIR=/tmp/extensions .venv/bin/python -c "import exllamav2.ext" \
    && cp /tmp/extensions/exllamav2_ext/exllamav2_ext.so .venv/lib/python3.12/site-packages/

FROM installed-${DEVICE} AS installed

FROM ubuntu:24.04 AS run-cpu

FROM nvidia/cuda:13.0.2-runtime-ubuntu24.04 AS run-cuda
# Triton compiles what starts its kernels in C, against Python's headers.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*

FROM run-${DEVICE}
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 libgomp1 ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home tightrope \
    && install --directory --owner tightrope --group tightrope /data /chats \
    && ln -s /opt/tightrope/.venv/bin/ray /opt/tightrope/.venv/bin/serve /usr/local/bin/
# the same path as where it was built, which the environment's scripts have written in them
COPY --from=installed /opt/tightrope/.venv /opt/tightrope/.venv
COPY docker-entrypoint.sh /opt/tightrope/
# The volume keeps models that are named by their hub id, where TGI's image keeps them too, and compiled kernels.
ENV HF_HOME=/data HOME=/data/tightrope TRITON_CACHE_DIR=/data/tightrope/triton
VOLUME /data
# Loopback inside a container can't be reached from outside; -p decides who can. The variables of TGI's launcher win.
ENV TIGHTROPE_HOST=0.0.0.0 TIGHTROPE_PORT=80 TIGHTROPE_TGI_ENVIRONMENT=true
EXPOSE 80
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m \
    CMD ["/opt/tightrope/.venv/bin/python", "-Ic", "import os; from urllib.request import urlopen; urlopen(f'http://127.0.0.1:{os.environ.get(\"PORT\") or os.environ[\"TIGHTROPE_PORT\"]}/health')"]
# root until it knows whose the volume is
ENTRYPOINT ["/opt/tightrope/docker-entrypoint.sh"]
