"""Runs llama.cpp's own server, which the xllamacpp wheel carries, in a process of its own until it is told to stop."""

import argparse
import signal

import xllamacpp

_CACHE_TYPES = {"f16": xllamacpp.ggml_type.GGML_TYPE_F16, "q8": xllamacpp.ggml_type.GGML_TYPE_Q8_0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="path of a .gguf file")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True, help="cells of the cache, shared by all slots")
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--cache-reuse", type=int, default=0, help="shortest chunk that is shifted, in tokens; 0: none")
    parser.add_argument("--cache", choices=sorted(_CACHE_TYPES), required=True)
    options = parser.parse_args()

    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.hostnames = ["127.0.0.1"]
    params.port = options.port
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    params.n_ctx = options.context
    params.n_parallel = options.slots
    params.kv_unified = True  # llama-server's own default when it chooses its slots
    params.cache_type_k = params.cache_type_v = _CACHE_TYPES[options.cache]
    params.n_gpu_layers = 0
    params.n_cache_reuse = options.cache_reuse
    params.verbosity = 1  # errors
    # Everything else stays as it ships: flash attention chosen by itself, prompt cache on, micro-batch of 512.
    server = xllamacpp.Server(params)
    print(f"listening on {server.listening_address}", flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main()
