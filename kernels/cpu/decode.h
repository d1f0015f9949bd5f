// Attention of one query a sequence. Reading the cache is the limit: every page is read once for all heads of a group,
// in the order in which it lies in memory.
//
// Source: Dao et al. 2023, "Flash-Decoding for long-context inference": the context is cut into parts, each with its
// own softmax, which are merged in the end.
#pragma once

#include "values.h"

struct DecodePart {
    int b, first_page, last_page;
    size_t partial;  // Where the scratch holds [H] maxima, [H] sums, [H][ROW] outputs
};

constexpr int TOGETHER = LANES == 16 ? 8 : 4;  // So many heads' outputs are held in registers.

INLINE size_t partial_floats(int heads) { return size_t(heads) * (2 + ROW); }

// Starts the reading of one head of a page, to the second cache: pages lie anywhere in memory, and no processor guesses
// where the next one is.
INLINE void fetch(const Cache& c, const uint8_t* codes, const f16* scales, int page, int head) {
    const size_t token = c.token(page, head), bytes = c.code_bytes();
    for (size_t at = 0; at < PAGE * bytes; at += 64) __builtin_prefetch(codes + token * bytes + at, 0, 2);
    for (int at = 0; at < PAGE * c.groups(); at += 32) __builtin_prefetch(scales + token * c.groups() + at, 0, 2);
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

// `count` scores to weights relative to the largest so far. Returns by what earlier sums are corrected.
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
        const Floats weight = exponential_inside(larger(load(scores + i) - maximum, all(-87.3f)));
        store(scores + i, weight);
        sums += weight;
    }
    const float correction = maximum == before ? 1.0f : exponential(all(before - maximum))[0];
    total = total * correction + sum(sums);
    return correction;
}

template <int FORMAT> static void decode_part(const Attention& a, const DecodePart& part, float* partial) {
    const Cache& c = a.cache;
    const int heads = a.heads, group = a.group(), half = a.rope.half, length = a.step.context_lens[part.b];
    const int row = a.step.query_starts[part.b], seen = a.first_seen(length - 1);
    float* const maxima = partial;
    float* const totals = partial + heads;
    float* const outputs = partial + 2 * heads;
    std::fill(maxima, maxima + heads, UNSEEN);
    std::fill(totals, totals + heads, 0.0f);
    std::fill(outputs, outputs + heads * ROW, 0.0f);

    static thread_local Scratch memory;
    const size_t size = size_t(heads) * (ROW + SPAN + 1) + group * ROW + (PAGE + c.kv_heads) * MOST_DIMS;
    float* const queries = memory.floats(size);
    float* const turned = queries + heads * ROW;
    float* const scores = turned + group * ROW;
    float* const turns = scores + heads * SPAN;
    float* const ratios = turns + PAGE * MOST_DIMS;
    float* const corrections = ratios + c.kv_heads * MOST_DIMS;
    if (half) transpose((const uint8_t*)a.place_angles(part.b), 8 * half, 8 * half, (uint32_t*)turns);
    for (int head = 0; head < heads; ++head) {
        // of a pair's two factors the first goes into the query, and so does the scale
        const float* const from = a.queries + (size_t(row) * heads + head) * c.dims;
        const float* const factor = c.key_factor + head / group * c.dims;
        for (int d = 0; d < c.dims; ++d)
            queries[head * ROW + d] = from[d] * (a.scale * factor[half <= d && d < 2 * half ? d - half : d]);
    }
    for (int head = 0; head < c.kv_heads; ++head) {
        const float* const factor = c.key_factor + head * c.dims;
        for (int i = 0; i < half; ++i) ratios[head * MOST_DIMS + i] = factor[i + half] / factor[i];
    }

    for (int start = part.first_page; start < part.last_page; start += SPAN_PAGES) {
        const int count = std::min(SPAN_PAGES, part.last_page - start), end = start + count;
        const int32_t* const pages = a.pages(part.b) + start;
        const Span span{pages, pages + count, count, std::min(SPAN_PAGES, part.last_page - end),
                        std::max(0, seen - start * PAGE), std::min(PAGE, length - (end - 1) * PAGE)};
        for (int i = 0; i < count; ++i)
            for (int head = 0; head < c.kv_heads; ++head) {
                fetch(c, c.value_codes, c.value_scales, pages[i], head);
                // instead of every key the query is turned by the page's angle, the other way
                for (int g = 0; g < group; ++g)
                    turn_back(queries + (head * group + g) * ROW, half ? a.page_angles(part.b, start + i) : nullptr,
                              half, c.dims, turned + g * ROW);
                const KeyPage<FORMAT> keys(c, pages[i], head);
                float* const at = scores + head * group * SPAN + i * PAGE;
                for_heads(group, [&](int g, auto count) __attribute__((always_inline)) {
                    keys.template score<count.value>(turned + g * ROW, turns, ratios + head * MOST_DIMS, half, c.dims,
                                                     at + g * SPAN);
                });
            }
        for (int head = 0; head < heads; ++head) {
            float* const of_head = scores + head * SPAN;
            std::fill_n(of_head, span.first, UNSEEN);
            corrections[head] = soften(a, of_head, (count - 1) * PAGE + span.last, maxima[head], totals[head]);
        }
        for (int head = 0; head < c.kv_heads; ++head)
            for_heads(group, [&](int g, auto count) __attribute__((always_inline)) {
                g += head * group;
                add_values<FORMAT, count.value>(c, span, head, scores + g * SPAN, corrections + g, outputs + g * ROW);
            });
    }
}

// Parts [first, last) are those of one sequence.
static void merge_parts(const Attention& a, const DecodePart* first, const DecodePart* last, const float* scratch) {
    for (int head = 0; head < a.heads; ++head) {
        float maximum = UNSEEN, total = 0, weighted[MOST_DIMS] = {};
        for (const DecodePart* part = first; part < last; ++part)
            maximum = std::max(maximum, scratch[part->partial + head]);
        for (const DecodePart* part = first; part < last; ++part) {
            const float* const partial = scratch + part->partial;
            const float weight = expf(partial[head] - maximum);
            const float* const output = partial + 2 * a.heads + head * ROW;
            total += weight * partial[a.heads + head];
            for (int d = 0; d < a.cache.dims; ++d) weighted[d] += weight * output[d];
        }
        float* const out = a.out + (size_t(a.step.query_starts[first->b]) * a.heads + head) * a.cache.dims;
        for (int d = 0; d < a.cache.dims; ++d) out[d] = weighted[d] / total;
    }
}
