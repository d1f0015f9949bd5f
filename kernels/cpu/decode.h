// Attention of one query a sequence. Reading the cache is the limit: every page is read once for all heads of a group.
//
// Source: Dao et al. 2023, "Flash-Decoding for long-context inference": the context is cut into parts, each with its own
// softmax, which are merged in the end.
#pragma once

#include "attention.h"

struct DecodePart {
    int b, head, first_page, last_page;
    size_t partial;  // where in the scratch: [G] maxima, [G] sums, [G][ROW] outputs
};

constexpr int SPAN_PAGES = 16;  // between two corrections of the softmax
constexpr int SPAN = SPAN_PAGES * PAGE;
constexpr int TOGETHER = LANES == 16 ? 8 : 4;  // heads whose outputs are held in registers

INLINE size_t partial_floats(int group) { return size_t(group) * (2 + ROW); }

// Scores of queries [G][ROW] with keys [PAGE][ROW], each head's SPAN floats after the one's before.
INLINE void scores_of_page(const float* queries, const float* keys, int group, int dims, float* scores) {
    for (int g = 0; g < group; ++g)
        for (int part = 0; part < PAGE; part += LANES) {
            Floats acc[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; ++i) acc[i] = Floats{};
            for (int d = 0; d < dims; d += LANES) {
                const Floats q = load(queries + g * ROW + d);
#pragma GCC unroll 16
                for (int i = 0; i < LANES; ++i) acc[i] += load(keys + (part + i) * ROW + d) * q;
            }
            store(scores + g * SPAN + part, sums(acc));
        }
}

// out[g] = out[g] * corrections[g] + sum over places of weights[g][place] * values, for HEADS heads, of VECTORS vectors
// from dimension d: enough sums at a time that none waits for its own last step.
template <int FORMAT, int HEADS, int VECTORS>
INLINE void add_values_at(PageReader<FORMAT>& reader, const float* all_weights, const float* corrections, int first,
                          int last, int d, float* out) {
    constexpr int GROUPS = VECTORS * LANES > GROUP ? VECTORS * LANES / GROUP : 1;
    alignas(64) float weights[GROUPS][HEADS][PAGE];  // with the values' scales
    for (int i = 0; i < GROUPS; ++i)
        for (int part = 0; part < PAGE; part += LANES) {
            const Floats scale = FORMAT == F16 ? all(1.0f) : reader.scales_of_places(part, d + i * GROUP);
#pragma GCC unroll 8
            for (int g = 0; g < HEADS; ++g) store(weights[i][g] + part, load(all_weights + g * SPAN + part) * scale);
        }
    Floats acc[HEADS][VECTORS];
#pragma GCC unroll 8
    for (int g = 0; g < HEADS; ++g)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) acc[g][j] = load(out + g * ROW + d + j * LANES) * corrections[g];
    for (int place = first; place < last; ++place) {
        Floats v[VECTORS];
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) v[j] = reader.raw(place, d + j * LANES);
#pragma GCC unroll 8
        for (int g = 0; g < HEADS; ++g)
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; ++j) acc[g][j] += v[j] * weights[j * LANES / GROUP][g][place];
    }
#pragma GCC unroll 8
    for (int g = 0; g < HEADS; ++g)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) store(out + g * ROW + d + j * LANES, acc[g][j]);
}

template <int FORMAT, int HEADS>
INLINE void add_values(PageReader<FORMAT>& reader, const float* weights, const float* corrections, int first, int last,
                       float* out) {
    constexpr int VECTORS = LANES == 16 && HEADS <= 4 ? 4 : 2;
    int d = 0;
    for (; d + VECTORS * LANES <= reader.dims; d += VECTORS * LANES)
        add_values_at<FORMAT, HEADS, VECTORS>(reader, weights, corrections, first, last, d, out);
    for (; d < reader.dims; d += LANES)
        add_values_at<FORMAT, HEADS, 1>(reader, weights, corrections, first, last, d, out);
}

template <int FORMAT>
static void add_values_of_heads(PageReader<FORMAT>& reader, const float* weights, const float* corrections, int group,
                                int first, int last, float* out) {
    for (int g = 0; g < group;) {
        const auto step = [&](auto heads) {
            add_values<FORMAT, heads.value>(reader, weights + g * SPAN, corrections + g, first, last, out + g * ROW);
            g += heads.value;
        };
        const int left = group - g;
        if (TOGETHER == 8 && left >= 8) step(std::integral_constant<int, TOGETHER>());
        else if (left >= 4) step(std::integral_constant<int, 4>());
        else if (left == 3) step(std::integral_constant<int, 3>());
        else if (left == 2) step(std::integral_constant<int, 2>());
        else step(std::integral_constant<int, 1>());
    }
}

// x [dims] times `scale` and rotated against the angles [2][half].
INLINE void turn_back(const float* __restrict x, const float* __restrict angles, int half, int dims, float scale,
                      float* __restrict out) {
    int i = 0;
    for (; i + LANES <= half; i += LANES) {
        const Floats cosine = load(angles + i) * scale, sine = load(angles + half + i) * scale;
        store(out + i, load(x + i) * cosine + load(x + i + half) * sine);
        store(out + i + half, load(x + i + half) * cosine - load(x + i) * sine);
    }
    for (; i < half; ++i) {
        const float cosine = angles[i] * scale, sine = angles[half + i] * scale;
        out[i] = x[i] * cosine + x[i + half] * sine;
        out[i + half] = x[i + half] * cosine - x[i] * sine;
    }
    for (i = 2 * half; i < dims; ++i) out[i] = x[i] * scale;
}

// Scores [SPAN], `count` of them, to weights relative to the largest so far. Returns by what earlier sums are corrected.
INLINE float soften(const Attention& a, float* scores, int count, float& maximum, float& total) {
    for (int i = count; i % LANES; ++i) scores[i] = UNSEEN;
    Floats most = all(maximum), sums = {};
    for (int i = 0; i < count; i += LANES) {
        Floats score = load(scores + i);
        if (a.softcap) {
            const Floats capped = hyperbolic_tangent(score * (1 / a.softcap)) * a.softcap;
            score = score == UNSEEN ? score : capped;
            store(scores + i, score);
        }
        most = larger(most, score);
    }
    const float before = maximum;
    maximum = largest(most);
    for (int i = 0; i < count; i += LANES) {
        const Floats weight = exponential(load(scores + i) - maximum);
        store(scores + i, weight);
        sums += weight;
    }
    const float correction = maximum == before ? 1.0f : exponential(all(before - maximum))[0];
    total = total * correction + sum(sums);
    return correction;
}

template <int FORMAT> static void decode_part(const Attention& a, const DecodePart& part, float* partial) {
    const Cache& c = a.cache;
    const int group = a.group(), half = a.rope.half, length = a.context_lens[part.b];
    const int row = a.query_starts[part.b], seen = a.first_seen(length - 1);
    const int padded = (c.dims + LANES - 1) / LANES * LANES;
    float* const maxima = partial;
    float* const totals = partial + group;
    float* const outputs = partial + 2 * group;
    std::fill(maxima, maxima + group, UNSEEN);
    std::fill(totals, totals + group, 0.0f);

    static thread_local Scratch memory;
    float* const queries = memory.floats(size_t(group) * (ROW + SPAN + 2) + PAGE * ROW + PAGE * 2 * MOST_DIMS);
    float* const keys = queries + group * ROW;
    float* const scores = keys + PAGE * ROW;
    float* const turns = scores + group * SPAN;
    float* const corrections = turns + PAGE * 2 * MOST_DIMS;
    float* const ones = corrections + group;
    std::fill(ones, ones + group, 1.0f);
    for (int g = 0; g < group; ++g) {
        std::fill_n(queries + g * ROW, padded, 0.0f);
        std::fill_n(outputs + g * ROW, padded, 0.0f);
    }
    alignas(64) float factor[MOST_DIMS];
    a.copy_factor(part.head, factor);
    if (half) turns_of_page(nullptr, a.place_angles(part.b), factor, half, turns);
    const float* const from = a.queries + (size_t(row) * a.heads + part.head * group) * c.dims;
    const auto first_of = [&](int index) { return std::max(0, seen - index * PAGE); };
    const auto last_of = [&](int index) { return std::min(PAGE, length - index * PAGE); };
    const auto next_of = [&](int index) { return a.page(part.b, std::min(index + 1, part.last_page - 1)); };

    for (int start = part.first_page; start < part.last_page; start += SPAN_PAGES) {
        const int end = std::min(start + SPAN_PAGES, part.last_page);
        for (int index = start; index < end; ++index) {
            float* const at = scores + (index - start) * PAGE;
            // instead of every key the query is turned by the page's angle, the other way; it takes the scale along
            for (int g = 0; g < group; ++g)
                turn_back(from + g * c.dims, half ? a.page_angles(part.b, index) : nullptr, half, c.dims, a.scale,
                          queries + g * ROW);
            read_keys<FORMAT>(c, a.page(part.b, index), next_of(index), part.head, first_of(index), last_of(index),
                              factor, turns, half, keys);
            scores_of_page(queries, keys, group, padded, at);
            for (int g = 0; g < group; ++g) std::fill_n(at + g * SPAN, first_of(index), UNSEEN);
        }
        const int count = (end - 1 - start) * PAGE + last_of(end - 1);
        for (int g = 0; g < group; ++g) corrections[g] = soften(a, scores + g * SPAN, count, maxima[g], totals[g]);
        for (int index = start; index < end; ++index) {
            PageReader<FORMAT> values(c, c.value_codes, c.value_scales, a.page(part.b, index), next_of(index), part.head);
            add_values_of_heads(values, scores + (index - start) * PAGE, index == start ? corrections : ones, group,
                                first_of(index), last_of(index), outputs);
        }
    }
}

// Parts [first, last) are those of one sequence and head.
static void merge_parts(const Attention& a, const DecodePart* first, const DecodePart* last, const float* scratch) {
    const int group = a.group();
    for (int g = 0; g < group; ++g) {
        float maximum = UNSEEN, total = 0, weighted[MOST_DIMS] = {};
        for (const DecodePart* part = first; part < last; ++part)
            maximum = std::max(maximum, scratch[part->partial + g]);
        for (const DecodePart* part = first; part < last; ++part) {
            const float* const partial = scratch + part->partial;
            const float weight = expf(partial[g] - maximum);
            const float* const output = partial + 2 * group + g * ROW;
            total += weight * partial[group + g];
            for (int d = 0; d < a.cache.dims; ++d) weighted[d] += weight * output[d];
        }
        const size_t row = size_t(a.query_starts[first->b]) * a.heads + first->head * group + g;
        for (int d = 0; d < a.cache.dims; ++d) a.out[row * a.cache.dims + d] = weighted[d] / total;
    }
}
