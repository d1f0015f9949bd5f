"""What TGI clients send and get. Types alone are checked here; ranges in TGI's own order and words by `reading`."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from tightrope.server.asking import SharedFields
from tightrope.server.fields.explain import Explained
from tightrope.server.http.body import Body

U32 = 2**32
U64 = 2**64


class Parameters(SharedFields):
    """How to generate; null means absent. Sampling fields of other dialects are taken beside TGI's own."""

    max_new_tokens: int | None = Field(None, ge=0, lt=U32, description="Default: to the end of the window.")
    do_sample: bool | None = Field(None, description="Draw instead of taking the likeliest token.")
    temperature: float | None = Field(None, description="Above 0.")
    top_k: int | None = Field(None, ge=-(2**31), lt=2**31, description="Above 0.")
    top_p: float | None = Field(None, description="Between 0 and 1, both excluded.")
    typical_p: float | None = Field(None, description="Between 0 and 1, both excluded.")
    repetition_penalty: float | None = Field(None, description="Above 0; over prompt and answer, once per token id.")
    frequency_penalty: float | None = Field(None, description="-2 to 2; times the share of the id in the whole text.")
    best_of: int | None = Field(None, ge=0, lt=U32, description="Answers written, of which the likeliest is given.")
    seed: int | None = Field(None, ge=0, lt=U64)
    stop: list[str | None] | None = Field(None, description="Texts that end the answer; they stay at its end.")
    truncate: int | None = Field(None, ge=0, lt=U32, description="Keep the last n tokens of the input.")
    return_full_text: bool | None = Field(None, description="Put the input in front of the answer.")
    details: bool = False
    decoder_input_details: bool = Field(False, description="The input's tokens with their logprobs, in the details.")
    top_n_tokens: int | None = Field(None, ge=0, lt=U32, description="Alternatives at each token.")
    watermark: bool = Field(
        False, description="Make half of the tokens a little likelier, which can be found in the text."
    )
    grammar: dict[str, Any] | None = Field(None, description='{"type": "json" or "regex", "value": ...}')
    adapter_id: str | None = Field(None, description="The name of a loaded adapter.")
    return_token_ids: bool = Field(False, description="List the token ids of the input and of the answer.")


class GenerateBody(Body):
    """POST /generate and /generate_stream."""

    inputs: str
    parameters: Parameters | None = None
    model: str | None = Field(None, description="An adapter's name counts as adapter_id; others change nothing.")
    explain: bool = Field(False, description="Say in the answer what was done: prompt, samplers, ignored fields.")

    @property
    def named_model(self) -> str | None:
        adapter = None if self.parameters is None else self.parameters.adapter_id
        return self.model or adapter


class CompatBody(GenerateBody):
    """POST /."""

    stream: bool = False


FinishReason = Literal["length", "eos_token", "stop_sequence"]


class PrefillToken(BaseModel):
    id: int
    text: str
    logprob: float | None


class GeneratedToken(BaseModel):
    """logprob: of the distribution that the token was drawn from."""

    id: int
    text: str
    logprob: float | None
    special: bool


class BestOfSequence(BaseModel):
    """One of the answers that were not the best."""

    generated_text: str
    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[GeneratedToken]
    top_tokens: list[list[GeneratedToken]] = Field([], description="Absent unless asked for.")


class Details(BaseModel):
    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[GeneratedToken]
    best_of_sequences: list[BestOfSequence] = Field([], description="Absent unless best_of > 1.")
    top_tokens: list[list[GeneratedToken]] = Field([], description="Absent unless asked for.")


class GenerateAnswer(BaseModel):
    """`details` is absent unless asked for."""

    generated_text: str
    details: Details | None = None
    prompt_token_ids: list[int] = Field([], description="Absent unless return_token_ids asks for it.")
    token_ids: list[int] = Field([], description="Absent unless return_token_ids asks for it.")
    explain: Explained = {}


class Info(BaseModel):
    """GET /info."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    model_device_type: str
    model_pipeline_tag: str
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_input_length: int
    max_total_tokens: int
    max_batch_total_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None
