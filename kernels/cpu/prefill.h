// Attention of many queries of a sequence: tiles of keys, expanded and rotated once for a block of queries.
//
// The queries of a block (rows times the heads of a group) are the lanes of vectors, so that maxima, sums and
// corrections of the softmax need no step across lanes. Source: Dao et al. 2022, arXiv 2205.14135.
#pragma once

#include "attention.h"
#include "tile.h"

struct PrefillBlock {
    int b, head, first_row, last_row;  // Rows count from the sequence's first in the step.
};

constexpr int BLOCK_QUERIES = 128;
constexpr int TILE = 96;  // Keys of a tile: whole pages, and a multiple of TALL.

// Queries and outputs are kept transposed, in panels [panels][D][PANEL].
struct PrefillState {
    float *queries, *outputs, *maxima, *totals, *keys, *values, *scores, *turns;
    int32_t* positions;
    int lanes, panels;
};

// Scores of one panel with `count` keys from position `start`: scaled, capped, and masked where a query may not look.
static void score_panel(const Attention& a, const PrefillState& s, int panel, int start, int count) {
    const int dims = a.cache.dims;
    const float* const queries = s.queries + size_t(panel) * dims * PANEL;
    for (int k = 0; k < count; k += TALL) {
        Floats acc[TALL][WIDE] = {};
        outer_products<TALL, ROW, 1>(acc, s.keys + k * ROW, queries, dims);
        for (int i = 0; i < TALL; ++i)
            for (int j = 0; j < WIDE; ++j) store(s.scores + (k + i) * PANEL + j * LANES, acc[i][j]);
    }
    for (int j = 0; j < WIDE; ++j) {
        const Ints position = load_as<Ints>(s.positions + panel * PANEL + j * LANES);
        const int nearest = s.positions[panel * PANEL], farthest = s.positions[panel * PANEL + PANEL - 1];
        const bool all_seen = start + count - 1 <= nearest && (!a.window || start > farthest - a.window);
        for (int k = 0; k < count; ++k) {
            float* const at = s.scores + k * PANEL + j * LANES;
            Floats score = load(at) * a.scale;
            if (a.softcap) score = hyperbolic_tangent(score * (1 / a.softcap)) * a.softcap;
            if (!all_seen) {
                Ints is_seen = position >= all(start + k);
                if (a.window) is_seen &= all(start + k) > position - a.window;
                score = is_seen ? score : all(UNSEEN);
            }
            store(at, score);
        }
    }
}

// Scores to weights, relative to the largest so far; what was summed before is corrected.
static void soften_panel(const PrefillState& s, int panel, int count, int dims) {
    for (int j = 0; j < WIDE; ++j) {
        const float* const scores = s.scores + j * LANES;
        float* const maximum_at = s.maxima + panel * PANEL + j * LANES;
        float* const total_at = s.totals + panel * PANEL + j * LANES;
        const Floats before = load(maximum_at);
        Floats maximum = before, total = {};
        for (int k = 0; k < count; ++k) maximum = larger(maximum, load(scores + k * PANEL));
        for (int k = 0; k < count; ++k) {
            const Floats weight = exponential(load(scores + k * PANEL) - maximum);
            store((float*)scores + k * PANEL, weight);
            total += weight;
        }
        const Floats correction = exponential(before - maximum);
        store(maximum_at, maximum);
        store(total_at, load(total_at) * correction + total);
        float* output = s.outputs + size_t(panel) * dims * PANEL + j * LANES;
        for (int d = 0; d < dims; ++d, output += PANEL) store(output, load(output) * correction);
    }
}

// Dimensions d .. d + ROWS of the outputs of a panel.
template <int ROWS> INLINE void add_tile_values(const PrefillState& s, float* output, int d, int count) {
    Floats acc[ROWS][WIDE];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < WIDE; ++j) acc[i][j] = load(output + (d + i) * PANEL + j * LANES);
    outer_products<ROWS, 1, ROW>(acc, s.values + d, s.scores, count);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < WIDE; ++j) store(output + (d + i) * PANEL + j * LANES, acc[i][j]);
}

template <int FORMAT> static void prefill_block(const Attention& a, const PrefillBlock& block) {
    const Cache& c = a.cache;
    const int group = a.group(), dims = c.dims, half = a.rope.half;
    const int row = a.step.query_starts[block.b] + block.first_row;
    const int position = a.step.context_lens[block.b] - (a.step.query_starts[block.b + 1] - row);  // The first row is there.

    PrefillState s;
    s.lanes = (block.last_row - block.first_row) * group;
    s.panels = (s.lanes + PANEL - 1) / PANEL;
    const size_t lanes = size_t(s.panels) * PANEL;
    static thread_local Scratch memory;
    s.keys = memory.floats(2 * TILE * ROW + TILE * PANEL + PAGE * 2 * MOST_DIMS + lanes * (2 * dims + 3));
    s.values = s.keys + TILE * ROW;
    s.scores = s.values + TILE * ROW;
    s.turns = s.scores + TILE * PANEL;
    s.queries = s.turns + PAGE * 2 * MOST_DIMS;
    s.outputs = s.queries + lanes * dims;
    s.maxima = s.outputs + lanes * dims;
    s.totals = s.maxima + lanes;
    s.positions = (int32_t*)(s.totals + lanes);
    std::fill(s.outputs, s.outputs + lanes * dims, 0.0f);
    std::fill(s.maxima, s.maxima + lanes, UNSEEN);
    std::fill(s.totals, s.totals + lanes, 0.0f);
    alignas(64) float factor[MOST_DIMS];
    copy_factor(a.cache, block.head, factor);

    const auto head_of = [&](size_t lane) {  // A lane's query is there, its output will be; heads vary fastest.
        return ((row + lane / group) * a.heads + block.head * group + lane % group) * dims;
    };
    for (size_t lane = 0; lane < lanes; ++lane) {
        const size_t real = std::min<size_t>(lane, s.lanes - 1);  // Idle lanes repeat the last.
        s.positions[lane] = position + int(real / group);
        const float* from = a.queries + head_of(real);
        float* const to = s.queries + lane / PANEL * dims * PANEL + lane % PANEL;
        for (int d = 0; d < dims; ++d) to[d * PANEL] = from[d];
    }

    const int end = position + block.last_row - block.first_row;
    for (int start = a.first_seen(position) / PAGE * PAGE; start < end; start += TILE) {
        const int count = std::min(TILE, end - start);
        for (int k = 0; k < count; k += PAGE) {
            const int index = (start + k) / PAGE, last = std::min(PAGE, count - k);
            const int page = a.pages(block.b)[index], next = a.pages(block.b)[std::min(index + 1, (end - 1) / PAGE)];
            if (half) turns_of_page(a.page_angles(block.b, index), a.place_angles(block.b), factor, half, s.turns);
            read_keys<FORMAT>(c, page, next, block.head, 0, last, factor, s.turns, half, s.keys + k * ROW);
            read_values<FORMAT>(c, page, next, block.head, 0, last, s.values + k * ROW);
        }
        for (int panel = 0; panel < s.panels; ++panel) {
            score_panel(a, s, panel, start, count);
            soften_panel(s, panel, count, dims);
            float* const output = s.outputs + size_t(panel) * dims * PANEL;
            int d = 0;
            for (; d + SHORT <= dims; d += SHORT) add_tile_values<SHORT>(s, output, d, count);
            for (; d < dims; ++d) add_tile_values<1>(s, output, d, count);
        }
    }
    for (int lane = 0; lane < s.lanes; ++lane) {
        const float* from = s.outputs + size_t(lane / PANEL) * dims * PANEL + lane % PANEL;
        float* const to = a.out + head_of(lane);
        for (int d = 0; d < dims; ++d) to[d] = from[d * PANEL] / s.totals[lane];
    }
}
