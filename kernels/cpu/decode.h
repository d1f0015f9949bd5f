// Attention of one query a sequence. Reading the cache is the limit: every page is read once for all heads of a group.
//
// Source: Dao et al. 2023, "Flash-Decoding for long-context inference": the context is cut into parts, each with its own
// softmax, which are merged in the end.
#pragma once

#include "scores.h"

struct DecodePart {
    int b, head, first_page, last_page;
    size_t partial;  // where in the scratch: [G] maxima, [G] sums, [G][ROW] outputs
};

constexpr int TOGETHER = LANES == 16 ? 8 : 4;  // heads whose outputs are held in registers

INLINE size_t partial_floats(int group) { return size_t(group) * (2 + ROW); }

// A part's pages from one correction of the softmax to the next, and the places in them that are seen.
struct Span {
    const int* pages;
    int count, first, last;  // first place of the first page, end of the last page

    int first_of(int i) const { return i ? 0 : first; }
    int last_of(int i) const { return i + 1 < count ? PAGE : last; }
    int next_of(int i) const { return pages[std::min(i + 1, count - 1)]; }
};

// Starts the reading of one head of a page: pages lie anywhere in memory, and no processor guesses where the next one is.
INLINE void fetch(const Cache& c, const uint8_t* codes, const f16* scales, int page, int head) {
    const size_t token = c.token(page, head), bytes = c.code_bytes();
    for (size_t at = 0; at < PAGE * bytes; at += 64) __builtin_prefetch(codes + token * bytes + at);
    for (int at = 0; at < PAGE * c.groups(); at += 32) __builtin_prefetch(scales + token * c.groups() + at);
}

// out[g] = out[g] * corrections[g] + sum over places of weights[g][place] * values, for HEADS heads, of VECTORS vectors
// from dimension d: enough sums at a time that none waits for its own last step.
template <int FORMAT, int HEADS, int VECTORS>
INLINE void add_values_at(const Cache& c, const Span& span, int head, const float* all_weights,
                          const float* corrections, int d, float* out) {
    constexpr int GROUPS = VECTORS * LANES > GROUP ? VECTORS * LANES / GROUP : 1;
    constexpr int BYTES = VECTORS * LANES * (FORMAT == F16 ? 4 : FORMAT == Q8 ? 2 : 1) / 2;
    const int code_bytes = c.code_bytes(), byte = FORMAT == F16 ? 2 * d : FORMAT == Q8 ? d : d / 2;
    Floats acc[HEADS][VECTORS];
#pragma GCC unroll 8
    for (int g = 0; g < HEADS; ++g)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) acc[g][j] = load(out + g * ROW + d + j * LANES) * corrections[g];
    for (int i = 0; i < span.count; ++i, all_weights += PAGE) {
        alignas(64) float weights[GROUPS][HEADS][PAGE], scales[MOST_DIMS / GROUP][PAGE];  // weights times scales
        if constexpr (FORMAT != F16) {
            read_scales(c.value_scales + c.token(span.pages[i], head) * c.groups(), c.groups(), scales[0]);
            __builtin_prefetch(c.value_scales + c.token(span.next_of(i), head) * c.groups());
        }
        for (int k = 0; k < GROUPS; ++k)
            for (int part = 0; part < PAGE; part += LANES) {
                const Floats scale = FORMAT == F16 ? all(1.0f) : load(scales[d / GROUP + k] + part);
#pragma GCC unroll 8
                for (int g = 0; g < HEADS; ++g) store(weights[k][g] + part, load(all_weights + g * SPAN + part) * scale);
            }
        const uint8_t* token = c.value_codes + (c.token(span.pages[i], head) + span.first_of(i)) * code_bytes;
        const uint8_t* ahead = c.value_codes + (c.token(span.next_of(i), head) + span.first_of(i)) * code_bytes + byte;
        const int last = span.last_of(i);
        for (int place = span.first_of(i); place < last; ++place, token += code_bytes, ahead += code_bytes) {
            for (int at = 0; at < BYTES; at += 64) __builtin_prefetch(ahead + at);
            Floats v[VECTORS];
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; ++j) v[j] = codes_at<FORMAT>(token, d + j * LANES, c.dims);
#pragma GCC unroll 8
            for (int g = 0; g < HEADS; ++g)
#pragma GCC unroll 4
                for (int j = 0; j < VECTORS; ++j) acc[g][j] += v[j] * weights[j * LANES / GROUP][g][place];
        }
    }
#pragma GCC unroll 8
    for (int g = 0; g < HEADS; ++g)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) store(out + g * ROW + d + j * LANES, acc[g][j]);
}

template <int FORMAT, int HEADS>
INLINE void add_values(const Cache& c, const Span& span, int head, const float* weights, const float* corrections,
                       float* out) {
    constexpr int VECTORS = LANES == 16 && HEADS <= 4 ? 4 : 2;
    int d = 0;
    for (; d + VECTORS * LANES <= c.dims; d += VECTORS * LANES)
        add_values_at<FORMAT, HEADS, VECTORS>(c, span, head, weights, corrections, d, out);
    for (; d < c.dims; d += LANES) add_values_at<FORMAT, HEADS, 1>(c, span, head, weights, corrections, d, out);
}

// Calls work(first, HEADS) for as many heads of a group at a time as registers hold, HEADS as a constant.
template <class F> INLINE void for_heads(int group, F&& work) {
    for (int g = 0; g < group;) {
        const auto step = [&](auto heads) __attribute__((always_inline)) {
            work(g, heads);
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

// x [dims] rotated against the angles [2][half].
INLINE void turn_back(const float* __restrict x, const float* __restrict angles, int half, int dims,
                      float* __restrict out) {
    int i = 0;
    for (; i + LANES <= half; i += LANES) {
        const Floats cosine = load(angles + i), sine = load(angles + half + i);
        const Floats first = load(x + i), second = load(x + i + half);
        store(out + i, first * cosine + second * sine);
        store(out + i + half, second * cosine - first * sine);
    }
    for (; i < half; ++i) {
        const float cosine = angles[i], sine = angles[half + i];
        out[i] = x[i] * cosine + x[i + half] * sine;
        out[i + half] = x[i + half] * cosine - x[i] * sine;
    }
    for (i = 2 * half; i < dims; ++i) out[i] = x[i];
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
    float* const maxima = partial;
    float* const totals = partial + group;
    float* const outputs = partial + 2 * group;
    std::fill(maxima, maxima + group, UNSEEN);
    std::fill(totals, totals + group, 0.0f);
    std::fill(outputs, outputs + group * ROW, 0.0f);

    static thread_local Scratch memory;
    float* const queries = memory.floats(size_t(group) * (2 * ROW + SPAN + 1) + PAGE * 2 * MOST_DIMS);
    float* const turned = queries + group * ROW;
    float* const scores = turned + group * ROW;
    float* const turns = scores + group * SPAN;
    float* const corrections = turns + PAGE * 2 * MOST_DIMS;
    alignas(64) float factor[MOST_DIMS];
    a.copy_factor(part.head, factor);
    if (half) turns_of_places(a.place_angles(part.b), factor, half, turns);
    for (int g = 0; g < group; ++g) {
        const float* const from = a.queries + (size_t(row) * a.heads + part.head * group + g) * c.dims;
        for (int d = 0; d < c.dims; ++d) queries[g * ROW + d] = from[d] * a.scale * (d < 2 * half ? 1 : factor[d]);
    }

    for (int start = part.first_page; start < part.last_page; start += SPAN_PAGES) {
        const int count = std::min(SPAN_PAGES, part.last_page - start), end = start + count;
        const Span span{a.pages(part.b) + start, count, std::max(0, seen - start * PAGE),
                        std::min(PAGE, length - (end - 1) * PAGE)};
        for (int i = 0; i < count; ++i) {
            float* const at = scores + i * PAGE;
            // instead of every key the query is turned by the page's angle, the other way
            for (int g = 0; g < group; ++g)
                turn_back(queries + g * ROW, half ? a.page_angles(part.b, start + i) : nullptr, half, c.dims,
                          turned + g * ROW);
            if (i + 1 < count) fetch(c, c.key_codes, c.key_scales, span.pages[i + 1], part.head);
            else fetch(c, c.value_codes, c.value_scales, span.pages[0], part.head);
            const KeyPage<FORMAT> keys(c, span.pages[i], part.head);
            for_heads(group, [&](int g, auto heads) __attribute__((always_inline)) {
                keys.template add_scores<heads.value>(turned + g * ROW, turns, half, c.dims, at + g * SPAN);
            });
        }
        for (int g = 0; g < group; ++g) {
            std::fill_n(scores + g * SPAN, span.first, UNSEEN);
            const int tokens = (count - 1) * PAGE + span.last;
            corrections[g] = soften(a, scores + g * SPAN, tokens, maxima[g], totals[g]);
        }
        if (end < part.last_page) fetch(c, c.key_codes, c.key_scales, span.pages[count], part.head);
        for_heads(group, [&](int g, auto heads) __attribute__((always_inline)) {
            add_values<FORMAT, heads.value>(c, span, part.head, scores + g * SPAN, corrections + g, outputs + g * ROW);
        });
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
