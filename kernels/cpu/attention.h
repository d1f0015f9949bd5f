// Attention of a step's queries over everything cached of their sequences.
//
// A sequence with one query takes decode.h's way, one with more prefill.h's. Both give a query the same bits, whatever
// runs beside it: keys are taken in tiles and tiles in parts, whose borders are multiples of a number of tokens from the
// sequence's beginning; products of codes are whole numbers, whose sums have no order; and all else is done number by
// number, by the same operations. Sources: Dao et al. 2022, arXiv 2205.14135; Dao et al. 2023, "Flash-Decoding for
// long-context inference", where parts are merged in the end.
#pragma once

#include "cache.h"
#include "softmax.h"
#include "words.h"

constexpr int TILE_PAGES = 8;             // Between two corrections of the softmax
constexpr int TILE = TILE_PAGES * PAGE;   // Keys
constexpr int PART_TILES = 8;             // Parts have sums of their own, so that threads can share a context.
constexpr int ROW = MOST_DIMS + 16;       // Numbers between rows of dimensions: no power of two, which would share cache sets
constexpr float COUNTS = 0x1p23f;         // So much counts a weight of 1 in a tile's total, a whole number.

// The keys that a query sees of a tile, as places in it.
struct Seen {
    int first, end;

    Seen(const Attention& a, int position, int tile)
        : first(std::max(0, a.first_seen(position) - tile * TILE)), end(std::min(TILE, position + 1 - tile * TILE)) {}
    bool is_all() const { return first == 0 && end == TILE; }
};

constexpr int BETWEEN = 16384;   // As words: a scale's share of a token's largest, and a factor's of the larger of its pair.
constexpr float TURN = 32752;    // So much counts a cosine of 1 as a word; two multiply to a little less than 2^15.
constexpr float TURNED = TURN * TURN * 0x1p-30f;  // By what turned words have become smaller, for cosines of page and place.
constexpr float MOST_KEY = 8200;  // Words of keys are no larger, roundings among it.

// How a query's numbers meet those of a key: of dims [dims] the first 2 * half are turned in pairs (i, i + half).
//
// Of codes they are words, two neighbours a step: those of the former halves of pairs, of the latter, and those that aren't
// turned. Of floats first the former of each pair, then those that aren't turned; then, with a sum of their own, the latter.
template <int FORMAT> struct Order {
    int dims, half;

    int pairs() const { return (half + 1) / 2; }  // Of neighbours.
    int steps() const { return FORMAT == F16 ? dims : 2 * pairs() + (dims - 2 * half + 1) / 2; }
    int second_sum() const { return dims - half; }  // Of floats.

    // Of a step of codes the first dimension; and the end of those that its second may be of.
    struct Dims { int first, end; };
    Dims of_step(int step) const {
        if (step < pairs()) return {2 * step, half};
        if (step < 2 * pairs()) return {half + 2 * (step - pairs()), 2 * half};
        return {2 * half + 2 * (step - 2 * pairs()), dims};
    }

    // query [dims], and of codes the factors [dims] that it takes from the keys, to `to`, `apart` numbers from one to the
    // next. Returns the exponent of a score of 1.
    float arrange(const float* query, const float* factors, float scale, int32_t* to, int apart) const {
        if constexpr (FORMAT == F16) {
            const auto put = [&](int step, float number) { memcpy(to + size_t(step) * apart, &number, 4); };
            for (int i = 0; i < half; ++i) put(i, query[i]), put(second_sum() + i, query[half + i]);
            for (int d = 2 * half; d < dims; ++d) put(d - half, query[d]);
            return scale / LN2;
        }
        alignas(64) float numbers[MOST_DIMS] = {};
        alignas(64) int16_t words[MOST_DIMS + 2] = {};
        for (int d = 0; d < 2 * half; ++d) numbers[d] = query[d] * (factors[d] * (1 / TURNED));
        for (int d = 2 * half; d < dims; ++d) numbers[d] = query[d] * factors[d];
        const float root = sqrtf(float(dims)), length = 0x1p31f / (MOST_KEY * root) - root;
        const float unit = to_words<ANY>(numbers, (dims + LANES - 1) / LANES * LANES, length, words) * (scale / LN2);
        if (half % 2 == 0 && apart == 1) memcpy(to, words, 4 * steps());
        for (int step = 0; step < steps() && (half % 2 || apart > 1); ++step) {
            const Dims d = of_step(step);
            const int second = d.first + 1 < d.end ? words[d.first + 1] : 0;
            to[size_t(step) * apart] = (words[d.first] & 0xffff) | int32_t(uint32_t(second) << 16);
        }
        return unit < LEAST_LENGTH ? LEAST_LENGTH : unit;  // Less would let the unseen count as much as others.
    }
};

// A score as the softmax has it, and the factor that makes an exponent of two of it.
INLINE Floats capped(const Attention& a, Floats score, Floats exponent) {
    return hyperbolic_tangent(score * exponent * (LN2 / a.softcap)) * (a.softcap / LN2);
}
INLINE Floats final_exponent(const Attention& a, Floats exponent) { return a.softcap ? all(1.0f) : exponent; }
