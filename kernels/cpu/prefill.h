// Attention of many queries of a sequence: tiles of keys, turned once for a block of queries.
//
// The queries of a block (rows times the heads of a group) are the lanes of vectors, so that maxima, sums and
// corrections of the softmax need no step across lanes. A lane's numbers are those of decode.h, bit for bit.
#pragma once

#include "tile.h"
#include "values.h"

struct PrefillBlock {
    int b, head, first_row, last_row;  // Rows count from the sequence's first in the step.
};

constexpr int BLOCK_QUERIES = LANES == 16 ? 256 : 128;
// Numbers between pairs of values, and between steps of keys: no powers of two, which would share cache sets
constexpr int VALUE_PAIRS = MOST_DIMS + 16, KEY_STEP = TILE + 16;

// Sums of a softmax, kept transposed: outputs in panels [panels][dims][PANEL], the others [lanes].
struct LaneSums {
    float *outputs, *maxima, *totals;

    void clear(size_t lanes, int dims, float maximum) {
        std::fill_n(outputs, lanes * dims, 0.0f);
        std::fill_n(maxima, lanes, maximum);
        std::fill_n(totals, lanes, 0.0f);
    }
};

template <int FORMAT> struct PrefillState {
    const Attention& a;
    const Order<FORMAT> order;
    Turns<FORMAT>& turns;
    int group, dims, lanes, panels, position;  // The dims of outputs, in whole groups; that of the first row.
    int32_t *queries, *keys, *values, *weights;  // [panels][WIDE][steps][LANES], [steps][KEY_STEP], [TILE / 2][VALUE_PAIRS], ...
    float *halves, *key_units, *exponents, *scores, *coefficients, *steps, *units;
    int32_t* positions;
    LaneSums part, whole;
    ValueScales scales;

    int query_words(int panel) const { return panel * PANEL * order.steps(); }
    // Of floats a panel's queries are side by side, as outer_products takes them.
    int32_t* query(size_t lane) const {
        int32_t* const panel = queries + query_words(int(lane / PANEL));
        if (FORMAT == F16) return panel + lane % PANEL;
        return panel + lane % PANEL / LANES * LANES * order.steps() + lane % LANES;
    }
};

struct Maxima { Floats of[WIDE]; };

// Scores of one panel with the first `count` keys of a tile, masked where a query may not look. Returns their maxima.
template <int FORMAT>
static Maxima score_panel(const PrefillState<FORMAT>& s, int panel, int tile, int count) {
    const Attention& a = s.a;
    const int steps = s.order.steps(), split = s.order.second_sum();
    const int32_t* const queries = s.queries + s.query_words(panel);
    const int32_t* const positions = s.positions + panel * PANEL;
    Maxima maxima{{all(UNSEEN), all(UNSEEN)}};
    for (int k = 0; k < count; k += SHORT) {
        Floats score[SHORT][WIDE];
        if constexpr (FORMAT == F16) {
            Floats first[SHORT][WIDE] = {}, second[SHORT][WIDE] = {};
            const float *const keys = (const float*)s.keys + k, *const panel_queries = (const float*)queries;
            outer_products<SHORT, 1, KEY_STEP>(first, keys, panel_queries, split);
            outer_products<SHORT, 1, KEY_STEP>(second, keys + split * KEY_STEP, panel_queries + split * PANEL, steps - split);
            for (int i = 0; i < SHORT; ++i)
                for (int j = 0; j < WIDE; ++j) score[i][j] = first[i][j] + second[i][j];
        } else {
            Ints acc[SHORT][WIDE] = {};
            word_products<SHORT>(acc, s.keys + k, 1, KEY_STEP, queries, queries + steps * LANES, steps);
#pragma GCC unroll 16
            for (int i = 0; i < SHORT; ++i)
#pragma GCC unroll 2
                for (int j = 0; j < WIDE; ++j)
                    score[i][j] = __builtin_convertvector(acc[i][j], Floats) * s.key_units[k + i];
        }
        const int first = tile * TILE + k, last = first + SHORT - 1;
        const bool all_seen = last <= positions[0] && (!a.window || first > positions[PANEL - 1] - a.window);
#pragma GCC unroll 2
        for (int j = 0; j < WIDE; ++j) {
            const Ints position = load_as<Ints>(positions + j * LANES);
#pragma GCC unroll 16
            for (int i = 0; i < SHORT; ++i) {
                if (a.softcap) score[i][j] = capped(a, score[i][j], load(s.exponents + panel * PANEL + j * LANES));
                if (!all_seen) {
                    Ints is_seen = position >= all(first + i);
                    if (a.window) is_seen &= all(first + i) > position - a.window;
                    score[i][j] = is_seen ? score[i][j] : all(UNSEEN);
                }
                maxima.of[j] = larger(maxima.of[j], score[i][j]);
                store(s.scores + (k + i) * PANEL + j * LANES, score[i][j]);
            }
        }
    }
    return maxima;
}

// Weights [count][PANEL] times a group's coefficients [TILE], or scales [TILE] times each lane's steps, to words
// [WIDE][TILE / 2][LANES].
template <int FORMAT> INLINE void weigh_group(const PrefillState<FORMAT>& s, int g, int count, bool are_alike) {
    const float *const scales = s.scales.rows[g], *const coefficients = s.coefficients + g * TILE;
    for (int j = 0; j < WIDE; ++j) {
        const Floats steps = load(s.steps + g * PANEL + j * LANES);
        const auto weigh = [&](auto coefficient) __attribute__((always_inline)) {
            int32_t* to = s.weights + j * TILE / 2 * LANES;
            for (int k = 0; k < count; k += 2, to += LANES) {
                const float* const weights = s.scores + k * PANEL + j * LANES;
                const Ints both = paired_words(rounded(load(weights) * coefficient(k)),
                                               rounded(load(weights + PANEL) * coefficient(k + 1)));
                memcpy(to, &both, sizeof both);
            }
        };
        if (are_alike) weigh([&](int k) { return all(coefficients[k]); });
        else weigh([&](int k) { return scales[k] * steps; });
    }
}

// A panel's scores to weights, and the outputs that take them and the values. are_alike: whether all lanes see all keys.
template <int FORMAT>
static void add_tile(const PrefillState<FORMAT>& s, int panel, int count, const Maxima& tile, bool are_alike) {
    Floats before[WIDE], now[WIDE];
    for (int j = 0; j < WIDE; ++j) {
        const int lane = panel * PANEL + j * LANES;
        const Floats exponent = final_exponent(s.a, load(s.exponents + lane));
        Ints total = {};
        for (int k = 0; k < count; ++k) {
            float* const score = s.scores + k * PANEL + j * LANES;
            const Floats weight = power_of_two((load(score) - tile.of[j]) * exponent);
            store(score, weight);
            total += rounded(weight * COUNTS);
        }
        const Joint joint(load(s.part.maxima + lane), tile.of[j], exponent);
        before[j] = joint.before, now[j] = joint.now;
        store(s.part.maxima + lane, joint.largest);
        const Floats counted = __builtin_convertvector(total, Floats) * (1 / COUNTS);
        store(s.part.totals + lane, joint.of(load(s.part.totals + lane), counted));
    }
    float* output = s.part.outputs + size_t(panel) * s.dims * PANEL;
    for (int d = 0; d < s.dims; d += SHORT) {
        Floats sums[SHORT][WIDE] = {}, factor[WIDE] = {now[0], now[1]};
        if constexpr (FORMAT == F16) {
            outer_products<SHORT, 1, ROW>(sums, s.halves + d, s.scores, count);
        } else {
            const int g = d / GROUP;
            if (d % GROUP == 0) weigh_group(s, g, count, are_alike);
            Ints acc[SHORT][WIDE] = {};
            word_products<SHORT>(acc, s.values + d, 1, VALUE_PAIRS, s.weights, s.weights + TILE / 2 * LANES, count / 2);
#pragma GCC unroll 16
            for (int i = 0; i < SHORT; ++i)
#pragma GCC unroll 2
                for (int j = 0; j < WIDE; ++j) sums[i][j] = __builtin_convertvector(acc[i][j], Floats);
#pragma GCC unroll 2
            for (int j = 0; j < WIDE; ++j) factor[j] = now[j] * load(s.units + g * PANEL + j * LANES);
        }
#pragma GCC unroll 16
        for (int i = 0; i < SHORT; ++i, output += PANEL)
#pragma GCC unroll 2
            for (int j = 0; j < WIDE; ++j) {
                float* const to = output + j * LANES;
                store(to, plus_product(sums[i][j] * factor[j], load(to), before[j]));
            }
    }
}

// Keys and values of a tile: of the pages from `first` that are seen by some row, up to place `end`.
template <int FORMAT> static void read_tile(PrefillState<FORMAT>& s, const PrefillBlock& block, const KeyHead& of_head,
                                            int tile, int first, int end) {
    const Attention& a = s.a;
    const Cache& c = a.cache;
    const int32_t* const pages = a.pages(block.b) + tile * TILE_PAGES;
    const int last_page = (s.position + block.last_row - block.first_row - 1) / PAGE - tile * TILE_PAGES;
    if constexpr (FORMAT == F16) std::fill_n(s.halves, TILE * ROW, 0.0f);
    else s.scales.clear(c.groups());
    for (int i = first / PAGE; i * PAGE < end; ++i) {
        if (i < last_page) fetch(c, c.key_codes, c.key_scales, pages[i + 1], block.head);
        fetch(c, c.value_codes, c.value_scales, pages[i], block.head);
        if (s.order.half)
            s.turns.turn(a.page_angles(block.b, tile * TILE_PAGES + i));
        KeyPage<FORMAT>(c, pages[i], block.head)
            .prepare(s.order, of_head, s.turns, s.keys + i * PAGE, KEY_STEP, s.key_units + i * PAGE);
        const size_t code_bytes = c.code_bytes();
        const uint8_t* token = c.value_codes + c.token(pages[i], block.head) * code_bytes;
        const int places = std::min(PAGE, end - i * PAGE);
        if constexpr (FORMAT == F16) {
            for (int k = 0; k < places; ++k, token += code_bytes)
                for (int d = 0; d < c.dims; d += LANES)
                    store(s.halves + (i * PAGE + k) * ROW + d, halves_at(token, d, c.dims));
        } else {
            s.scales.read(c, pages[i], block.head, i * PAGE, 0, places, s.key_units + i * PAGE);
            for (int k = 0; k < PAGE; k += 2, token += 2 * code_bytes)
                for (int d = 0; d < s.dims; d += LANES) {
                    const Ints both = paired_words(codes_at<FORMAT>(token, d), codes_at<FORMAT>(token + code_bytes, d));
                    memcpy(s.values + (i * PAGE + k) / 2 * VALUE_PAIRS + d, &both, sizeof both);
                }
        }
    }
}

// What a panel's lanes count scales in: each by what it sees of the tile.
template <int FORMAT> static void count_scales(const PrefillState<FORMAT>& s, int panel, int tile) {
    for (int lane = 0; lane < PANEL; ++lane) {
        const int32_t* const position = s.positions + panel * PANEL + lane;
        for (int g = 0; g < s.a.cache.groups(); ++g) {
            float *const steps = s.steps + g * PANEL + lane, *const units = s.units + g * PANEL + lane;
            if (lane && position[0] == position[-1]) {
                *steps = steps[-1], *units = units[-1];
            } else {
                const ScaleUnit unit = s.scales.unit(g, Seen(s.a, *position, tile));
                *steps = unit.steps, *units = unit.unit;
            }
        }
    }
}

// The same where all lanes of the block's panels to come see the whole tile, with coefficients of each key.
template <int FORMAT> static void count_scales(const PrefillState<FORMAT>& s) {
    Seen all_seen(s.a, 0, 0);
    all_seen.first = 0, all_seen.end = TILE;
    for (int g = 0; g < s.a.cache.groups(); ++g) {
        const ScaleUnit unit = s.scales.unit(g, all_seen);
        std::fill_n(s.units + g * PANEL, PANEL, unit.unit);
        for (int k = 0; k < TILE; k += LANES)
            store(s.coefficients + g * TILE + k, load(s.scales.rows[g] + k) * unit.steps);
    }
}

// What a part has summed joins the parts before.
template <int FORMAT> static void end_part(const PrefillState<FORMAT>& s) {
    for (int lane = 0; lane < s.panels * PANEL; lane += LANES) {
        const Floats exponent = final_exponent(s.a, load(s.exponents + lane));
        const Joint joint(load(s.whole.maxima + lane), load(s.part.maxima + lane) * exponent, all(1.0f));
        store(s.whole.maxima + lane, joint.largest);
        store(s.whole.totals + lane, joint.of(load(s.whole.totals + lane), load(s.part.totals + lane)));
        const size_t first = size_t(lane / PANEL) * s.dims * PANEL + lane % PANEL;
        for (int d = 0; d < s.dims; ++d) {
            float* const to = s.whole.outputs + first + d * PANEL;
            store(to, joint.of(load(to), load(s.part.outputs + first + d * PANEL)));
        }
    }
}

// Where a block's sums and what it reads are kept, of so many lanes.
template <int FORMAT> static void take_memory(PrefillState<FORMAT>& s, size_t lanes) {
    static thread_local Scratch memory;
    const size_t groups = MOST_DIMS / GROUP, steps = s.order.steps();
    float* at = memory.floats(KEY_STEP * steps + TILE * (groups + VALUE_PAIRS / 2 + ROW + PANEL / 2 + PANEL + 1) +
                              2 * groups * PANEL + lanes * (steps + 2 * s.dims + 6) + 64);
    const auto take = [&](size_t count) { return at += count, at - count; };
    s.keys = (int32_t*)take(KEY_STEP * steps);
    s.values = (int32_t*)take(TILE / 2 * VALUE_PAIRS);
    s.halves = take(TILE * ROW);
    s.weights = (int32_t*)take(TILE / 2 * PANEL);
    s.scores = take(TILE * PANEL);
    s.key_units = take(TILE);
    s.coefficients = take(groups * TILE);
    s.steps = take(groups * PANEL);
    s.units = take(groups * PANEL);
    s.queries = (int32_t*)take(lanes * steps);
    for (LaneSums* sums : {&s.part, &s.whole}) *sums = {take(lanes * s.dims), take(lanes), take(lanes)};
    s.exponents = take(lanes);
    s.positions = (int32_t*)take(lanes);
}

template <int FORMAT> static void prefill_block(const Attention& a, const PrefillBlock& block) {
    const int group = a.group(), dims = a.cache.dims;
    const int row = a.step.query_starts[block.b] + block.first_row;
    const int position = a.step.context_lens[block.b] - (a.step.query_starts[block.b + 1] - row);  // The first row is there.
    const int count_lanes = (block.last_row - block.first_row) * group, panels = (count_lanes + PANEL - 1) / PANEL;
    const size_t lanes = size_t(panels) * PANEL;
    Turns<FORMAT>& turns = kept_turns<FORMAT>();
    turns.order = {dims, a.rope.half};
    PrefillState<FORMAT> s{a, turns.order, turns, group, a.cache.padded(), count_lanes, panels, position};
    take_memory(s, lanes);
    s.part.clear(lanes, s.dims, UNSEEN);
    s.whole.clear(lanes, s.dims, NOTHING);
    const KeyHead of_head(a.cache, block.head, a.rope.half);
    const int half = a.rope.half;
    if (half) s.turns.start(a.place_angles(block.b));

    const auto head_of = [&](size_t lane) {  // A lane's query is there, its output will be; heads vary fastest.
        return ((row + lane / group) * a.heads + block.head * group + lane % group) * dims;
    };
    for (size_t lane = 0; lane < lanes; ++lane) {
        const size_t real = std::min<size_t>(lane, s.lanes - 1);  // Idle lanes repeat the last.
        s.positions[lane] = position + int(real / group);
        s.exponents[lane] = s.order.arrange(a.queries + head_of(real), of_head.of_query, a.scale, s.query(lane),
                                           FORMAT == F16 ? PANEL : LANES);
    }

    const int end = position + block.last_row - block.first_row;
    for (int tile = a.first_seen(position) / TILE; tile * TILE < end; ++tile) {
        const int first = std::max(0, a.first_seen(position) - tile * TILE), last = std::min(TILE, end - tile * TILE);
        const int count = (last + SHORT - 1) / SHORT * SHORT;
        read_tile(s, block, of_head, tile, first, last);
        bool are_counted = false;  // For lanes that see the whole tile.
        for (int panel = 0; panel < s.panels; ++panel) {
            const int32_t* const positions = s.positions + panel * PANEL;
            const Seen nearest(a, positions[0], tile), farthest(a, positions[PANEL - 1], tile);
            if (farthest.end <= 0 || nearest.first >= TILE) continue;  // Later rows alone see it, or earlier ones.
            const bool are_alike = nearest.is_all() && farthest.is_all();
            if (FORMAT != F16 && !are_alike) count_scales(s, panel, tile);
            if (FORMAT != F16 && are_alike && !are_counted) count_scales(s);
            are_counted = are_alike;
            const Maxima maxima = score_panel(s, panel, tile, count);
            add_tile(s, panel, count, maxima, are_alike);
        }
        if ((tile + 1) % PART_TILES == 0 || (tile + 1) * TILE >= end) {
            end_part(s);
            s.part.clear(lanes, s.dims, UNSEEN);
        }
    }
    for (int lane = 0; lane < s.lanes; ++lane) {
        const size_t first = size_t(lane / PANEL) * s.dims * PANEL + lane % PANEL;
        float* const to = a.out + head_of(lane);
        for (int d = 0; d < dims; ++d) to[d] = s.whole.outputs[first + d * PANEL] / s.whole.totals[lane];
    }
}
