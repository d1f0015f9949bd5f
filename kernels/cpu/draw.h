// Draws a token from each row of logits without sorting a vocabulary: the twin of the sampler's chain of numpy steps,
// for the parameters that most requests use. A row that it can't decide by its short list is left to the chain.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace drawing {

constexpr int64_t BLOCK = 64;      // tokens whose maximum is looked at first
constexpr int64_t LIST = 128;      // candidates of a row without top_k
constexpr int64_t SPARE = 12;      // listed beyond top_k, since tokens that tie at the border are left out
constexpr int64_t LONGEST = 1024;  // candidates; rows that want more are left to the chain
constexpr double TINY = std::numeric_limits<double>::min();
constexpr int64_t NOTHING = -1;    // all tokens are banned, or there is a NaN
constexpr int64_t UNSETTLED = -2;

struct Params {
    double temperature, u, top_k, top_p, min_p, typical_p;
};

struct Candidate {
    float logit;
    int32_t token_id;
};

struct Scratch {
    std::vector<float> maxima, order;
    std::vector<Candidate> list;
    std::vector<double> weights, distance;
    std::vector<int32_t> by_distance;
};

// Sixteen floats; the compiler splits them where registers are narrower.
typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t Bits __attribute__((vector_size(64)));

inline Lanes load(const float* p) {
    Lanes x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}

// The largest logit of each block; false where there is a NaN.
bool block_maxima(const float* row, int64_t vocab, std::vector<float>& maxima) {
    maxima.resize((vocab + BLOCK - 1) / BLOCK);
    Bits is_nan = {};
    const int64_t whole = vocab / BLOCK;
    for (int64_t block = 0; block < whole; ++block) {
        const float* begin = row + block * BLOCK;
        const Lanes a = load(begin), b = load(begin + 16), c = load(begin + 32), d = load(begin + 48);
        is_nan |= (a != a) | (b != b) | (c != c) | (d != d);
        const Lanes ab = a > b ? a : b, cd = c > d ? c : d;
        const Lanes most = ab > cd ? ab : cd;
        float largest = most[0];
        for (int i = 1; i < 16; ++i) largest = most[i] > largest ? most[i] : largest;
        maxima[block] = largest;
    }
    bool has_nan = false;
    for (int i = 0; i < 16; ++i) has_nan |= is_nan[i] != 0;
    if (whole < int64_t(maxima.size())) {
        float largest = -std::numeric_limits<float>::infinity();
        for (int64_t i = whole * BLOCK; i < vocab; ++i) {
            largest = std::max(largest, row[i]);
            has_nan |= std::isnan(row[i]);
        }
        maxima[whole] = largest;
    }
    return !has_nan;
}

// exp(x) for x <= 0 to about 2e-7 of its value: 2^n * 2^f with a polynomial for f in [-1/2, 1/2].
inline Lanes exp_negative(Lanes x) {
    Lanes scaled = x * 1.44269504089f;
    scaled = scaled > -126.0f ? scaled : Lanes{} - 126.0f;
    const Bits n = __builtin_convertvector(scaled - 0.5f, Bits);  // truncation towards zero rounds these to the nearest
    const Lanes f = scaled - __builtin_convertvector(n, Lanes);
    Lanes p = f * 1.5403530e-4f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    const Bits power = (n + 127) << 23;
    Lanes two_to_n;
    __builtin_memcpy(&two_to_n, &power, sizeof two_to_n);
    return scaled > -126.0f ? p * two_to_n : Lanes{};
}

double total_weight(const float* row, int64_t vocab, float top, double temperature) {
    const float inverse = float(1 / temperature);
    double total = 0;
    for (int64_t begin = 0; begin < vocab; begin += 1024) {
        const int64_t end = std::min(vocab, begin + 1024);
        Lanes sums = {};
        int64_t i = begin;
        for (; i + 16 <= end; i += 16) sums += exp_negative((load(row + i) - top) * inverse);
        for (int j = 0; j < 16; ++j) total += sums[j];
        for (; i < end; ++i) total += std::exp((double(row[i]) - top) / temperature);
    }
    return total;
}

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

void keep_top_k(Kept& kept, int64_t k) {
    int64_t place = 0;
    for (double& weight : kept.weights) {
        if (weight > 0) ++place;
        if (place > k) weight = 0;
    }
    kept.closed(place >= k);
}

void keep_top_p(Kept& kept, double p) {
    const double wanted = std::max(p * kept.total, TINY);
    double reached = 0;
    for (double& weight : kept.weights) {
        const double before = reached;
        reached += weight;
        if (before >= wanted) weight = 0;
    }
    kept.closed(reached >= wanted);
}

void keep_min_p(Kept& kept, double p) {
    const double least = p * *std::max_element(kept.weights.begin(), kept.weights.end());
    for (double& weight : kept.weights)
        if (weight < least) weight = 0;
    kept.closed(kept.border < least);
}

void keep_typical_p(Kept& kept, double p, Scratch& scratch) {
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
size_t place_of(const Kept& kept, double u, bool& is_settled) {
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

int64_t draw_row(const float* row, int64_t vocab, const Params& params, Scratch& scratch) {
    if (!block_maxima(row, vocab, scratch.maxima)) return NOTHING;
    const float top = *std::max_element(scratch.maxima.begin(), scratch.maxima.end());
    if (!std::isfinite(top)) return NOTHING;
    const int64_t wanted = params.top_k > 0 ? int64_t(params.top_k) + SPARE : LIST;
    if (wanted > LONGEST) return UNSETTLED;

    float border = -std::numeric_limits<float>::infinity();
    if (wanted < int64_t(scratch.maxima.size())) {  // fewer blocks: the whole row is listed
        scratch.order = scratch.maxima;
        std::nth_element(scratch.order.begin(), scratch.order.begin() + wanted, scratch.order.end(),
                         std::greater<float>());
        border = scratch.order[wanted];
    }
    scratch.list.clear();
    for (size_t block = 0; block < scratch.maxima.size(); ++block) {
        if (!(scratch.maxima[block] > border)) continue;
        const int64_t end = std::min(vocab, int64_t(block + 1) * BLOCK);
        for (int64_t i = int64_t(block) * BLOCK; i < end; ++i)
            if (row[i] > border) scratch.list.push_back({row[i], int32_t(i)});
    }
    std::sort(scratch.list.begin(), scratch.list.end(), [](const Candidate& a, const Candidate& b) {
        return a.logit > b.logit || (a.logit == b.logit && a.token_id < b.token_id);
    });
    if (params.u == 0 && params.top_k == 1) return scratch.list[0].token_id;

    scratch.weights.resize(scratch.list.size());
    for (size_t i = 0; i < scratch.list.size(); ++i)
        scratch.weights[i] = std::exp((double(scratch.list[i].logit) - top) / params.temperature);
    const bool needs_total =
        params.top_k == 0 && (params.top_p < 1 || (params.min_p == 0 && params.typical_p == 1));
    Kept kept{scratch.weights, needs_total ? total_weight(row, vocab, top, params.temperature) : double(vocab),
              std::exp((double(border) - top) / params.temperature)};
    if (params.top_k > 0) keep_top_k(kept, int64_t(params.top_k));
    if (params.top_p < 1) keep_top_p(kept, params.top_p);
    if (params.min_p > 0) keep_min_p(kept, params.min_p);
    if (params.typical_p < 1) keep_typical_p(kept, params.typical_p, scratch);
    bool is_settled;
    const size_t column = place_of(kept, params.u, is_settled);
    return is_settled ? scratch.list[column].token_id : UNSETTLED;
}

// A token for each row of logits [rows, vocab], by params [rows, 6].
inline void draw(const float* logits, int64_t rows, int64_t vocab, const double* params, int64_t* token_ids) {
    thread_local Scratch scratch;
    for (int64_t r = 0; r < rows; ++r) {
        const double* p = params + 6 * r;
        token_ids[r] = draw_row(logits + r * vocab, vocab, {p[0], p[1], p[2], p[3], p[4], p[5]}, scratch);
    }
}

}  // namespace drawing

using drawing::draw;
