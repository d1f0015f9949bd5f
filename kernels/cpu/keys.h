// Keys of a page, turned to their positions, as words or floats. The page's tokens are the lanes of vectors: no sum runs
// across lanes.
#pragma once

#include <memory>

#include "attention.h"
#include "transpose.h"

// Cosines and sines of a page's places: of floats [2][half][PAGE], of codes pairs of words [2][pairs][PAGE].
template <int FORMAT> struct Turns {
    Order<FORMAT> order;
    alignas(64) int32_t places[MOST_DIMS][PAGE], of_page[MOST_DIMS][PAGE];

    // angles [2][half] to words [2][2 * pairs].
    INLINE void to_words(const float* angles, int16_t* words) const {
        const int half = order.half, row = 2 * order.pairs();
        for (int part = 0; part < 2; ++part, angles += half, words += row) {
            int i = 0;
            for (; i + LANES <= half; i += LANES) store_words(words + i, rounded(load(angles + i) * TURN));
            for (; i < half; ++i) words[i] = int16_t(nearest(angles[i] * TURN));
        }
    }
    // angles [PAGE][2][half], of the places of any page.
    void start(const float* angles) {
        const int bytes = 8 * (FORMAT == F16 ? order.half : order.pairs());
        if constexpr (FORMAT == F16) return transpose((const uint8_t*)angles, bytes, bytes, (uint32_t*)places[0]);
        int16_t words[PAGE * (MOST_DIMS + 4)] = {};
        for (int place = 0; place < PAGE; ++place) to_words(angles + place * 2 * order.half, words + place * bytes / 2);
        transpose((const uint8_t*)words, bytes, bytes, (uint32_t*)places[0]);
    }
    // angles [2][half] of a page, for its places.
    INLINE void turn(const float* angles) {
        if constexpr (FORMAT == F16) {
            const int half = order.half;
            for (int i = 0; i < half; ++i)
                for (int part = 0; part < PAGE; part += LANES) {
                    const Floats cosine = load_as<Floats>(places[i] + part), sine = load_as<Floats>(places[half + i] + part);
                    store((float*)of_page[i] + part, plus_product(cosine * angles[i], sine, all(-angles[half + i])));
                    store((float*)of_page[half + i] + part, plus_product(sine * angles[i], cosine, all(angles[half + i])));
                }
        } else {
            const int pairs = order.pairs();
            int16_t words[MOST_DIMS + 4];
            words[order.half] = words[2 * pairs + order.half] = 0;  // What makes up a last pair.
            to_words(angles, words);
            for (int i = 0; i < pairs; ++i) {
                const Ints c = all(load_as<int32_t>(words + 2 * i)), s = all(load_as<int32_t>(words + 2 * (pairs + i)));
                for (int part = 0; part < PAGE; part += LANES) {
                    const Ints cosine = load_as<Ints>(places[i] + part), sine = load_as<Ints>(places[pairs + i] + part);
                    const Ints both[2] = {word_difference(upper_products(cosine, c), upper_products(sine, s)),
                                          word_sum(upper_products(sine, c), upper_products(cosine, s))};
                    memcpy(of_page[i] + part, &both[0], sizeof both[0]);
                    memcpy(of_page[pairs + i] + part, &both[1], sizeof both[1]);
                }
            }
        }
    }
};

// One a thread. Not in a thread's own memory itself, whose place is asked for again and again.
template <int FORMAT> INLINE Turns<FORMAT>& kept_turns() {
    static thread_local const auto turns = std::make_unique<Turns<FORMAT>>();
    return *turns;
}

// What the keys of one head have in common. A pair that is turned takes the larger of its factors from the query, and
// shares of it from here: so codes of all pairs count alike.
struct KeyHead {
    alignas(64) float of_query[MOST_DIMS];
    alignas(64) int16_t shares[MOST_DIMS + 4] = {};  // BETWEEN is all of it.

    KeyHead() = default;
    KeyHead(const Cache& c, int head, int half) {
        const float* const factor = c.key_factor + head * c.dims;
        alignas(64) float own[MOST_DIMS], other[MOST_DIMS];
        std::fill(std::copy_n(factor, c.dims, own), own + MOST_DIMS, 1.0f);
        std::copy_n(own + half, half, other);
        std::copy_n(own, half, other + half);
        std::copy(own + 2 * half, own + MOST_DIMS, other + 2 * half);
        for (int d = 0; d < c.dims; d += LANES) {
            const Floats most = larger(load(own + d), load(other + d));
            store(of_query + d, most);
            store_words(shares + d, rounded(load(own + d) / most * float(BETWEEN)));
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

    INLINE Words column(size_t i, int part) const { return load_as<Words>(columns[i] + part); }
    // Of float16: number d, a multiple of two or the one after it.
    INLINE Floats half_at(int d, int part) const {
        return of_f16(__builtin_convertvector(column(d / 2, part) >> (16 * (d % 2)), Halves));
    }
    // Codes of dimensions d .. d + 3 as the upper bits of bytes; d is a multiple of four.
    INLINE Ints four(size_t d, int part) const {
        if constexpr (FORMAT == Q8) return (Ints)column(d / 4, part);
        const Words packed = column(d / GROUP * 4 + d % 16 / 4, part) ^ 0x88888888;  // This makes signed numbers of four bits.
        return (Ints)((d % GROUP < 16 ? packed << 4 : packed) & 0xf0f0f0f0);
    }

    // Calls put(sum, step, numbers) for each step of `order`, of LANES tokens from `part`; sum, a constant, is which of two
    // sums it belongs to. Returns the tokens' units: of codes as words, the largest of which may be 2^13.
    template <class Put>
    INLINE Floats walk(const Order<FORMAT>& order, const KeyHead& of, const Turns<FORMAT>& turns, int part, Put&& put) const {
        if constexpr (FORMAT == F16) return walk_floats(order, turns, part, put), all(1.0f);
        else return walk_words(order, of, turns, part, put);
    }
    // The same written down: `apart` numbers from one step to the next, and units [PAGE].
    INLINE void prepare(const Order<FORMAT>& order, const KeyHead& of, const Turns<FORMAT>& turns, int32_t* out, int apart,
                        float* units) const {
        for (int part = 0; part < PAGE; part += LANES) {
            const auto put = [&](auto, size_t step, auto numbers) __attribute__((always_inline)) {
                memcpy(out + step * apart + part, &numbers, sizeof numbers);
            };
            store(units + part, walk(order, of, turns, part, put));
        }
    }

  private:
    static constexpr std::integral_constant<int, 0> former = {};
    static constexpr std::integral_constant<int, 1> latter = {};

    template <class Put>
    INLINE void walk_floats(const Order<FORMAT>& order, const Turns<FORMAT>& turns, int part, Put&& put) const {
        for (int i = 0; i < order.half; ++i) {
            const Floats x = half_at(i, part), y = half_at(i + order.half, part);
            const Floats cosine = load_as<Floats>(turns.of_page[i] + part);
            const Floats sine = load_as<Floats>(turns.of_page[order.half + i] + part);
            put(former, i, plus_product(x * cosine, y, -sine));
            put(latter, order.second_sum() + i, plus_product(y * cosine, x, sine));
        }
        for (int d = 2 * order.half; d < order.dims; ++d) put(former, d - order.half, half_at(d, part));
    }

    template <class Put>
    INLINE Floats walk_words(const Order<FORMAT>& order, const KeyHead& of, const Turns<FORMAT>& turns, int part,
                             Put&& put) const {
        const size_t half = order.half, dims = order.dims, pairs = order.pairs();
        Ints most = {}, scaled[MOST_DIMS / GROUP];  // Magnitudes are ordered as floats are, infinity and NaN last.
        for (size_t g = 0; g * GROUP < dims; ++g) {
            const Ints magnitude = load_as<Ints>(scales[g] + part) & 0x7fffffff;
            most = magnitude > most ? magnitude : most;
        }
        const Ints is_usual = (most > 0) & (most < 0x7f800000);
        const Floats inverse = is_usual ? BETWEEN / (Floats)most : Floats{};
        for (size_t g = 0; g * GROUP < dims; ++g) {
            const Ints share = rounded(load(scales[g] + part) * inverse);
            scaled[g] = paired_words(share, share);
        }
        const auto turn = [&](Ints x, Ints y, size_t i) __attribute__((always_inline)) {
            const Ints cosine = load_as<Ints>(turns.of_page[i] + part), sine = load_as<Ints>(turns.of_page[pairs + i] + part);
            put(former, i, word_difference(upper_products(x, cosine), upper_products(y, sine)));
            put(latter, pairs + i, word_sum(upper_products(y, cosine), upper_products(x, sine)));
        };
        const auto two = [&](Ints bytes, size_t d, auto which) __attribute__((always_inline)) {
            const Ints codes = upper_products(upper_bytes<which.value>(bytes), scaled[d / GROUP]);
            return upper_products(codes, all(load_as<int32_t>(of.shares + d + 2 * which.value)));
        };
        if (half % 4 == 0) {
            for (size_t i = 0; i < half; i += 4) {
                const Ints x = four(i, part), y = four(i + half, part);
                turn(two(x, i, former), two(y, i + half, former), i / 2);
                turn(two(x, i, latter), two(y, i + half, latter), i / 2 + 1);
            }
            for (size_t d = 2 * half; d < dims; d += 4) {
                const Ints x = four(d, part);
                put(former, d / 2, two(x, d, former));
                if (d + 2 < dims) put(latter, d / 2 + 1, two(x, d, latter));
            }
        } else {
            const auto one = [&](int d) __attribute__((always_inline)) {  // As the upper word.
                const Ints code = four(d & ~3, part) << (24 - 8 * (d % 4)) & int32_t(0xff000000);
                return upper_products(upper_products(code, scaled[d / GROUP]), all(int(of.shares[d]) << 16));
            };
            const auto of_step = [&](int step) __attribute__((always_inline)) {
                const auto d = order.of_step(step);
                const Ints first = (Ints)((Words)one(d.first) >> 16);
                return d.first + 1 < d.end ? first | one(d.first + 1) & int32_t(0xffff0000) : first;
            };
            for (int i = 0; i < pairs; ++i) turn(of_step(i), of_step(pairs + i), i);
            for (int step = 2 * pairs; step < order.steps(); ++step) put(former, step, of_step(step));
        }
        return most < 0x7f800000 ? (Floats)most * (FORMAT == Q8 ? 0x1p-6f : 0x1p-10f) : all(NAN);
    }
};

// Scores of HEADS queries [HEADS][MOST_DIMS], ordered as the keys' steps are: [HEADS][TILE]. Starts the reading of what is
// `ahead` meanwhile, as many bytes as the page's keys have.
template <int FORMAT, int HEADS>
INLINE void score_page(const KeyPage<FORMAT>& page, const Order<FORMAT>& order, const KeyHead& of, const Turns<FORMAT>& turns,
                       const int32_t* queries, const uint8_t* ahead, float* units, float* scores) {
    const uint8_t* const end = ahead + PAGE * order.dims * (FORMAT == F16 ? 4 : FORMAT == Q8 ? 2 : 1) / 2;
    for (int part = 0; part < PAGE; part += LANES) {
        std::conditional_t<FORMAT == F16, Floats, Ints> acc[2][HEADS] = {};
        const auto add = [&](auto sum, size_t step, auto key) __attribute__((always_inline)) {
            if (sum.value == 0 && ahead < end) {
                __builtin_prefetch(ahead, 0, 2);
                ahead += FORMAT == Q4 ? 32 : 64;
            }
            const int32_t* const numbers = queries + step;
#pragma GCC unroll 8
            for (int g = 0; g < HEADS; ++g)
                if constexpr (FORMAT == F16)
                    acc[sum.value][g] = plus_product(acc[sum.value][g], key, all(load_as<float>(numbers + g * MOST_DIMS)));
                else acc[sum.value][g] = plus_pairs(acc[sum.value][g], key, all(numbers[g * MOST_DIMS]));
        };
        const Floats unit = page.walk(order, of, turns, part, add);
        store(units + part, unit);
#pragma GCC unroll 8
        for (int g = 0; g < HEADS; ++g) {
            const auto sum = acc[0][g] + acc[1][g];
            if constexpr (FORMAT == F16) store(scores + g * TILE + part, sum);
            else store(scores + g * TILE + part, __builtin_convertvector(sum, Floats) * unit);
        }
    }
}
