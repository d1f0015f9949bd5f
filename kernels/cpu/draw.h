// Draws a token from each row of logits without sorting a vocabulary: the twin of the sampler's chain of numpy steps,
// for the parameters that most requests use.
#pragma once

#include "pool.h"
#include "rank.h"

namespace drawing {

constexpr int64_t DEPTHS[] = {128, 1024, 8192};  // So many tokens are listed, more where they don't decide, then all.
constexpr double TINY = std::numeric_limits<double>::min();
constexpr int64_t NOTHING = -1;  // All tokens are banned, or there is a NaN.

struct Params {
    double u, top_k, top_p, min_p, typical_p;  // u is in [0, 1); 0, 1, 0, 1 are neutral.
    Transform transforms[MAX_TRANSFORMS];
};

struct Scratch {
    Ranked ranked;
    std::vector<double> weights, distance;
    std::vector<int32_t> by_distance;
};

// What truncation has left: weights in the order of the list (0 is removed), their sum if everything kept is listed.
struct Kept {
    std::vector<double>& weights;
    double total, border;
    bool is_settled = true;

    void closed(bool is_closed) {
        is_settled &= is_closed || border == 0;
        border = 0;
        total = 0;
        for (double weight : weights) total += weight;
    }
};

inline void keep_top_k(Kept& kept, int64_t k) {
    int64_t place = 0;
    for (double& weight : kept.weights) {
        if (weight > 0) ++place;
        if (place > k) weight = 0;
    }
    kept.closed(place >= k);
}

inline void keep_top_p(Kept& kept, double p) {
    const double wanted = std::max(p * kept.total, TINY);
    double reached = 0;
    for (double& weight : kept.weights) {
        const double before = reached;
        reached += weight;
        if (before >= wanted) weight = 0;
    }
    kept.closed(reached >= wanted);
}

inline void keep_min_p(Kept& kept, double p) {
    const double least = p * *std::max_element(kept.weights.begin(), kept.weights.end());
    for (double& weight : kept.weights)
        if (weight < least) weight = 0;
    kept.closed(kept.border < least);
}

inline void keep_typical_p(Kept& kept, double p, Scratch& scratch) {
    double sum = 0, entropy = 0;
    for (double weight : kept.weights) sum += weight;
    for (double weight : kept.weights)
        if (weight / sum > 0) entropy -= weight / sum * std::log(weight / sum);
    const size_t count = kept.weights.size();
    scratch.distance.resize(count);
    scratch.by_distance.resize(count);
    for (size_t i = 0; i < count; ++i) {
        const double share = kept.weights[i] / sum;
        scratch.distance[i] = share > 0 ? std::abs(-std::log(share) - entropy) : std::numeric_limits<double>::infinity();
        scratch.by_distance[i] = int32_t(i);
    }
    std::stable_sort(scratch.by_distance.begin(), scratch.by_distance.end(),
                     [&](int32_t a, int32_t b) { return scratch.distance[a] < scratch.distance[b]; });
    double reached = 0;
    for (int32_t i : scratch.by_distance) {
        const double before = reached;
        reached += kept.weights[i] / sum;
        if (before >= std::max(p, TINY)) kept.weights[i] = 0;
    }
    kept.closed(false);
}

// The column on which u falls.
inline size_t place_of(const Kept& kept, double u, bool& is_settled) {
    double end = 0;
    for (double weight : kept.weights) end += weight;
    const double target = u * kept.total;
    is_settled = kept.is_settled && (kept.border == 0 || target < end);
    double reached = 0;
    size_t column = 0, last = 0;
    for (double weight : kept.weights) {
        reached += weight;
        column += reached <= target;
        last += reached < end;
    }
    return std::min(column, last);
}

// The first token of the largest logit.
inline int64_t likeliest(const float* row, int64_t vocab, const Ranked& ranked) {
    int64_t i = (std::find(ranked.maxima.begin(), ranked.maxima.end(), ranked.top) - ranked.maxima.begin()) * BLOCK;
    while (i < vocab && row[i] != ranked.top) ++i;
    return i;
}

// The place in a list of this length on which u falls; false where the list is too short to tell.
inline bool place_in_list(const float* row, int64_t vocab, int64_t wanted, const Params& params, double total,
                          Scratch& scratch, size_t& column) {
    Ranked& ranked = scratch.ranked;
    rank(row, vocab, wanted, ranked);
    scratch.weights.resize(ranked.list.size());
    for (size_t i = 0; i < ranked.list.size(); ++i)
        scratch.weights[i] = std::exp(transformed(double(logit_of(ranked.list[i])) - ranked.top, params.transforms));
    Kept kept{scratch.weights, total, std::exp(transformed(double(ranked.border) - ranked.top, params.transforms))};
    if (params.top_k > 0) keep_top_k(kept, int64_t(params.top_k));
    if (params.top_p < 1) keep_top_p(kept, params.top_p);
    if (params.min_p > 0) keep_min_p(kept, params.min_p);
    if (params.typical_p < 1) keep_typical_p(kept, params.typical_p, scratch);
    bool is_settled;
    column = place_of(kept, params.u, is_settled);
    return is_settled;
}

inline int64_t draw_row(const float* row, int64_t vocab, const Params& params, Scratch& scratch) {
    Ranked& ranked = scratch.ranked;
    if (!look_at(row, vocab, ranked)) return NOTHING;
    if (params.top_k == 1) return likeliest(row, vocab, ranked);
    const bool needs_total =
        params.top_k == 0 && (params.top_p < 1 || (params.min_p == 0 && params.typical_p == 1));
    const double total = needs_total ? mass_of_row(row, vocab, ranked.top, params.transforms) : double(vocab);
    size_t column;
    for (int64_t depth : DEPTHS) {
        const int64_t wanted = params.top_k > 0 ? std::max(int64_t(params.top_k), 1l) : depth;
        if (wanted >= vocab) break;
        if (place_in_list(row, vocab, wanted, params, total, scratch, column)) return token_of(ranked.list[column]);
    }
    place_in_list(row, vocab, vocab, params, total, scratch, column);
    return token_of(ranked.list[column]);
}

// A token for each of these rows of logits [any, vocab], by params [count, WIDTH].
inline void draw(const float* logits, int64_t vocab, const int64_t* rows, int64_t count, const double* params,
                 int64_t* token_ids) {
    constexpr int WIDTH = sizeof(Params) / sizeof(double);
    pool().run(int(count), [&](int i) {
        thread_local Scratch scratch;
        Params p;
        __builtin_memcpy(&p, params + i * WIDTH, sizeof p);
        token_ids[i] = draw_row(logits + rows[i] * vocab, vocab, p, scratch);
    });
}

// The `wanted` largest logits of each of these rows, in order: out_* [count, width]; borders and tops [count].
inline void rank_rows(const float* logits, int64_t vocab, const int64_t* rows, int64_t count, const int64_t* wanted,
                      int64_t width, float* out_logits, int64_t* out_ids, float* borders, float* tops) {
    pool().run(int(count), [&](int i) {
        thread_local Ranked ranked;
        const float* row = logits + rows[i] * vocab;
        ranked.list.clear();
        ranked.border = -INF;
        if (look_at(row, vocab, ranked)) rank(row, vocab, wanted[i], ranked);
        const int64_t num = int64_t(ranked.list.size());
        for (int64_t place = 0; place < width; ++place) {
            out_logits[i * width + place] = place < num ? logit_of(ranked.list[place]) : -INF;
            out_ids[i * width + place] = place < num ? token_of(ranked.list[place]) : 0;
        }
        borders[i] = ranked.border, tops[i] = ranked.top;
    });
}

// Sums [count, 5] over these rows, transformed [count, MAX_TRANSFORMS, 4], or their mass alone [count]; NaN where nothing can be
// drawn.
inline void sum_rows(const float* logits, int64_t vocab, const int64_t* rows, int64_t count, const double* transforms,
                     int is_mass_alone, double* out) {
    pool().run(int(count), [&](int i) {
        thread_local Ranked ranked;
        const float* row = logits + rows[i] * vocab;
        const Transform* row_transforms = reinterpret_cast<const Transform*>(transforms) + i * MAX_TRANSFORMS;
        const bool is_drawable = look_at(row, vocab, ranked);
        if (is_mass_alone) {
            out[i] = is_drawable ? mass_of_row(row, vocab, ranked.top, row_transforms) : NAN;
            return;
        }
        Sums sums{NAN, NAN, NAN, NAN, NAN};
        if (is_drawable) sums = sum_row(row, vocab, ranked.top, row_transforms);
        __builtin_memcpy(out + i * 5, &sums, sizeof sums);
    });
}

}  // namespace drawing
