// Keys of a page, turned to their positions, as words or floats. The page's tokens are the lanes of vectors: no sum runs
// across lanes.
#pragma once

#include "attention.h"
#include "transpose.h"

// Cosines and sines [2][half][PAGE] of a page's places, from the page's own [2][half] and the places' [2][half][PAGE].
INLINE void turns_of_page(const float* page, const float* places, int half, float* turns) {
    for (int i = 0; i < half; ++i)
        for (int part = 0; part < PAGE; part += LANES) {
            const Floats cosine = load(places + i * PAGE + part), sine = load(places + (half + i) * PAGE + part);
            store(turns + i * PAGE + part, plus_product(cosine * page[i], sine, all(-page[half + i])));
            store(turns + (half + i) * PAGE + part, plus_product(sine * page[i], cosine, all(page[half + i])));
        }
}

// What the keys of one head have in common. A pair that is turned takes the larger of its factors from the query, and
// shares of it from here: so codes of all pairs count alike.
struct KeyHead {
    alignas(64) float shares[MOST_DIMS];
    alignas(64) float of_query[MOST_DIMS];
    float bounds[MOST_DIMS / GROUP];  // The squared length of a group of codes, times its shares, is no larger.

    KeyHead() = default;
    KeyHead(const Cache& c, int head, int half) {
        const float* const factor = c.key_factor + head * c.dims;
        const float most = c.format == Q8 ? 127 : 8;
        std::fill_n(bounds, MOST_DIMS / GROUP, 0.0f);
        for (int d = 0; d < c.dims; ++d) {
            const int other = d < half ? d + half : d < 2 * half ? d - half : d;
            of_query[d] = std::max(factor[d], factor[other]);
            shares[d] = factor[d] / of_query[d];
            bounds[d / GROUP] += most * most * shares[d] * shares[d];
        }
    }
};

// Lanes 0, 2, 4 ... or 1, 3, 5 ... of two vectors.
template <int FIRST> INLINE Floats each_second(Floats a, Floats b) {
    Ints lanes;
    for (int i = 0; i < LANES; ++i) lanes[i] = 2 * i + FIRST;
    return __builtin_shuffle(a, b, lanes);
}
// COUNT * PAGE numbers, each COUNT-th of the same row, to rows `step` floats apart; COUNT is a power of two.
template <int COUNT> INLINE void split_rows(const Floats* numbers, float* rows, int step) {
    constexpr int VECTORS = PAGE / LANES;
    if constexpr (COUNT == 1) {
        for (int i = 0; i < VECTORS; ++i) store(rows + i * LANES, numbers[i]);
    } else {
        Floats even[COUNT / 2 * VECTORS], odd[COUNT / 2 * VECTORS];
        for (int i = 0; i < COUNT / 2 * VECTORS; ++i) {
            even[i] = each_second<0>(numbers[2 * i], numbers[2 * i + 1]);
            odd[i] = each_second<1>(numbers[2 * i], numbers[2 * i + 1]);
        }
        split_rows<COUNT / 2>(even, rows, 2 * step);
        split_rows<COUNT / 2>(odd, rows + step, 2 * step);
    }
}
template <int COUNT> INLINE void split_scales(const f16* scales, float* rows, int step) {
    Floats numbers[COUNT * PAGE / LANES];
    for (int i = 0; i < COUNT * PAGE / LANES; ++i) numbers[i] = load(scales + i * LANES);
    split_rows<COUNT>(numbers, rows, step);
}
// Scales of a page's places [PAGE][groups] to rows [groups] of PAGE, `step` floats apart.
INLINE void read_scales(const f16* scales, int groups, float* rows, int step) {
    if (groups == 2) return split_scales<2>(scales, rows, step);  // Heads of 64 dimensions.
    if (groups == 4) return split_scales<4>(scales, rows, step);  // Heads of 128.
    if (groups == 8) return split_scales<8>(scales, rows, step);  // Heads of 256.
    for (int place = 0; place < PAGE; ++place)
        for (int g = 0; g < groups; ++g) rows[g * step + place] = to_float(scales[place * groups + g]);
}

// One head of a page's keys: codes in columns of four bytes, scales in rows.
template <int FORMAT> struct KeyPage {
    alignas(64) uint32_t columns[FORMAT == F16 ? MOST_DIMS / 2 : MOST_DIMS / 4][PAGE];
    alignas(64) float scales[MOST_DIMS / GROUP][PAGE];

    INLINE KeyPage(const Cache& c, int page, int head) {
        const size_t bytes = c.code_bytes();
        transpose(c.key_codes + c.token(page, head) * bytes, bytes, int(bytes), columns[0]);
        if constexpr (FORMAT != F16)
            read_scales(c.key_scales + c.token(page, head) * c.groups(), c.groups(), scales[0], PAGE);
    }

    // Codes of dimensions d .. d + 3, not scaled yet; d is a multiple of four.
    struct Four {
        Words words[FORMAT == F16 ? 2 : 1];
        INLINE Floats operator[](int i) const {
            if constexpr (FORMAT == F16)
                return of_f16(__builtin_convertvector(words[i / 2] >> (16 * (i % 2)), Halves));
            const int bits = FORMAT == Q8 ? 8 : 4;
            return __builtin_convertvector((Ints)(words[0] << (32 - bits - 8 * i)) >> (32 - bits), Floats);
        }
    };
    INLINE Four four(int d, int part) const {
        const auto column = [&](int i) { return load_as<Words>(columns[i] + part); };
        if constexpr (FORMAT == F16) return {{column(d / 2), column(d / 2 + 1)}};
        if constexpr (FORMAT == Q8) return {{column(d / 4)}};
        const Words packed = column(d / GROUP * 4 + d % 16 / 4) ^ 0x88888888;  // This makes signed numbers of four bits.
        return {{packed >> (d % GROUP < 16 ? 0 : 4)}};
    }
    INLINE Floats scale(int d, int part) const {
        return FORMAT == F16 ? all(1.0f) : load(scales[d / GROUP] + part);
    }

    // Steps of `order`, each of PAGE tokens, `apart` numbers from one to the next. Of codes they are words with a unit for
    // each token [PAGE], which is what its scales allow: how long a key is would take another look.
    INLINE void prepare(const Order<FORMAT>& order, const KeyHead& of, const float* turns, int32_t* out, int apart,
                        float* units) const {
        const int half = order.half, dims = order.dims;
        for (int part = 0; part < PAGE; part += LANES) {
            Floats inverse = {};
            if constexpr (FORMAT != F16) {
                Floats squared = {};
                for (int g = 0; g * GROUP < dims; ++g) {
                    const Floats own = load(scales[g] + part);
                    squared = plus_product(squared, own * own, all(of.bounds[g]));
                }
                const Floats length = root(squared);
                const Ints is_usual = (length >= LEAST_LENGTH) & (length <= MOST_LENGTH);
                inverse = is_usual ? SHORTER / length : Floats{};
                store(units + part, is_usual ? length * (1 / SHORTER) : length < 1.0f ? Floats{} : all(NAN));
            }
            Floats scaled[MOST_DIMS / GROUP];
            for (int g = 0; FORMAT != F16 && g * GROUP < dims; ++g) scaled[g] = load(scales[g] + part) * inverse;
            const auto number = [&](Floats code, int d) __attribute__((always_inline)) {
                return FORMAT == F16 ? code : code * of.shares[d] * scaled[d / GROUP];
            };
            const auto put = [&](int step, auto value) __attribute__((always_inline)) {
                memcpy(out + size_t(step) * apart + part, &value, sizeof value);
            };
            const auto pair = [&](Floats x, Floats y, int i) __attribute__((always_inline)) {
                const Floats cosine = load(turns + i * PAGE + part), sine = load(turns + (half + i) * PAGE + part);
                const Floats first = plus_product(x * cosine, y, -sine), second = plus_product(y * cosine, x, sine);
                if constexpr (FORMAT == F16) put(i, first), put(order.second_sum() + i, second);
                else put(i, paired_words(rounded(first), rounded(second)));
            };
            const auto one = [&](int d) __attribute__((always_inline)) {
                return number(four(d & ~3, part)[d % 4], d);
            };
            int i = 0;
            for (; half % 4 == 0 && i < half; i += 4) {
                const Four x = four(i, part), y = four(i + half, part);
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) pair(number(x[j], i + j), number(y[j], i + half + j), i + j);
            }
            for (; i < half; ++i) pair(one(i), one(i + half), i);
            for (int d = 2 * half, step = half; d < dims; ++step) {
                if constexpr (FORMAT == F16) {
                    put(step, one(d++));
                } else {
                    const Floats first = one(d), second = d + 1 < dims ? one(d + 1) : Floats{};
                    put(step, paired_words(rounded(first), rounded(second)));
                    d += 2;
                }
            }
        }
    }
};

// Scores of HEADS queries, `steps` numbers each, with a page's keys [steps][PAGE]: [HEADS][TILE].
template <int FORMAT, int HEADS>
INLINE void score_page(const Order<FORMAT>& order, const int32_t* keys, const float* units, const int32_t* queries,
                       int query_stride, float* scores) {
    const int steps = order.steps();
    for (int part = 0; part < PAGE; part += LANES) {
        Floats found[HEADS];
        if constexpr (FORMAT == F16) {
            const auto sums = [&](int begin, int end, Floats(&acc)[HEADS]) __attribute__((always_inline)) {
                for (int step = begin; step < end; ++step) {
                    const Floats key = load_as<Floats>(keys + step * PAGE + part);
#pragma GCC unroll 8
                    for (int g = 0; g < HEADS; ++g)
                        acc[g] = plus_product(acc[g], key, all(load_as<float>(queries + g * query_stride + step)));
                }
            };
            Floats first[HEADS] = {}, second[HEADS] = {};
            sums(0, order.second_sum(), first);
            sums(order.second_sum(), steps, second);
            for (int g = 0; g < HEADS; ++g) found[g] = first[g] + second[g];
        } else {
            Ints acc[HEADS] = {};
            for (int step = 0; step < steps; ++step) {
                const Ints key = load_as<Ints>(keys + step * PAGE + part);
#pragma GCC unroll 8
                for (int g = 0; g < HEADS; ++g)
                    acc[g] = plus_pairs(acc[g], key, all(queries[g * query_stride + step]));
            }
            for (int g = 0; g < HEADS; ++g) found[g] = __builtin_convertvector(acc[g], Floats) * load(units + part);
        }
        for (int g = 0; g < HEADS; ++g) store(scores + g * TILE + part, found[g]);
    }
}
