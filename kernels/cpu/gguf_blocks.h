// Blocks of GGUF files to matrices of integer codes (backends/quant/gguf.py tells how a type's bytes lie), 16 outputs at a
// time straight from the file's pages, with all threads.
#pragma once

#include <algorithm>

#include "large_pages.h"
#include "pool.h"
#include "quantized_lines.h"

namespace gguf {

using quantized::LINE;
using quantized::OUTPUTS;

// Where a matrix's tensors are; null where its type has none. See QuantizedMatrix.
struct Packed {
    uint8_t *codes, *scales, *scale_codes, *mins;
};

// One output's block: codes, and bytes of what its groups share.
struct Block {
    uint8_t codes[256], scale[2], min[2], scale_codes[16];
};

// Each `run` bytes hold the lowest WIDTH bits of as many codes, then the next ones: to code |= these << SHIFT.
template <int WIDTH, int SHIFT = 0> INLINE void runs(const uint8_t* raw, int bytes, int run, uint8_t* codes) {
    for (int at = 0; at < bytes; at += run)
        for (int field = 0; field < 8 / WIDTH; ++field, codes += run)
            for (int i = 0; i < run; ++i)
                codes[i] = (SHIFT ? codes[i] : 0) | (raw[at + i] >> (WIDTH * field) & ((1 << WIDTH) - 1)) << SHIFT;
}
template <int SHIFT> INLINE void bits32(const uint8_t* raw, uint8_t* codes) {
    for (int i = 0; i < 32; ++i) codes[i] |= (raw[i / 8] >> (i % 8) & 1) << SHIFT;
}
INLINE void negative(const uint8_t* raw, uint8_t* number) {
    number[0] = raw[0];
    number[1] = raw[1] ^ 0x80;
}

// Values and bytes of a block, bits of a code, bytes of scale codes, and whether there are mins.
template <int V, int B, int CODE, int SCALE_CODES = 0, bool MINS = false> struct Form {
    static constexpr int VALUES = V, BYTES = B, BITS = CODE, SCALES = SCALE_CODES;
    static constexpr bool HAS_MINS = MINS;
};

struct Q4_0 : Form<32, 18, 4> {
    INLINE static void take(const uint8_t* raw, Block& b) {
        memcpy(b.scale, raw, 2);
        runs<4>(raw + 2, 16, 16, b.codes);
    }
};
struct Q4_1 : Form<32, 20, 4, 0, true> {
    INLINE static void take(const uint8_t* raw, Block& b) {
        memcpy(b.scale, raw, 2);
        memcpy(b.min, raw + 2, 2);
        runs<4>(raw + 4, 16, 16, b.codes);
    }
};
struct Q5_0 : Form<32, 22, 5> {
    INLINE static void take(const uint8_t* raw, Block& b) {
        memcpy(b.scale, raw, 2);
        runs<4>(raw + 6, 16, 16, b.codes);
        bits32<4>(raw + 2, b.codes);
    }
};
struct Q5_1 : Form<32, 24, 5, 0, true> {
    INLINE static void take(const uint8_t* raw, Block& b) {
        memcpy(b.scale, raw, 2);
        memcpy(b.min, raw + 2, 2);
        runs<4>(raw + 8, 16, 16, b.codes);
        bits32<4>(raw + 4, b.codes);
    }
};
struct Q8_0 : Form<32, 34, 8> {
    INLINE static void take(const uint8_t* raw, Block& b) {
        memcpy(b.scale, raw, 2);
        for (int i = 0; i < 32; ++i) b.codes[i] = raw[2 + i] ^ 128;
    }
};
struct Q2_K : Form<256, 84, 2, 16, true> {
    INLINE static void take(const uint8_t* raw, Block& b) {
        memcpy(b.scale_codes, raw, 16);
        runs<2>(raw + 16, 64, 32, b.codes);
        memcpy(b.scale, raw + 80, 2);
        negative(raw + 82, b.min);
    }
};
struct Q3_K : Form<256, 110, 3, 12> {
    INLINE static void take(const uint8_t* raw, Block& b) {
        runs<2>(raw + 32, 64, 32, b.codes);
        runs<1, 2>(raw, 32, 32, b.codes);
        memcpy(b.scale_codes, raw + 96, 12);
        memcpy(b.scale, raw + 108, 2);
    }
};
struct Q4_K : Form<256, 144, 4, 12, true> {
    INLINE static void take(const uint8_t* raw, Block& b) {
        memcpy(b.scale, raw, 2);
        negative(raw + 2, b.min);
        memcpy(b.scale_codes, raw + 4, 12);
        runs<4>(raw + 16, 128, 32, b.codes);
    }
};
struct Q5_K : Form<256, 176, 5, 12, true> {
    INLINE static void take(const uint8_t* raw, Block& b) {
        memcpy(b.scale, raw, 2);
        negative(raw + 2, b.min);
        memcpy(b.scale_codes, raw + 4, 12);
        runs<4>(raw + 48, 128, 32, b.codes);
        runs<1, 4>(raw + 16, 32, 32, b.codes);
    }
};
struct Q6_K : Form<256, 210, 6, 16> {
    INLINE static void take(const uint8_t* raw, Block& b) {
        runs<4>(raw, 128, 64, b.codes);
        runs<2, 4>(raw + 128, 64, 32, b.codes);
        memcpy(b.scale_codes, raw + 192, 16);
        memcpy(b.scale, raw + 208, 2);
    }
};
struct IQ4_XS : Form<256, 136, 4, 8> {
    INLINE static void take(const uint8_t* raw, Block& b) {
        memcpy(b.scale, raw, 2);
        for (int i = 0; i < 8; ++i) {
            const int low = raw[4 + i / 2] >> (4 * (i % 2)) & 15, high = raw[2 + i / 4] >> (2 * (i % 4)) & 3;
            b.scale_codes[i] = uint8_t((low | high << 4) - 32);
        }
        runs<4>(raw + 8, 128, 16, b.codes);
    }
};

// Lines of one plane: WIDTH bits of codes, from bit SHIFT on, of rows begin .. begin + rows.
template <int SHIFT, int WIDTH> INLINE void write_plane(const Block* blocks, int begin, int rows, uint8_t*& to) {
    constexpr uint32_t MASK = 0x01010101u * ((1 << WIDTH) - 1);
    for (int row = begin; row < begin + rows; row += 32 / WIDTH, to += LINE)
        for (int n = 0; n < OUTPUTS; ++n) {
            uint32_t word = 0;
            for (int i = 0; i < 8 / WIDTH; ++i) {
                uint32_t four;
                memcpy(&four, blocks[n].codes + row + 4 * i, 4);
                word |= (four >> SHIFT & MASK) << (WIDTH * i);
            }
            memcpy(to + 4 * n, &word, 4);
        }
}

template <int BITS> INLINE void write_codes(const Block* blocks, int values, uint8_t* to) {
    constexpr int ROWS = quantized::BLOCK_ROWS<BITS>, LOW = BITS == 3 ? 2 : BITS == 5 || BITS == 6 ? 4 : BITS;
    for (int begin = 0; begin < values; begin += ROWS) {
        write_plane<0, LOW>(blocks, begin, ROWS, to);
        if constexpr (BITS > LOW) write_plane<LOW, BITS - LOW>(blocks, begin, ROWS, to);
    }
}

// `count` pieces of `size` bytes of each output, side by side: piece i of output n is at to[(i * 16 + n) * size].
INLINE void spread(const Block* blocks, const uint8_t* of_first, int count, int size, uint8_t* to) {
    for (int n = 0; n < OUTPUTS; ++n)
        for (int i = 0; i < count; ++i)
            memcpy(to + (i * OUTPUTS + n) * size, of_first + n * sizeof(Block) + i * size, size);
}

template <class Type> static void pack_tile(const uint8_t* raw, int outputs, int columns, int tile, const Packed& to) {
    constexpr int CODES = Type::VALUES * Type::BITS * OUTPUTS / 8;
    alignas(64) Block blocks[OUTPUTS];
    const int first = tile * OUTPUTS, count = std::min(OUTPUTS, outputs - first);
    if (count < OUTPUTS) memset(blocks, 0, sizeof blocks);
    for (int column = 0; column < columns; ++column) {
        const size_t place = size_t(tile) * columns + column;
        for (int n = 0; n < count; ++n)
            Type::take(raw + (size_t(first + n) * columns + column) * Type::BYTES, blocks[n]);
        write_codes<Type::BITS>(blocks, Type::VALUES, to.codes + place * CODES);
        spread(blocks, blocks->scale, 1, 2, to.scales + place * 2 * OUTPUTS);
        spread(blocks, blocks->scale_codes, Type::SCALES, 1, to.scale_codes + place * Type::SCALES * OUTPUTS);
        if (Type::HAS_MINS) spread(blocks, blocks->min, 1, 2, to.mins + place * 2 * OUTPUTS);
    }
}

template <class Type> static void pack_as(const uint8_t* raw, int outputs, int inputs, const Packed& to) {
    const int columns = inputs / Type::VALUES;
    const int64_t tiles = (outputs + OUTPUTS - 1) / OUTPUTS, blocks = tiles * OUTPUTS * columns;
    large_pages(to.codes, blocks * Type::VALUES * Type::BITS / 8);
    if (Type::SCALES) large_pages(to.scale_codes, blocks * Type::SCALES);
    pool().run(int(tiles), [&](int tile) { pack_tile<Type>(raw, outputs, columns, tile, to); });
}

// Rows of blocks of a type, by its number in ggml: [outputs][inputs / values] blocks. False for types not known here.
static bool pack(int type, const uint8_t* raw, int outputs, int inputs, const Packed& to) {
    switch (type) {
        case 2: case 20: pack_as<Q4_0>(raw, outputs, inputs, to); return true;  // IQ4_NL's bytes lie as Q4_0's do.
        case 3: pack_as<Q4_1>(raw, outputs, inputs, to); return true;
        case 6: pack_as<Q5_0>(raw, outputs, inputs, to); return true;
        case 7: pack_as<Q5_1>(raw, outputs, inputs, to); return true;
        case 8: pack_as<Q8_0>(raw, outputs, inputs, to); return true;
        case 10: pack_as<Q2_K>(raw, outputs, inputs, to); return true;
        case 11: pack_as<Q3_K>(raw, outputs, inputs, to); return true;
        case 12: pack_as<Q4_K>(raw, outputs, inputs, to); return true;
        case 13: pack_as<Q5_K>(raw, outputs, inputs, to); return true;
        case 14: pack_as<Q6_K>(raw, outputs, inputs, to); return true;
        case 23: pack_as<IQ4_XS>(raw, outputs, inputs, to); return true;
        default: return false;
    }
}

}  // namespace gguf
