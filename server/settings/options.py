"""The names of all options; the same in the configuration file, in the environment and on the command line."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tightrope.server.prompts.prompt_formats import PROMPT_FORMATS

TreePath = tuple[str, ...]  # An option lives there in ServerSettings.
CONFIG = "config"  # This option alone isn't in the tree: it says where the file is.


@dataclass(frozen=True, slots=True)
class Option:
    """One option.

    `also` are further places in the tree that giving it decides; `implies` those that it fills where nothing else does.
    is_reciprocal: the setting is one over what is written. is_list: the command line may give it several times.
    is_flag: there it stands alone, and means true. is_switch: the same, and with --no- before its name it means false.
    """

    path: TreePath
    group: str
    help: str
    metavar: str
    aliases: tuple[str, ...] = ()
    also: Mapping[TreePath, str] = field(default_factory=dict)
    implies: Mapping[TreePath, str] = field(default_factory=dict)
    is_reciprocal: bool = False
    is_list: bool = False
    is_flag: bool = False
    is_switch: bool = False


CLUSTER_GROUP = "replicas"  # Only a cluster has these,
SEVERAL_MODELS_GROUP = "several models"  # and no cluster these.
_MODEL: TreePath = ("engine", "model")
_ROPE: TreePath = (*_MODEL, "rope")
_LIMITS: TreePath = ("engine", "limits")

OPTIONS: Mapping[str, Option] = {
    "model": Option(
        (*_MODEL, "model"),
        "model",
        "path of a .gguf file or model folder, or a Hugging Face hub id (default: the bundled demo model)",
        "MODEL",
        ("-m", "--model-id"),
    ),
    "revision": Option((*_MODEL, "revision"), "model", "hub revision: branch, tag or commit", "REV"),
    "hub-cache": Option(
        (*_MODEL, "hub_cache"),
        "model",
        "folder that models are downloaded to (default: the hub library's own, as HF_HOME sets it)",
        "DIR",
        ("--huggingface-hub-cache", "--weights-cache-override"),
    ),
    "quantize": Option(
        (*_MODEL, "quantize"),
        "model",
        "format that the weights must be in: awq, exl2, gptq or bitsandbytes-nf4 (default: whatever the files hold)",
        "FORMAT",
    ),
    "lora": Option(
        (*_MODEL, "adapters"),
        "model",
        "LoRA adapters, that requests name as their model; with commas between, or given again",
        "NAME=PATH",
        ("--lora-adapters",),
        is_list=True,
    ),
    "lora-folder": Option(
        (*_MODEL, "adapter_folder"),
        "model",
        "folder that adapters may be loaded from while the server runs, with the admin key (default: none)",
        "DIR",
    ),
    "lora-memory-mib": Option(
        (*_MODEL, "adapter_memory_mib"),
        "context and memory",
        "memory kept for adapters from that folder, in MiB (default: 512)",
        "N",
    ),
    "embedding-model": Option(
        (*_MODEL, "embedding", "models"),
        "model",
        "models that embed or rank texts, as their files say, beside the chat model; with commas between, or given "
        "again",
        "MODEL",
        is_list=True,
    ),
    "embedding-max-tokens": Option(
        (*_MODEL, "embedding", "max_tokens"),
        "context and memory",
        "most tokens of a text that these read; the model's own window if that is less (default: 2048)",
        "N",
    ),
    "served-model-name": Option(
        ("served_model_name",), "model", "name that clients see (default: the model's)", "NAME"
    ),
    "any-model-name": Option(
        ("any_model_name",),
        "model",
        "whether any name in a request means the served model (default: on all routes but OpenAI's)",
        "",
        is_switch=True,
    ),
    "chat-template": Option(
        ("chat_template",),
        "model",
        f"used instead of the model's own: a Jinja file or source, or {', '.join(PROMPT_FORMATS)}",
        "NAME|FILE",
    ),
    "chat-template-arg": Option(
        ("chat_template_args",),
        "model",
        "variables of the chat template, such as length=medium, with commas between",
        "NAME=VALUE",
    ),
    "models": Option(
        ("models",),
        SEVERAL_MODELS_GROUP,
        "folder of models, or a TOML or JSON list of them with settings for each; a request's model loads it, and "
        "MODEL is the name of one to begin with (default: the one MODEL is served)",
        "DIR|FILE",
        ("--models-dir", "--models-preset"),
    ),
    "models-max": Option(
        ("models_max",),
        SEVERAL_MODELS_GROUP,
        "models that may be loaded side by side, if memory has room; else the least recently used goes (default: 4)",
        "N",
    ),
    "sleep-idle-seconds": Option(
        ("sleep_idle_s",),
        SEVERAL_MODELS_GROUP,
        "seconds after which a model that nobody uses is unloaded until somebody asks for it again (default: never)",
        "S",
    ),
    "replicas": Option(
        ("cluster", "replicas"), CLUSTER_GROUP, "replicas of the model, each an engine of its own (default: 2)", "N"
    ),
    "max-replicas": Option(
        ("cluster", "max_replicas"),
        CLUSTER_GROUP,
        "replicas that there may be while many requests, or long prompts, wait (default: as many as always)",
        "N",
    ),
    "scale-up-seconds": Option(
        ("cluster", "scale_up_s"),
        CLUSTER_GROUP,
        "seconds for which more replicas must be wanted before they are started (default: 30)",
        "S",
    ),
    "scale-down-seconds": Option(
        ("cluster", "scale_down_s"),
        CLUSTER_GROUP,
        "seconds for which fewer replicas must be enough before any is ended (default: 600)",
        "S",
    ),
    "replica-gpus": Option(
        ("cluster", "replica_gpus"),
        CLUSTER_GROUP,
        "GPUs of each replica (default: 1 where there are any, unless --device is cpu)",
        "X",
    ),
    "max-model-len": Option(
        (*_MODEL, "max_model_len"),
        "context and memory",
        "context window in tokens (default: what the model was trained for, or of that what memory holds)",
        "N",
        ("-c", "--ctx-size", "--max-total-tokens"),
    ),
    "kv-cache": Option(
        (*_MODEL, "cache", "dtype"),
        "context and memory",
        "storage of keys and values: auto, q8, q4 or f16 (default: auto)",
        "TYPE",
        ("--cache-type",),
    ),
    "kv-cache-tokens": Option(
        (*_MODEL, "cache", "tokens"),
        "context and memory",
        "cache capacity in tokens over all sequences (default: chosen from window and memory)",
        "N",
        ("--max-batch-total-tokens",),
    ),
    "cache-reuse": Option(
        (*_MODEL, "cache", "reuse"),
        "context and memory",
        "cached tokens that prompts may take: moved, also from other places, or exact alone (default: moved)",
        "KIND",
    ),
    "host-cache-mib": Option(
        (*_MODEL, "cache", "host_mib"),
        "context and memory",
        "the machine's memory for chats that have left the cache, in MiB (default: as much as the cache, at most half "
        "of what is left)",
        "N",
    ),
    "session-dir": Option(
        (*_MODEL, "cache", "session_dir"),
        "context and memory",
        "folder in which chats outlive the server, so that they are not read again (default: none)",
        "DIR",
    ),
    "session-disk-mib": Option(
        (*_MODEL, "cache", "session_disk_mib"),
        "context and memory",
        "most that this folder takes, in MiB; what was of no use for longest goes (default: 8192)",
        "N",
    ),
    "heal": Option(
        (*_LIMITS, "heal"),
        "context and memory",
        "moved tokens are computed again while nothing runs: auto, where that takes under a minute; off or always "
        "(default: auto)",
        "WHEN",
    ),
    "keep-free-mib": Option(
        (*_MODEL, "keep_free_mib"),
        "context and memory",
        "of the machine's memory that is free at the start, what others will need, in MiB, beside a tenth (default: 0)",
        "N",
    ),
    "max-memory-mib": Option(
        (*_MODEL, "max_memory_mib"),
        "context and memory",
        "most of the machine's memory that the model takes with its cache, in MiB (default: nine tenths of what is "
        "free)",
        "N",
    ),
    "gpu-memory-fraction": Option(
        (*_MODEL, "gpu_memory_fraction"),
        "context and memory",
        "most of a GPU's whole memory that is taken, of what is free there (default: 1)",
        "X",
        ("--cuda-memory-fraction",),
    ),
    "rope-scaling": Option(
        (*_ROPE, "kind"),
        "context and memory",
        "none, linear, dynamic, ntk, yarn, llama3 or longrope (default: the model's own)",
        "KIND",
    ),
    "rope-factor": Option(
        (*_ROPE, "factor"),
        "context and memory",
        "how many times the trained window the scaling reaches; linear unless --rope-scaling says otherwise",
        "X",
        implies={(*_ROPE, "kind"): "linear"},
    ),
    "rope-theta": Option((*_ROPE, "theta"), "context and memory", "RoPE base frequency", "X", ("--rope-freq-base",)),
    "rope-original-len": Option(
        (*_ROPE, "original_len"),
        "context and memory",
        "window in tokens before any scaling (default: the model's own)",
        "N",
        ("--yarn-orig-ctx",),
    ),
    "rope-freq-scale": Option(
        (*_ROPE, "factor"),
        "context and memory",
        "short for --rope-factor 1/X",
        "X",
        implies={(*_ROPE, "kind"): "linear"},
        is_reciprocal=True,
    ),
    "compress-pos-emb": Option(
        (*_ROPE, "factor"),
        "context and memory",
        "short for --rope-scaling linear --rope-factor N",
        "N",
        also={(*_ROPE, "kind"): "linear"},
    ),
    "alpha-value": Option(
        (*_ROPE, "factor"),
        "context and memory",
        "short for --rope-scaling ntk --rope-factor A",
        "A",
        also={(*_ROPE, "kind"): "ntk"},
    ),
    "threads": Option(
        (*_MODEL, "threads"),
        "speed",
        "most CPU threads, four per CPU or less (default: one per physical core); a busy machine gets fewer",
        "N",
        ("-t",),
    ),
    "tensor-parallel": Option(
        (*_MODEL, "tensor_parallel"),
        "speed",
        "cards, or ranks on a CPU, that each layer of a model is split over, or all (default: one card, or all where "
        "the model does not fit one)",
        "N",
        ("-tp", "--tensor-parallel-size", "--num-shard", "--sharded"),
    ),
    "dtype": Option(
        (*_MODEL, "dtype"),
        "speed",
        "of hidden states on a GPU: auto, bfloat16, float16 or float32 (default: auto, the files' if it has 16 bits)",
        "TYPE",
    ),
    "matmul-sums": Option(
        (*_MODEL, "matmul_sums"),
        "speed",
        "what prompts' products on a GPU are summed in: float32, or float16, less exact and faster on GeForce cards "
        "(default: float32)",
        "TYPE",
    ),
    "batch-invariant": Option(
        (*_MODEL, "batch_invariant"),
        "speed",
        "give the same text whatever else runs with weights of 16 or 32 bits on a CPU, too, whose prompts then take "
        "longer; quantized ones do in any case",
        "",
        is_flag=True,
    ),
    "device": Option(
        (*_MODEL, "device"),
        "speed",
        "where the model runs: auto, cpu, cuda, or cuda:N for one card of several (default: auto)",
        "DEVICE",
    ),
    "gguf-engine": Option(
        (*_MODEL, "gguf_engine"),
        "speed",
        "what runs a GGUF file: own, the engine of model folders, on a CPU; llama.cpp; or auto, the former where it "
        "knows all of the file (default: auto)",
        "ENGINE",
    ),
    "gpu-layers": Option(
        (*_MODEL, "gpu_layers"),
        "speed",
        "layers on the GPU, -1 for all of them (default: 0)",
        "N",
        ("-ngl", "--n-gpu-layers"),
    ),
    "n-cpu-moe": Option(
        (*_MODEL, "n_cpu_moe"),
        "speed",
        "first layers whose experts stay in the host's memory, of those on the GPU (default: 0)",
        "N",
        ("-ncmoe",),
    ),
    "gpu-split": Option(
        (*_MODEL, "gpu_split"),
        "speed",
        "lay a folder's model out on several cards layer by layer, with so many GiB of each, such as 20,24, or auto",
        "GIB,GIB,...",
        ("-gs", "--gpu_split"),
    ),
    "split-mode": Option(
        (*_MODEL, "split_mode"),
        "speed",
        "how llama.cpp shares a GGUF file out among several cards: layer, row, or none for one card (default: layer)",
        "MODE",
        ("-sm",),
    ),
    "tensor-split": Option(
        (*_MODEL, "tensor_split"),
        "speed",
        "in which proportions it does, such as 3,1 (default: by what each card has free)",
        "N,N,...",
        ("-ts",),
    ),
    "max-num-seqs": Option(
        (*_MODEL, "max_num_seqs"),
        "speed",
        "answers written at the same time (default: 16)",
        "N",
        ("-np", "--parallel", "--max-batch-size"),
    ),
    "step-tokens": Option(
        (*_MODEL, "step_tokens"),
        "speed",
        "most tokens in one step (default: 512; on a GPU 2048 where its memory has room)",
        "N",
        ("-b", "--batch-size", "--max-num-batched-tokens", "--max-batch-prefill-tokens"),
    ),
    "busy-step-ms": Option(
        (*_LIMITS, "busy_step_ms"),
        "speed",
        "while answers are being written, a step takes in no more prompt than fits this time (default: 150)",
        "MS",
    ),
    "max-waiting": Option(
        (*_LIMITS, "max_waiting"),
        "limits",
        "requests that may wait for their turn; more are refused with 429 (default: 128)",
        "N",
        ("--max-concurrent-requests",),
    ),
    "max-input-tokens": Option(
        (*_LIMITS, "max_input_tokens"),
        "limits",
        "most tokens of a prompt (default: the window but for one)",
        "N",
        ("--max-input-length",),
    ),
    "max-best-of": Option((*_LIMITS, "max_best_of"), "limits", "answers to one prompt: n, best_of (default: 8)", "N"),
    "max-logprobs": Option((*_LIMITS, "max_logprobs"), "limits", "alternatives listed per token (default: 20)", "N"),
    "max-top-n-tokens": Option(
        ("max_top_n_tokens",), "limits", "the same for TGI requests: top_n_tokens (default: 5)", "N"
    ),
    "watermark-gamma": Option(
        ("watermark_gamma",),
        "limits",
        "share of the vocabulary that `watermark` of TGI requests makes likelier (default: 0.5)",
        "X",
    ),
    "watermark-delta": Option(("watermark_delta",), "limits", "what it adds to their logits (default: 2)", "X"),
    "max-stop-sequences": Option(("max_stop_sequences",), "limits", "stop strings in one request (default: 4)", "N"),
    "max-client-batch-size": Option(
        ("max_client_batch_size",), "limits", "prompts in one completion request (default: 128)", "N"
    ),
    "max-body-bytes": Option(
        ("max_body_bytes",), "limits", "largest request body (default: 2000000)", "N", ("--payload-limit",)
    ),
    "max-held-bytes": Option(
        ("max_held_bytes",),
        "limits",
        "bytes of the bodies of all requests that wait or run; more are refused with 429 (default: 64000000)",
        "N",
    ),
    "kept-streams-mib": Option(
        ("kept_streams_mib",),
        "limits",
        "memory for events of streams that clients may come back to (X-Resumable: 1), in MiB (default: 64)",
        "N",
    ),
    "keep-streams": Option(
        ("keep_streams_s",),
        "limits",
        "seconds for which such a stream is kept, and written, while nobody reads it (default: 120)",
        "S",
    ),
    "restart-limit": Option(
        ("engine", "life", "restart_limit_s"),
        "limits",
        "seconds of failed starts of the engine after which the server ends, with status 1 (default: 600)",
        "S",
    ),
    "stuck-after": Option(
        ("engine", "life", "stuck_s"),
        "limits",
        "seconds without a sign of life after which the engine is killed and started again (default: 60)",
        "S",
    ),
    "host": Option(("host",), "network", "address to listen on (default: 127.0.0.1)", "ADDRESS", ("--hostname",)),
    "port": Option(("port",), "network", "port to listen on; 0 takes a free one (default: 8080)", "PORT", ("-p",)),
    "api-key": Option(("api_key",), "network", "key that clients must send (better given as TIGHTROPE_API_KEY)", "KEY"),
    "admin-key": Option(
        ("admin_key",),
        "network",
        "key for loading and unloading adapters (better given as TIGHTROPE_ADMIN_KEY; default: nobody may)",
        "KEY",
    ),
    "cors-origins": Option(
        ("cors_origins",),
        "network",
        "origins of web pages that may call, as https://app.example, with commas between; * is any (default: none)",
        "URLS",
        ("--cors-allow-origin",),
        is_list=True,
    ),
    "allowed-hosts": Option(
        ("allowed_hosts",),
        "network",
        "names that this server is reached by, besides localhost and addresses, with commas between; * is any",
        "NAMES",
    ),
    "log-level": Option(("log_level",), "network", "debug, info, warning or error (default: info)", "LEVEL"),
    "tgi-environment": Option(
        ("tgi_environment",),
        "network",
        "read the variables of TGI's launcher, too, such as MODEL_ID and PORT (default: only its flags are understood)",
        "",
        is_flag=True,
    ),
}
