"""Decode under recorded graphs: a stand-in records a call as the call itself, on the fixed inputs that it was given."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tightrope.backends.hf.run.graphs import DecodeGraphs, batch_size, context_size, recordings
from tightrope.kernels.forms.layout import PAGE, RopeTable, StepLayout
from tightrope.kernels.forms.low_rank import NONE, AdapterRows

pytestmark = pytest.mark.quick

LONGEST = 5000  # tokens
VOCABULARY = 12  # numbers that a row of logits tells
PAGE_ANGLE = 8  # the place of the one that comes from a table


class Recorder:
    """Counts recordings; to replay one is to run it again, so a result tells what the fixed inputs hold by then."""

    def __init__(self) -> None:
        self.recordings = 0

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.recordings += 1
        return run


class Model:
    """Its logits tell of each row everything that it was given; `steps` are the layouts of its calls."""

    def __init__(self) -> None:
        self.steps: list[StepLayout] = []
        self.stored: list[int] = []

    def forward(
        self,
        token_ids: Tensor,
        step: StepLayout,
        tables: Mapping[str, RopeTable],
        rows: Tensor,
        adapters: AdapterRows | None = None,
        embedded: Tensor | None = None,
    ) -> Tensor:
        self.steps.append(step)
        self.stored += [slot for slot in step.slots.tolist() if slot >= 0]
        sequences, pages = step.sequence_of.long(), (step.positions // PAGE).long()
        windowed = step if step.windowed is None else step.windowed
        table = tables["default"]
        seen = torch.stack(
            (
                token_ids,
                step.positions,
                step.context_lens[sequences],
                step.slots,
                step.block_tables[sequences, pages],
                windowed.slots,
                windowed.block_tables[sequences, pages],
                table.query_scale[table.set_of[sequences].long()],
                table.pages[table.set_of[sequences].long(), 0, 0, 0],
                torch.zeros_like(token_ids) if adapters is None else adapters.slots + 1,
                torch.zeros(len(token_ids)) if adapters is None else (adapters.slots >= 0) * adapters.scales,
                token_ids if embedded is None else embedded[:, 0],
            ),
            1,
        )
        return seen[rows].float()


def rope_table(set_of: list[int]) -> RopeTable:
    return RopeTable(
        pages=torch.tensor([3.0, 4.0]).view(2, 1, 1, 1).expand(2, 4, 2, 1).contiguous(),
        places=torch.zeros(2, PAGE, 2, 1),
        set_of=torch.tensor(set_of, dtype=torch.int32),
        query_scale=torch.tensor([1.0, 2.0]),
    )


def decode_step(lengths: list[int], *, has_windows: bool = False) -> tuple[Tensor, StepLayout]:
    """Token ids and the layout of a step in which sequences of these lengths have one token each."""
    width = -(-max(lengths) // PAGE)
    block_tables = torch.arange(len(lengths) * width, dtype=torch.int32).view(len(lengths), width)
    positions = torch.tensor(lengths) - 1
    pages = block_tables[torch.arange(len(lengths)), positions // PAGE]
    step = StepLayout(
        query_starts=torch.arange(len(lengths) + 1, dtype=torch.int32),
        context_lens=torch.tensor(lengths, dtype=torch.int32),
        block_tables=block_tables,
        slots=pages.long() * PAGE + positions % PAGE,
        positions=positions.int(),
        sequence_of=torch.arange(len(lengths), dtype=torch.int32),
        max_query_len=1,
        max_context_len=max(lengths),
    )
    if has_windows:
        step = replace(step, windowed=replace(step, block_tables=block_tables + 1000, slots=step.slots + 1000 * PAGE))
    return torch.tensor(lengths) * 7, step


def graphs_of(model: Model, recorder: Recorder, max_num_seqs: int = 8, *, has_windows: bool = False) -> DecodeGraphs:
    return DecodeGraphs(model.forward, max_num_seqs, LONGEST, "cpu", recorder, has_windows=has_windows)


def adapter_rows(slots: list[int], launches: int | None) -> AdapterRows:
    present = tuple(sorted({slot for slot in slots if slot != NONE}))
    scales = torch.arange(len(slots)) + 1.0
    return AdapterRows(torch.tensor(slots, dtype=torch.int32), scales, present, launches)


@given(
    steps=st.lists(
        st.tuples(st.lists(st.integers(1, LONGEST), min_size=1, max_size=9), st.booleans()), min_size=1, max_size=6
    ),
    has_windows=st.booleans(),
)
def test_any_run_of_steps_gives_what_the_model_gives(steps: list[tuple[list[int], bool]], has_windows: bool):
    graphs = graphs_of(Model(), Recorder(), has_windows=has_windows)
    table = rope_table([0])
    for lengths, has_adapters in steps:
        adapters = adapter_rows([length % 3 - 1 for length in lengths], 1) if has_adapters else None
        token_ids, step = decode_step(lengths, has_windows=has_windows)
        sets = torch.tensor([length % 2 for length in lengths], dtype=torch.int32)
        tables = {"default": replace(table, set_of=sets)}
        rows = torch.arange(len(lengths))

        found = graphs.forward(token_ids, step, tables, rows, adapters)

        assert torch.equal(found, Model().forward(token_ids, step, tables, rows, adapters))


def test_a_recording_serves_whichever_rows_use_whichever_adapters_until_others_are_launched():
    recorder = Recorder()
    graphs = graphs_of(Model(), recorder)
    token_ids, step = decode_step([10, 20])
    tables = {"default": rope_table([0, 0])}

    counts = []
    for adapters in (
        None,
        adapter_rows([0, NONE], 1),
        adapter_rows([2, 0], 1),
        None,
        adapter_rows([2, 2], 2),
        adapter_rows([0, 2], 2),
        None,
    ):
        graphs.forward(token_ids, step, tables, torch.arange(2), adapters)
        counts.append(recorder.recordings)

    assert counts == [1, 2, 2, 2, 3, 3, 3]


def test_rows_that_fill_up_a_recording_use_no_adapter():
    seen: list[list[int]] = []

    class Watched(Model):
        def forward(self, token_ids: Tensor, step: StepLayout, *args: Any) -> Tensor:  # noqa: ANN401
            seen.append(args[2].slots.tolist())
            return super().forward(token_ids, step, *args)

    graphs = graphs_of(Watched(), Recorder())
    for lengths, slots in (([1, 2, 3, 4], [5, 6, 7, 8]), ([1, 2, 3], [9, NONE, 9])):
        tables = {"default": rope_table([0] * len(lengths))}
        graphs.forward(*decode_step(lengths), tables, torch.arange(len(lengths)), adapter_rows(slots, 1))

    assert seen == [[5, 6, 7, 8], [9, NONE, 9, NONE]]


def test_adapters_that_change_more_than_linears_are_not_recorded():
    model, recorder = Model(), Recorder()
    graphs = graphs_of(model, recorder)
    adapters = adapter_rows([0, 1], None)

    graphs.forward(*decode_step([10, 20]), {"default": rope_table([0, 0])}, torch.arange(2), adapters)

    assert recorder.recordings == 0


def test_steps_of_one_size_share_a_recording_and_others_get_their_own():
    recorder = Recorder()
    graphs = graphs_of(Model(), recorder)
    table = rope_table([0] * 4)

    counts = []
    for lengths in ([10, 20, 30, 40], [50, 60, 70, 2048], [1], [2048], [2049]):
        tables = {"default": replace(table, set_of=table.set_of[: len(lengths)])}
        graphs.forward(*decode_step(lengths), tables, torch.arange(len(lengths)))
        counts.append(recorder.recordings)

    assert counts == [1, 1, 2, 2, 3]


def test_a_step_is_filled_up_with_sequences_that_hold_and_store_nothing():
    model = Model()
    graphs = graphs_of(model, Recorder(), has_windows=True)
    for lengths in ([5, 6, 7, 8], [11, 12, 13]):  # what the first leaves behind must not show in the second
        token_ids, step = decode_step(lengths, has_windows=True)
        graphs.forward(token_ids, step, {"default": rope_table([1] * len(lengths))}, torch.arange(len(lengths)))

    last = model.steps[-1]
    assert last.context_lens.tolist() == [11, 12, 13, 0]
    assert last.windowed is not None
    assert last.slots[3] == last.windowed.slots[3] == -1
    assert last.query_starts.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("rows", [[0], [1, 2], [0, 1, 2]])
def test_only_the_wanted_rows_come_back(rows: list[int]):
    graphs = graphs_of(Model(), Recorder())
    token_ids, step = decode_step([10, 20, 30])
    tables = {"default": rope_table([0, 1, 0])}

    found = graphs.forward(token_ids, step, tables, torch.tensor(rows))

    assert torch.equal(found, Model().forward(token_ids, step, tables, torch.tensor(rows)))


def test_a_result_outlives_the_next_step():
    recorded = torch.zeros(1, VOCABULARY)  # every replay writes its result here

    def capture(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: recorded.copy_(run())

    graphs = DecodeGraphs(Model().forward, 1, LONGEST, "cpu", capture)
    tables = {"default": rope_table([0])}

    first = graphs.forward(*decode_step([10]), tables, torch.arange(1))
    kept = first.clone()
    graphs.forward(*decode_step([99]), tables, torch.arange(1))

    assert torch.equal(first, kept)


def test_a_table_that_lies_elsewhere_is_recorded_anew():
    recorder = Recorder()
    graphs = graphs_of(Model(), recorder)
    token_ids, step = decode_step([10])
    first, grown = rope_table([0]), rope_table([0])
    grown.pages.fill_(9.0)

    for table in (first, first, grown):
        found = graphs.forward(token_ids, step, {"default": table}, torch.arange(1))

    assert recorder.recordings == 2
    assert found[0, PAGE_ANGLE] == 9.0


def test_all_that_steps_can_ask_for_is_recorded_at_once_the_largest_first():
    model, recorder = Model(), Recorder()
    graphs = graphs_of(model, recorder, max_num_seqs=3)
    done: list[float] = []
    grown = rope_table([0] * 4)

    graphs.record_all(
        lambda size: {"default": replace(grown, set_of=grown.set_of[:size])}, lambda token_ids: None, done.append
    )

    sizes = recordings(3, LONGEST)
    assert sizes == [(4, LONGEST), (2, LONGEST), (2, 2048), (1, LONGEST), (1, 2048)]
    assert recorder.recordings == len(sizes)
    assert done == sorted(done)
    assert done[-1] == 1
    for lengths in ([1], [10, 20, LONGEST], [2048, 1], [2049]):
        token_ids, step = decode_step(lengths)
        tables = {"default": replace(grown, set_of=grown.set_of[: len(lengths)])}
        rows = torch.arange(len(lengths))
        assert torch.equal(
            graphs.forward(token_ids, step, tables, rows), Model().forward(token_ids, step, tables, rows)
        )
    assert recorder.recordings == len(sizes)


def test_what_is_recorded_ahead_stores_nothing():
    model = Model()
    graphs = DecodeGraphs(
        model.forward, 4, LONGEST, "cpu", lambda run: (run(), run)[1], has_windows=True
    )  # to record is to run
    graphs.forward(*decode_step([5, 6, 7, 8], has_windows=True), {"default": rope_table([0] * 4)}, torch.arange(4))
    stored = len(model.stored)

    graphs.record_all(lambda size: {"default": rope_table([0] * size)}, lambda token_ids: None, lambda share: None)

    assert len(model.stored) == stored
    assert all(step.windowed is not None and step.windowed.slots.eq(-1).all() for step in model.steps[-3:])


@pytest.mark.parametrize(
    ("lengths", "changes"),
    [([10, 20], {"max_query_len": 2}), (list(range(1, 18)), {})],
    ids=["a prompt", "more sequences than are recorded"],
)
def test_other_steps_run_as_they_are(lengths: list[int], changes: dict[str, int]):
    model, recorder = Model(), Recorder()
    graphs = graphs_of(model, recorder)
    token_ids, step = decode_step(lengths)
    step = replace(step, **changes)

    graphs.forward(token_ids, step, {"default": rope_table([0] * len(lengths))}, torch.arange(len(lengths)))

    assert recorder.recordings == 0
    assert model.steps == [step]


@pytest.mark.parametrize(("num_seqs", "size"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (16, 16), (17, 32)])
def test_batches_are_recorded_in_powers_of_two(num_seqs: int, size: int):
    assert batch_size(num_seqs) == size


@pytest.mark.parametrize(
    ("num_seqs", "num_tokens", "size"),
    [(1, 1, 2048), (2, 2048, 2048), (1, 2049, 100_000), (2, 100_000, 100_000), (3, 1, 100_000), (16, 9, 100_000)],
)
def test_contexts_are_recorded_in_two_sizes_for_one_or_two_sequences_and_in_one_for_more(
    num_seqs: int, num_tokens: int, size: int
):
    assert context_size(num_seqs, num_tokens, 100_000) == size
    assert context_size(num_seqs, min(num_tokens, 512), 512) == 512


@given(
    st.lists(st.lists(st.integers(1, LONGEST), min_size=1, max_size=8), min_size=1, max_size=20),
    st.integers(1, 8),
)
def test_no_more_is_recorded_than_is_said_beforehand(steps: list[list[int]], max_num_seqs: int):
    recorder = Recorder()
    graphs, table = graphs_of(Model(), recorder, max_num_seqs), rope_table([0])
    for lengths in steps:
        part = lengths[:max_num_seqs]
        tables = {"default": replace(table, set_of=torch.zeros(len(part), dtype=torch.int32))}
        graphs.forward(*decode_step(part), tables, torch.arange(len(part)))

    assert recorder.recordings <= len(recordings(max_num_seqs, LONGEST))


def test_all_that_is_said_beforehand_is_recorded_by_steps_of_its_sizes():
    recorder = Recorder()
    graphs = graphs_of(Model(), recorder)
    table = rope_table([0])
    said = recordings(8, LONGEST)
    for size, context in said:
        tables = {"default": replace(table, set_of=torch.zeros(size, dtype=torch.int32))}
        graphs.forward(*decode_step([context] * size), tables, torch.arange(size))

    assert said == [(8, LONGEST), (4, LONGEST), (2, LONGEST), (2, 2048), (1, LONGEST), (1, 2048)]
    assert recorder.recordings == len(said)


def test_rows_of_a_table_elsewhere_are_brought_along_in_a_fixed_place():
    graphs = graphs_of(Model(), Recorder())
    tables = {"default": rope_table([0, 1, 0])}
    for lengths in ([10, 20, 30], [5, 6], [7, 8, 9]):
        token_ids, step = decode_step(lengths)
        table = {"default": replace(tables["default"], set_of=tables["default"].set_of[: len(lengths)])}
        embedded = torch.tensor(lengths).float().unsqueeze(1) / 3

        found = graphs.forward(token_ids, step, table, torch.arange(len(lengths)), embedded=embedded)

        assert torch.equal(found[:, -1], embedded[:, 0])


class Failing(Recorder):
    """Fails at the second recording."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        super().__call__(run)
        if self.recordings == 2:
            raise self._error
        return run


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("operation not permitted when stream is capturing")],
)
def test_a_recording_that_fails_turns_graphs_off_and_its_step_runs_as_it_is(
    error: Exception, caplog: pytest.LogCaptureFixture
):
    model, recorder = Model(), Failing(error)
    graphs = graphs_of(model, recorder)
    for lengths in ([10], [10, 20], [10], [10, 20, 30]):  # The second is recorded in vain, the first is no more.
        token_ids, step = decode_step(lengths)
        tables, rows = {"default": rope_table([0] * len(lengths))}, torch.arange(len(lengths))

        found = graphs.forward(token_ids, step, tables, rows)

        assert torch.equal(found, Model().forward(token_ids, step, tables, rows))
    assert recorder.recordings == 2
    assert caplog.messages == [f"graphs=off: a step of 2 tokens can't be recorded: {error}"]


def test_no_more_is_recorded_ahead_after_a_recording_that_failed(caplog: pytest.LogCaptureFixture):
    model, recorder = Model(), Failing(torch.OutOfMemoryError("CUDA out of memory"))
    graphs = graphs_of(model, recorder, max_num_seqs=8)
    table = rope_table([0] * 8)

    graphs.record_all(
        lambda size: {"default": replace(table, set_of=table.set_of[:size])}, lambda token_ids: None, lambda share: None
    )

    assert recorder.recordings == 2 < len(recordings(8, LONGEST))
    assert caplog.messages == ["graphs=off: a step of 4 tokens can't be recorded: CUDA out of memory"]
