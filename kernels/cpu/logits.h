// Whole rows of logits: their blocks' maxima, and sums over them after steps that transform all logits alike.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace drawing {

constexpr int64_t BLOCK = 64;  // So many tokens have a maximum that is looked at first.
constexpr float INF = std::numeric_limits<float>::infinity();

// Sixteen floats; the compiler splits them where registers are narrower.
typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t Bits __attribute__((vector_size(64)));
typedef double Wide __attribute__((vector_size(128)));

inline Lanes load(const float* p) {
    Lanes x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}

// The largest logit of each block; false where there is a NaN.
inline bool block_maxima(const float* row, int64_t vocab, std::vector<float>& maxima) {
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
        float largest = -INF;
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
    const Bits n = __builtin_convertvector(scaled - 0.5f, Bits);  // Truncation towards zero rounds these to the nearest.
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

// A change of all logits of a row, which are the distances below its largest one. See reference.row_sums.
struct Transform {
    double kind, a, b, c;
};
constexpr int MAX_TRANSFORMS = 6;  // A row has no more; kernels/forms/rows.py knows the number, too.
constexpr double DIVIDE = 1, PARABOLA = 2, CUT = 3;

inline double transformed(double y, const Transform* transforms) {
    for (const Transform* transform = transforms; transform < transforms + MAX_TRANSFORMS && transform->kind; ++transform) {
        if (y == -std::numeric_limits<double>::infinity()) return y;
        if (transform->kind == DIVIDE) y /= transform->a;
        if (transform->kind == PARABOLA) y = transform->a * y * y * (y * (transform->b - 1) / 2 - (3 - transform->b) / 2) - transform->c;
        if (transform->kind == CUT && y < transform->a) y = -std::numeric_limits<double>::infinity();
    }
    return y;
}

inline Lanes transformed(Lanes y, const Transform* transforms) {
    const Lanes nothing = Lanes{} - INF;
    for (const Transform* transform = transforms; transform < transforms + MAX_TRANSFORMS && transform->kind; ++transform) {
        const float a = float(transform->a), b = float((transform->b - 1) / 2), c = float((3 - transform->b) / 2);
        if (transform->kind == DIVIDE) y = y * float(1 / transform->a);
        if (transform->kind == PARABOLA) y = y > nothing ? a * y * y * (y * b - c) - float(transform->c) : y;
        if (transform->kind == CUT) y = y < a ? nothing : y;
    }
    return y;
}

// Over the tokens that are possible: how many, and their exp(y), y exp(y), y and y squared.
struct Sums {
    double count = 0, mass = 0, moment = 0, first = 0, second = 0;

    void add(double y) {
        if (!(y > -std::numeric_limits<double>::infinity())) return;
        const double weight = std::exp(y);
        count += 1, mass += weight, moment += weight > 0 ? y * weight : 0, first += y, second += y * y;
    }
};

inline Sums sum_row(const float* row, int64_t vocab, float top, const Transform* transforms) {
    Sums sums;
    const Lanes nothing = Lanes{} - INF;
    for (int64_t begin = 0; begin < vocab; begin += 1024) {
        const int64_t end = std::min(vocab, begin + 1024);
        Lanes mass = {}, moment = {};
        Wide first = {}, second = {};
        Bits count = {};
        int64_t i = begin;
        for (; i + 16 <= end; i += 16) {
            const Lanes y = transformed(load(row + i) - top, transforms);
            const Lanes weight = exp_negative(y);
            const Bits is_possible = y > nothing;
            mass += weight;
            moment += weight > 0.0f ? y * weight : Lanes{};
            count -= is_possible;
            const Wide wide = __builtin_convertvector(is_possible ? y : Lanes{}, Wide);
            first += wide, second += wide * wide;
        }
        for (int j = 0; j < 16; ++j) {
            sums.count += count[j], sums.mass += mass[j], sums.moment += moment[j];
            sums.first += first[j], sums.second += second[j];
        }
        for (; i < end; ++i) sums.add(transformed(double(row[i]) - top, transforms));
    }
    return sums;
}

// exp(y) of a whole row, summed: Sums::mass alone, in half the time.
inline double mass_of_row(const float* row, int64_t vocab, float top, const Transform* transforms) {
    double total = 0;
    for (int64_t begin = 0; begin < vocab; begin += 1024) {
        const int64_t end = std::min(vocab, begin + 1024);
        Lanes sums = {};
        int64_t i = begin;
        for (; i + 16 <= end; i += 16) sums += exp_negative(transformed(load(row + i) - top, transforms));
        for (int j = 0; j < 16; ++j) total += sums[j];
        for (; i < end; ++i) total += std::exp(transformed(double(row[i]) - top, transforms));
    }
    return total;
}

}  // namespace drawing
