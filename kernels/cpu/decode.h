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

constexpr int TOGETHER = LANES == 16 ? 8 : 4;  // heads whose outputs are held in registers

INLINE size_t partial_floats(int group) { return size_t(group) * (2 + ROW); }

// Scores [G][PAGE] of queries [G][ROW] with keys [PAGE][ROW].
INLINE void scores_of_page(const float* queries, const float* keys, int group, int dims, float* scores) {
    for (int g = 0; g < group; ++g)
        for (int part = 0; part < PAGE; part += LANES) {
            Floats acc[LANES] = {};
            for (int d = 0; d < dims; d += LANES) {
                const Floats q = load(queries + g * ROW + d);
#pragma GCC unroll 16
                for (int i = 0; i < LANES; ++i) acc[i] += load(keys + (part + i) * ROW + d) * q;
            }
            store(scores + g * PAGE + part, sums(acc));
        }
}

// out[g] = out[g] * correction[g] + sum over places of weights[g][place] * values, for HEADS heads.
template <int FORMAT, int HEADS>
INLINE void add_values(PageReader<FORMAT>& reader, const float* weights, const float* corrections, int first, int last,
                       float* out) {
    for (int d = 0; d < reader.dims; d += LANES) {
        Floats acc[HEADS];
#pragma GCC unroll 8
        for (int g = 0; g < HEADS; ++g) acc[g] = load(out + g * ROW + d) * corrections[g];
        for (int place = first; place < last; ++place) {
            const Floats v = reader.values(reader.token(place), place, d);
#pragma GCC unroll 8
            for (int g = 0; g < HEADS; ++g) acc[g] += v * weights[g * PAGE + place];
        }
#pragma GCC unroll 8
        for (int g = 0; g < HEADS; ++g) store(out + g * ROW + d, acc[g]);
    }
}

template <int FORMAT>
static void add_values_of_heads(PageReader<FORMAT>& reader, const float* weights, const float* corrections, int group,
                                int first, int last, float* out) {
    for (int g = 0; g < group;) {
        const auto step = [&](auto heads) {
            add_values<FORMAT, heads.value>(reader, weights + g * PAGE, corrections + g, first, last, out + g * ROW);
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
    for (int i = 0; i < half; ++i) {
        const float cosine = angles[i] * scale, sine = angles[half + i] * scale;
        out[i] = x[i] * cosine + x[i + half] * sine;
        out[i + half] = x[i + half] * cosine - x[i] * sine;
    }
    for (int i = 2 * half; i < dims; ++i) out[i] = x[i] * scale;
}

// Starts the reading of a head's codes of a page.
INLINE void prefetch_page(const Cache& c, int page, int head) {
    const size_t first = c.token(page, head);
    for (int at = 0; at < PAGE * c.code_bytes(); at += 64) {
        __builtin_prefetch(c.key_codes + first * c.code_bytes() + at);
        __builtin_prefetch(c.value_codes + first * c.code_bytes() + at);
    }
    if (c.format == F16) return;
    __builtin_prefetch(c.key_scales + first * c.groups());
    __builtin_prefetch(c.value_scales + first * c.groups());
}

template <int FORMAT> static void decode_part(const Attention& a, const DecodePart& part, float* partial) {
    const Cache& c = a.cache;
    const int group = a.group(), half = a.rope.half, length = a.context_lens[part.b];
    const int row = a.query_starts[part.b], seen = a.first_seen(length - 1);
    float* const maxima = partial;
    float* const totals = partial + group;
    float* const outputs = partial + 2 * group;
    std::fill(maxima, maxima + group, UNSEEN);
    std::fill(totals, totals + group * (1 + ROW), 0.0f);

    static thread_local Scratch memory;
    float* const queries = memory.floats(size_t(group) * (ROW + PAGE + 1) + PAGE * ROW);
    float* const keys = queries + group * ROW;
    float* const scores = keys + PAGE * ROW;
    float* const corrections = scores + group * PAGE;
    alignas(64) float factor[MOST_DIMS];
    a.copy_factor(part.head, factor);
    const int padded = (c.dims + LANES - 1) / LANES * LANES;
    std::fill(queries, queries + group * ROW, 0.0f);
    std::fill(keys, keys + PAGE * ROW, 0.0f);  // of tokens that aren't there

    for (int index = part.first_page; index < part.last_page; ++index) {
        const int page = a.page(part.b, index);
        if (index + 1 < part.last_page) prefetch_page(c, a.page(part.b, index + 1), part.head);
        const int first = std::max(0, seen - index * PAGE), last = std::min(PAGE, length - index * PAGE);
        // instead of every key the query is turned by the page's angle, the other way; it takes the scale along
        for (int g = 0; g < group; ++g) {
            const float* from = a.queries + (size_t(row) * a.heads + part.head * group + g) * c.dims;
            turn_back(from, half ? a.page_angles(part.b, index) : nullptr, half, c.dims, a.scale, queries + g * ROW);
        }
        read_keys<FORMAT>(c, page, part.head, first, last, factor, half ? a.place_angles(part.b) : factor, half, keys);
        scores_of_page(queries, keys, group, padded, scores);

        for (int g = 0; g < group; ++g) {
            float* const score = scores + g * PAGE;
            if (a.softcap)
                for (int i = 0; i < PAGE; i += LANES)
                    store(score + i, hyperbolic_tangent(load(score + i) * (1 / a.softcap)) * a.softcap);
            for (int i = 0; i < first; ++i) score[i] = UNSEEN;
            for (int i = last; i < PAGE; ++i) score[i] = UNSEEN;
            Floats most = load(score), total = {};
            for (int i = LANES; i < PAGE; i += LANES) most = larger(most, load(score + i));
            const float maximum = std::max(maxima[g], largest(most));
            for (int i = 0; i < PAGE; i += LANES) {
                const Floats weight = exponential(load(score + i) - maximum);
                store(score + i, weight);
                total += weight;
            }
            corrections[g] = maximum == maxima[g] ? 1.0f : exponential(all(maxima[g] - maximum))[0];
            totals[g] = totals[g] * corrections[g] + sum(total);
            maxima[g] = maximum;
        }
        PageReader<FORMAT> values(c, c.value_codes, c.value_scales, page, part.head);
        add_values_of_heads(values, scores, corrections, group, first, last, outputs);
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
