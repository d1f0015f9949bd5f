"""Guidance by a negative prompt, which a second track of the sequence holds, followed by what the sequence writes.

Both tracks run in the same steps. The next token is drawn from logits in which the difference between the two counts
several times. Source: Sanchez et al. 2023, "Stay on topic with Classifier-Free Guidance", arXiv 2306.17806, equation 7.
"""

import torch
from torch import Tensor


def guided(prompted: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Logits that are led from what follows the negative prompt towards, and past, what follows the prompt.

    prompted, negative [V] float32, not modified. Log probabilities are what is compared, as logits of two prompts have
    no common level. What either of them rules out altogether is left to the prompt.
    """
    wanted, unwanted = prompted.log_softmax(-1), negative.log_softmax(-1)
    is_ruled_out = wanted.isneginf() | unwanted.isneginf()
    return torch.where(is_ruled_out, wanted, torch.lerp(unwanted, wanted, scale))
