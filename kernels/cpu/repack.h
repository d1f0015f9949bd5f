// Packed weights as files have them, laid out anew for the kernels: QuantizedMatrix and Nf4Matrix in
// kernels/forms/quantized.py say how. Each thread has panels of some tiles, and goes down the rows of a file's matrix with
// all tiles of a panel at once, so that what it reads of a row is in one piece.
#pragma once

#include <algorithm>

#include "large_pages.h"
#include "pool.h"
#include "structs.h"
#include "transpose.h"

namespace repack {

constexpr int TILE = 16, LINE = 64, MOST_ROWS = 32;  // outputs of a tile, bytes of a line, rows of a block
constexpr int PANEL = 16;                            // tiles
static_assert(TILE == PAGE, "what is transposed has as many rows");

typedef uint32_t Lanes __attribute__((vector_size(LINE)));  // one number for each output of a tile

// Words [W, stride] with a stream of codes down each column; `starts` [R]: the bit of a column at which the code of a
// stored row begins, -1 for a row that fills up.
struct Columns {
    const uint32_t* words;
    int64_t stride;
    const int64_t* starts;
    int32_t outputs;

    INLINE void codes(int row, int tile, int bits, Lanes& out) const {
        const int64_t start = starts[row];
        out = Lanes{};
        if (start < 0) return;
        const uint32_t* from = words + (start >> 5) * stride + tile * TILE;
        const int bit = start & 31;
        out = lanes(from, tile) >> bit;
        if (bit + bits > 32) out |= lanes(from + stride, tile) << (32 - bit);
    }

  private:
    INLINE Lanes lanes(const uint32_t* from, int tile) const {
        Lanes v = {};
        const int count = outputs - tile * TILE;
        if (count >= TILE) memcpy(&v, from, sizeof v);
        else memcpy(&v, from, 4 * count);
        return v;
    }
};

template <int BITS> struct Form;  // Rows of a block, and the widths of its planes from the low bits up.
template <> struct Form<2> { static constexpr int rows = 16, low = 2, high = 0; };
template <> struct Form<3> { static constexpr int rows = 32, low = 2, high = 1; };
template <> struct Form<4> { static constexpr int rows = 8, low = 4, high = 0; };
template <> struct Form<5> { static constexpr int rows = 32, low = 4, high = 1; };
template <> struct Form<6> { static constexpr int rows = 16, low = 4, high = 2; };
template <> struct Form<8> { static constexpr int rows = 8, low = 8, high = 0; };

// The lines of one plane: bits shift .. shift + WIDTH - 1 of a block's codes.
template <int WIDTH, int ROWS> INLINE uint8_t* plane(const Lanes* codes, int shift, uint8_t* out) {
    constexpr int fields = 8 / WIDTH, each = 4 * fields;  // of a byte; rows of a line
    for (int row = 0; row < ROWS; row += each, out += LINE) {
        Lanes line = {};
        for (int field = 0; field < fields; ++field)
            for (int byte = 0; byte < 4; ++byte)
                line |= ((codes[row + 4 * field + byte] >> shift) & ((1u << WIDTH) - 1)) << (8 * byte + WIDTH * field);
        memcpy(out, &line, LINE);
    }
    return out;
}

template <int BITS, class Source>
INLINE void blocks(const Source& source, int begin, int end, int first_tile, int end_tile, uint8_t* out, int64_t tile_bytes) {
    typedef Form<BITS> F;
    Lanes codes[MOST_ROWS];
    for (int row = begin; row < end; row += F::rows, out += F::rows * BITS * TILE / 8)
        for (int tile = first_tile; tile < end_tile; ++tile) {
            for (int i = 0; i < F::rows; ++i) source.codes(row + i, tile, BITS, codes[i]);
            uint8_t* to = plane<F::low, F::rows>(codes, 0, out + tile * tile_bytes);
            if constexpr (F::high != 0) plane<F::high, F::rows>(codes, F::low, to);
        }
}

// Neighbouring groups of one width are a run. starts [runs + 1]: their first stored rows; bits [runs].
struct Runs {
    const int32_t *starts, *bits;
    int32_t count;
};

// out [C, tile_bytes] of the codes of all stored rows; false for a width that is not known.
template <class Source> bool pack(const Source& source, const Runs& runs, uint8_t* out) {
    int64_t tile_bytes = 0;
    for (int i = 0; i < runs.count; ++i) tile_bytes += int64_t(runs.starts[i + 1] - runs.starts[i]) * runs.bits[i] * TILE / 8;
    const int tiles = (source.outputs + TILE - 1) / TILE;
    const int panel = std::max(1, std::min(PANEL, tiles / (2 * pool().threads())));
    std::atomic<bool> is_known{true};
    large_pages(out, tiles * tile_bytes);
    pool().run((tiles + panel - 1) / panel, [&](int task) {
        const int first = task * panel, last = std::min(tiles, first + panel);
        uint8_t* at = out;
        for (int i = 0; i < runs.count; ++i) {
            const int begin = runs.starts[i], end = runs.starts[i + 1];
            switch (runs.bits[i]) {
                case 2: blocks<2>(source, begin, end, first, last, at, tile_bytes); break;
                case 3: blocks<3>(source, begin, end, first, last, at, tile_bytes); break;
                case 4: blocks<4>(source, begin, end, first, last, at, tile_bytes); break;
                case 5: blocks<5>(source, begin, end, first, last, at, tile_bytes); break;
                case 6: blocks<6>(source, begin, end, first, last, at, tile_bytes); break;
                case 8: blocks<8>(source, begin, end, first, last, at, tile_bytes); break;
                default: is_known = false;
            }
            at += int64_t(end - begin) * runs.bits[i] * TILE / 8;
        }
    });
    return is_known;
}

template <int SHIFT> INLINE void swap_fields(Lanes& low, Lanes& high, uint32_t mask) {
    const Lanes changed = ((low >> SHIFT) ^ high) & mask;
    high ^= changed;
    low ^= changed << SHIFT;
}

// Each of eight registers' words has eight nibbles: afterwards nibble j of register i is what nibble i of register j was.
INLINE void transpose_nibbles(Lanes* r) {
    for (int i = 0; i < 4; ++i) swap_fields<16>(r[i], r[i + 4], 0x0000ffff);
    for (int i = 0; i < 8; i += 4)
        for (int j = i; j < i + 2; ++j) swap_fields<8>(r[j], r[j + 2], 0x00ff00ff);
    for (int i = 0; i < 8; i += 2) swap_fields<4>(r[i], r[i + 1], 0x0f0f0f0f);
}

// out [C, stored * 8] of words [K, stride], each of eight outputs of four bits, of which output i is nibble nibble_of[i].
// `source` [stored]: the row of words of a stored row, -1 for one that fills up; null: its own. A block's line has, from
// the lowest nibble up, rows 0, 4, 1, 5, 2, 6, 3, 7.
inline void pack_nibbles(const uint32_t* words, int64_t stride, const int32_t* source, const int32_t* nibble_of, int stored,
                         int outputs, uint8_t* out) {
    constexpr int WORDS = 16, ROWS = 8, AHEAD = 64;  // side by side, of a block, and how far ahead memory is asked for
    static constexpr int row_of[ROWS] = {0, 4, 1, 5, 2, 6, 3, 7};
    const int count = outputs / 8, tiles = (outputs + TILE - 1) / TILE;
    const int64_t tile_bytes = int64_t(stored) * TILE / 2;
    large_pages(out, tiles * tile_bytes);
    pool().run((count + WORDS - 1) / WORDS, [&](int task) {
        const int first = task * WORDS, some = std::min(WORDS, count - first);
        uint8_t* to = out + int64_t(task) * (WORDS / 2) * tile_bytes;
        for (int block = 0; block < stored; block += ROWS, to += LINE) {
            Lanes r[ROWS] = {};
            for (int i = 0; i < ROWS; ++i) {
                const int row = source ? source[block + row_of[i]] : block + row_of[i];
                if (row < 0) continue;
                const uint32_t* from = words + row * stride + first;
                __builtin_prefetch(from + AHEAD * stride);  // Beyond the end it does nothing.
                if (some == WORDS) memcpy(&r[i], from, sizeof(Lanes));
                else memcpy(&r[i], from, 4 * some);
            }
            transpose_nibbles(r);
            uint32_t by_word[WORDS][8];
            for (int i = 0; i < 8; ++i)
                for (int w = 0; w < WORDS; ++w) by_word[w][i] = r[nibble_of[i]][w];
            for (int w = 0; w < (some + 1) / 2 * 2; ++w)
                memcpy(to + (w / 2) * tile_bytes + (w & 1) * (LINE / 2), by_word[w], LINE / 2);
        }
    });
}

// out [C, G, 16]: for group g and output n the `bits` bits from bit starts[n] on of row g of words [G, stride], and
// `more`; 0 after the last output.
template <class Out>
void unpack_rows(const uint32_t* words, int64_t stride, const int32_t* starts, int bits, int more, int groups, int outputs,
                 Out* out) {
    const int tiles = (outputs + TILE - 1) / TILE;
    const uint32_t mask = (1u << bits) - 1;
    pool().run(tiles, [&](int tile) {
        Out* to = out + int64_t(tile) * groups * TILE;
        const int count = std::min(TILE, outputs - tile * TILE);
        for (int g = 0; g < groups; ++g, to += TILE)
            for (int i = 0; i < TILE; ++i) {
                if (i >= count) { to[i] = 0; continue; }
                const int start = starts[tile * TILE + i], bit = start & 31;
                const uint32_t* from = words + g * stride + (start >> 5);
                uint32_t code = from[0] >> bit;
                if (bit + bits > 32) code |= from[1] << (32 - bit);
                to[i] = Out((code & mask) + more);
            }
    });
}

// The halves of each byte swapped.
INLINE uint32_t swapped_pairs(uint32_t word) { return ((word >> 4) & 0x0f0f0f0f) | ((word & 0x0f0f0f0f) << 4); }

// Codes of four bits along rows of K, two in a byte, the first in the high half, as they are in bytes [N * K / 2]; and
// the scale of each run of `run` of them, which is that of its block of `blocksize`: to an Nf4Matrix's [C, K / 8, 16] and
// [C, K / run, 16]. K and run are multiples of 8.
inline void nf4(const uint8_t* bytes, const float* block_scales, int64_t blocksize, int64_t run, int inputs, int outputs,
                uint32_t* codes, float* scales) {
    const int tiles = (outputs + TILE - 1) / TILE, eights = inputs / 8, runs = inputs / run;
    large_pages(codes, 4l * tiles * eights * TILE);
    large_pages(scales, 4l * tiles * runs * TILE);
    pool().run(tiles, [&](int tile) {
        uint32_t* to = codes + int64_t(tile) * eights * TILE;
        float* scale_to = scales + int64_t(tile) * runs * TILE;
        const int64_t row = int64_t(tile) * TILE;
        if (run == blocksize && row + TILE <= outputs) {
            constexpr int PIECE = 16;  // words of a row; what was transposed is then still at hand
            for (int e = 0; e < eights; e += PIECE) {
                const int some = std::min(PIECE, eights - e);
                transpose(bytes + row * inputs / 2 + 4 * e, inputs / 2, 4 * some, to + e * TILE);
                for (int i = e * TILE; i < (e + some) * TILE; ++i) to[i] = swapped_pairs(to[i]);
            }
            transpose((const uint8_t*)(block_scales + row * runs), 4 * runs, 4 * runs, (uint32_t*)scale_to);
            return;
        }
        for (int lane = 0; lane < TILE; ++lane) {
            const int64_t n = int64_t(tile) * TILE + lane, first = n * inputs;
            if (n >= outputs) {
                for (int e = 0; e < eights; ++e) to[e * TILE + lane] = 0;
                for (int r = 0; r < runs; ++r) scale_to[r * TILE + lane] = 0;
                continue;
            }
            for (int e = 0; e < eights; ++e) {
                uint32_t word;
                memcpy(&word, bytes + first / 2 + 4 * e, 4);
                to[e * TILE + lane] = swapped_pairs(word);
            }
            for (int r = 0; r < runs; ++r) scale_to[r * TILE + lane] = block_scales[(first + r * run) / blocksize];
        }
    });
}

// Copies `count` numbers, whose bits other than the sign's are an infinity or a NaN's from `infinite` on; whether none is.
template <class Bits> bool copy_finite(const Bits* from, int64_t count, Bits infinite, Bits* to) {
    constexpr int64_t PIECE = (1 << 20) / sizeof(Bits);
    constexpr Bits magnitude = Bits(~Bits(0)) >> 1;
    std::atomic<bool> are_finite{true};
    large_pages(to, count * sizeof(Bits));
    pool().run(int((count + PIECE - 1) / PIECE), [&](int task) {
        const int64_t begin = task * PIECE, end = std::min(count, begin + PIECE);
        Bits largest = 0;
        for (int64_t i = begin; i < end; ++i) {
            const Bits bits = from[i], size = bits & magnitude;
            largest = size > largest ? size : largest;
            to[i] = bits;
        }
        if (largest >= infinite) are_finite = false;
    });
    return are_finite;
}

}  // namespace repack
