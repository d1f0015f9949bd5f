# docker build -t tightrope .                                    for CPUs with AVX2 (any of the last ten years)
# docker build -t tightrope --build-arg DEVICE=cuda .            with GPU offload; run it with --gpus all, and -ngl -1
# docker run -p 8080:8080 tightrope                              serves the bundled model
# docker run -p 8080:8080 -v ~/models:/models tightrope /models/my-model.gguf --ctx-size 16384
ARG DEVICE=cpu

FROM ubuntu:24.04 AS build-cpu
# not for this machine's processor alone: the image may run elsewhere
ENV CMAKE_ARGS="-DGGML_NATIVE=OFF"

FROM nvidia/cuda:12.8.1-devel-ubuntu24.04 AS build-cuda
ENV CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_CUDA=ON"

FROM build-${DEVICE} AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv g++ make \
    && rm -rf /var/lib/apt/lists/*
# the build of torch without CUDA libraries: models run in llama.cpp, torch only holds the logits
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
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
RUN .venv/bin/python -m pip install --quiet -c .ci/constraints.txt '.[demo]'

FROM ubuntu:24.04 AS run-cpu
FROM nvidia/cuda:12.8.1-runtime-ubuntu24.04 AS run-cuda

FROM run-${DEVICE}
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 libgomp1 ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home tightrope \
    && install --directory --owner tightrope /models
# the same path as where it was built, which the environment's scripts have written in them
COPY --from=build /opt/tightrope/.venv /opt/tightrope/.venv
USER tightrope
# models that are named by their hub id are kept in the volume, too
ENV HF_HOME=/models/hub
VOLUME /models
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m \
    CMD ["/opt/tightrope/.venv/bin/python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8080/health')"]
# loopback inside a container can't be reached from outside; -p decides who can
ENTRYPOINT ["/opt/tightrope/.venv/bin/tightrope", "serve", "--host", "0.0.0.0", "--port", "8080"]
