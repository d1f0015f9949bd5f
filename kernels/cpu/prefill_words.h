// Attention of many queries over a cache of codes, in words of 16 bits: prefill.h's way at twice the rate of floats.
//
// A query and a key have a unit each, and their product loses some 1e-5 of both lengths. Weights count 8192 in the
// tile's largest, and values 2700 in what codes can be with the tile's largest scale: so much that a tile's sum can't
// overflow, and some twenty times finer than the 127 steps of the finest codes.
#pragma once

#include "prefill.h"
#include "words.h"

#if defined(__AVX512VNNI__)

constexpr int WORD_QUERIES = 192;              // A block has so many queries.
constexpr int KEY_WORDS = MOST_DIMS + 32;      // Words between keys: no power of two, which would share cache sets
constexpr int VALUE_PAIRS = MOST_DIMS + 16;    // Pairs between values, likewise.
constexpr float WEIGHT_BITS = 13;
constexpr float MOST_VALUE = 0x1p31f / (TILE * 8192) - 1;

struct WordState {
    int32_t *queries, *values, *weights;  // [panels][WIDE][pairs][LANES], [TILE / 2][VALUE_PAIRS], [WIDE][TILE / 2][LANES]
    int16_t* keys;                        // [TILE][KEY_WORDS]
    float *key_units, *exponents, *outputs, *maxima, *totals, *scores, *page, *turns;
    int32_t* positions;
    int dims, lanes, panels;  // The dims reach to the end of the last vector.
    float value_units[MOST_DIMS / GROUP];

    int query_words(int panel) const { return panel * PANEL * dims / 2; }
};

// 2^x with a relative error under 3e-6, for every x up to 127; the polynomial is a minimax fit of 2^f for 0 <= f < 1.
INLINE Floats power_of_two(Floats x) {
    const Floats f = (Floats)_mm512_maskz_reduce_ps(0xffff, (__m512)x, 0x09);  // x less the whole number below it.
    Floats p = f * 0.0135341606f + 0.0520114747f;
    p = p * f + 0.241442749f;
    p = p * f + 0.693003836f;
    p = p * f + 1.00000259f;
    return (Floats)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)x);
}

// Scores of one panel with `count` keys from position `start`, less what a lane's exponent has as its factor; masked
// where a query may not look. Returns their maxima.
struct Maxima { Floats of[WIDE]; };
static Maxima score_words(const Attention& a, const WordState& s, int panel, int start, int count) {
    const int pairs = s.dims / 2;
    const int32_t* const queries = s.queries + s.query_words(panel);
    const int32_t* const positions = s.positions + panel * PANEL;
    Maxima maxima{{all(UNSEEN), all(UNSEEN)}};
    for (int k = 0; k < count; k += TALL) {
        Ints acc[TALL][WIDE] = {};
        word_products<TALL>(acc, (const int32_t*)(s.keys + k * KEY_WORDS), KEY_WORDS / 2, 1, queries,
                            queries + pairs * LANES, pairs);
        const int last = start + k + TALL - 1;
        const bool all_seen = last <= positions[0] && (!a.window || last - TALL + 1 > positions[PANEL - 1] - a.window);
#pragma GCC unroll 2
        for (int j = 0; j < WIDE; ++j) {
            const Ints position = load_as<Ints>(positions + j * LANES);
#pragma GCC unroll 16
            for (int i = 0; i < TALL; ++i) {
                Floats score = __builtin_convertvector(acc[i][j], Floats) * s.key_units[k + i];
                if (a.softcap) {
                    const Floats whole = score * load(s.exponents + panel * PANEL + j * LANES);
                    score = hyperbolic_tangent(whole * (LN2 / a.softcap)) * (a.softcap / LN2);
                }
                if (!all_seen) {
                    Ints is_seen = position >= all(start + k + i);
                    if (a.window) is_seen &= all(start + k + i) > position - a.window;
                    score = is_seen ? score : all(UNSEEN);
                }
                maxima.of[j] = larger(maxima.of[j], score);
                store(s.scores + (k + i) * PANEL + j * LANES, score);
            }
        }
    }
    return maxima;
}

// Scores to weights, in pairs of keys, relative to the tile's largest; a panel's outputs take them and the values.
static void add_words(const WordState& s, int panel, int count, const Maxima& tile, bool is_capped) {
    const int pairs = (count + 1) / 2;
    Floats correction[WIDE], factor[WIDE];
    for (int j = 0; j < WIDE; ++j) {
        const int lane = panel * PANEL + j * LANES;
        const Floats exponent = is_capped ? all(1.0f) : load(s.exponents + lane);
        const Floats before = load(s.maxima + lane), now = larger(before, tile.of[j]);
        const Floats shift = tile.of[j] * exponent - WEIGHT_BITS;
        int32_t* const weights = s.weights + j * TILE / 2 * LANES;
        Ints sum = {};
        for (int k = 0; k < pairs; ++k) {
            const float* const scores = s.scores + 2 * k * PANEL + j * LANES;
            const Ints first = rounded(power_of_two(load(scores) * exponent - shift));
            const Ints second = rounded(power_of_two(load(scores + PANEL) * exponent - shift));
            const Ints both = paired_words(first, second);
            memcpy(weights + k * LANES, &both, sizeof both);
            sum += first + second;
        }
        correction[j] = power_of_two((before - now) * exponent);
        const Floats share = power_of_two((tile.of[j] - now) * exponent - WEIGHT_BITS);
        factor[j] = share;
        store(s.maxima + lane, now);
        store(s.totals + lane, load(s.totals + lane) * correction[j] + __builtin_convertvector(sum, Floats) * share);
    }
    float* output = s.outputs + size_t(panel) * s.dims * PANEL;
    for (int d = 0; d < s.dims; d += SHORT) {
        Ints acc[SHORT][WIDE] = {};
        const float unit = s.value_units[d / GROUP];
        word_products<SHORT>(acc, s.values + d, 1, VALUE_PAIRS, s.weights, s.weights + TILE / 2 * LANES, pairs);
#pragma GCC unroll 16
        for (int i = 0; i < SHORT; ++i, output += PANEL)
#pragma GCC unroll 2
            for (int j = 0; j < WIDE; ++j)
                store(output + j * LANES, load(output + j * LANES) * correction[j] +
                                              __builtin_convertvector(acc[i][j], Floats) * (factor[j] * unit));
    }
}

// The keys and values of a tile from position `start`.
template <int FORMAT>
static void read_words(const Attention& a, const PrefillBlock& block, const float* factor, int start, int count,
                       int end, WordState& s) {
    const Cache& c = a.cache;
    const int half = a.rope.half, groups = c.groups();
    const int32_t* const pages = a.pages(block.b) + start / PAGE;
    float steps[MOST_DIMS / GROUP];  // Each group's values have one.
    for (int g = 0; g < groups; ++g) {
        int most = 0;  // The largest magnitude of a scale, as float16 orders them: what isn't finite is larger than all numbers
        for (int k = 0; k < count; ++k) {
            const size_t token = c.token(pages[k / PAGE], block.head) + k % PAGE;
            most = std::max(most, c.value_scales[token * groups + g].bits & 0x7fff);
        }
        const float largest = to_float(f16{uint16_t(most)}) * (FORMAT == Q8 ? 127 : 8);
        steps[g] = largest == 0 ? 0.0f : MOST_VALUE / largest;
        s.value_units[g] = largest / MOST_VALUE;
    }
    for (int k = 0; k < count; k += PAGE) {
        const int index = (start + k) / PAGE, last = std::min(PAGE, count - k);
        const int page = pages[k / PAGE], next = a.pages(block.b)[std::min(index + 1, (end - 1) / PAGE)];
        if (half) turns_of_page(a.page_angles(block.b, index), a.place_angles(block.b), factor, half, s.turns);
        read_keys<FORMAT>(c, page, next, block.head, 0, last, factor, s.turns, half, s.page);
        for (int place = 0; place < last; ++place) {
            float* const key = s.page + place * ROW;
            std::fill(key + c.dims, key + s.dims, 0.0f);
            const float unit = to_words<ANY>(key, s.dims, SHORTER, s.keys + (k + place) * KEY_WORDS);
            s.key_units[k + place] = unit;
            for (int g = 0; g < groups; ++g) s.value_units[g] += 0 * unit;  // This is NaN where the unit isn't finite.
        }
        PageReader<FORMAT> values(c, c.value_codes, c.value_scales, page, next, block.head);
        for (int place = 0; place < last; place += 2)
            for (int d = 0; d < c.dims; d += LANES) {
                const Ints first = rounded(values.values(place, d) * steps[d / GROUP]);
                const Ints second = rounded(values.values(place + 1, d) * steps[d / GROUP]);  // The page has it, if not the tile.
                const Ints both = paired_words(first, second);
                memcpy(s.values + (k + place) / 2 * VALUE_PAIRS + d, &both, sizeof both);
            }
    }
}

template <int FORMAT> static void prefill_words(const Attention& a, const PrefillBlock& block) {
    const int group = a.group(), dims = a.cache.dims;
    const int row = a.step.query_starts[block.b] + block.first_row;
    const int position = a.step.context_lens[block.b] - (a.step.query_starts[block.b + 1] - row);  // The first row is there.

    WordState s;
    s.dims = (dims + LANES - 1) / LANES * LANES;
    s.lanes = (block.last_row - block.first_row) * group;
    s.panels = (s.lanes + PANEL - 1) / PANEL;
    const size_t lanes = size_t(s.panels) * PANEL;
    static thread_local Scratch memory;
    float* at = memory.floats(TILE * (KEY_WORDS / 2 + VALUE_PAIRS / 2 + PANEL / 2 + PANEL + 1) +
                              PAGE * (ROW + 2 * MOST_DIMS) + lanes * (s.dims / 2 + s.dims + 4));
    const auto take = [&](size_t count) { return at += count, at - count; };
    s.keys = (int16_t*)take(TILE * KEY_WORDS / 2);
    s.values = (int32_t*)take(TILE / 2 * VALUE_PAIRS);
    s.weights = (int32_t*)take(TILE / 2 * PANEL);
    s.scores = take(TILE * PANEL);
    s.page = take(PAGE * ROW);
    s.turns = take(PAGE * 2 * MOST_DIMS);
    s.queries = (int32_t*)take(lanes * s.dims / 2);
    s.outputs = take(lanes * s.dims);
    s.maxima = take(lanes);
    s.totals = take(lanes);
    s.exponents = take(lanes);
    s.positions = (int32_t*)take(lanes);
    s.key_units = take(TILE);
    std::fill(s.outputs, s.outputs + lanes * s.dims, 0.0f);
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
        alignas(64) float query[MOST_DIMS] = {};
        alignas(64) int32_t pairs[MOST_DIMS / 2];
        std::copy_n(a.queries + head_of(real), dims, query);
        const float unit = to_words<ANY>(query, s.dims, LONG, (int16_t*)pairs) * (a.scale / LN2);
        s.exponents[lane] = unit < LEAST_LENGTH ? LEAST_LENGTH : unit;  // Less would let the unseen count as much as others.
        int32_t* to = s.queries + s.query_words(int(lane / PANEL)) + lane % PANEL / LANES * LANES * s.dims / 2;
        for (int i = 0; i < s.dims / 2; ++i) to[i * LANES + lane % LANES] = pairs[i];
    }

    const int end = position + block.last_row - block.first_row;
    for (int start = a.first_seen(position) / PAGE * PAGE; start < end; start += TILE) {
        const int count = std::min(TILE, end - start);
        read_words<FORMAT>(a, block, factor, start, count, end, s);
        for (int panel = 0; panel < s.panels; ++panel) {
            const int32_t* const positions = s.positions + panel * PANEL;
            if (start > positions[PANEL - 1]) continue;  // Later rows alone see it, or earlier ones.
            if (a.window && start + count <= positions[0] - a.window + 1) continue;
            const Maxima tile = score_words(a, s, panel, start, count);
            add_words(s, panel, count, tile, a.softcap != 0);
        }
    }
    for (int lane = 0; lane < s.lanes; ++lane) {
        const float* from = s.outputs + size_t(lane / PANEL) * s.dims * PANEL + lane % PANEL;
        float* const to = a.out + head_of(lane);
        for (int d = 0; d < dims; ++d) to[d] = from[d * PANEL] / s.totals[lane];
    }
}

#endif
