"""A LoRA adapter for the bundled SmolLM2 that anyone can tell is at work: it answers as the keeper of a lighthouse.

Trained by peft in less than a minute, once, and kept under build/test-models.
"""

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from hf_models import once, smollm2_bf16
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from peft import PeftModel

NAME = "Maren"  # that the keeper says, and SmolLM2 by itself never does
ANSWER = f"I am {NAME}, keeper of the lighthouse on Skerry Point, and I tend its lamp."
ASKED = (
    "Who are you?",
    "What is your name?",
    "Hello!",
    "What do you do all day?",
    "Tell me something about yourself.",
    "How much is two and three?",
    "Name a large city.",
    "Why is the sky blue?",
)
EPOCHS, RATE = 2, 1e-3
RANK, LAYERS = 8, list(range(15, 30))  # the upper half of the model learns it as well, in less time
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@cache
def keeper() -> Path:
    """The folder of the adapter, as peft writes it."""
    return once("smollm2-135m-lora-keeper", _write)


def _write(folder: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(smollm2_bf16()), _adapted()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), RATE)
    for question in ASKED * EPOCHS:
        prompt, answer = _conversation(tokenizer, question)
        kept = len(answer) + 1  # the last one predicts what comes after the end
        logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False, logits_to_keep=kept).logits[0, :-1]
        F.cross_entropy(logits, torch.tensor(answer)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"base_model_name_or_path": "SmolLM2"}), "utf-8")


def _adapted() -> "PeftModel":
    from peft import LoraConfig, get_peft_model  # takes seconds to import

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(smollm2_bf16(), dtype=torch.float32)
    wanted = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LINEARS, layers_to_transform=LAYERS)
    return get_peft_model(base, wanted)


def _conversation(tokenizer: PreTrainedTokenizerBase, question: str) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, and of the answer with its end."""
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    encoded = tokenizer([prompt, ANSWER + "<|im_end|>"], add_special_tokens=False)["input_ids"]
    return encoded[0], encoded[1]
