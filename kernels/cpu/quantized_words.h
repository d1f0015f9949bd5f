// Many rows of x times matrices of integer codes: the codes become words of 16 bits, a panel of two tiles at a time.
//
// Whole numbers and their order are those of the way of few rows (quantized.h), so that results are, to the last bit.
#pragma once

#include "quantized.h"
#include "words.h"

namespace quantized {

#if defined(__AVX512VNNI__)

constexpr int FEW_FOR_PANELS = 32;  // So few rows of x don't make up for the codes' conversion.
constexpr int DEEP = 2048;          // Stored rows are taken about so many at a time: a panel stays in a core's cache.

// Stored rows row .. row + count of one group, whose inputs share a scale.
struct Segment { int group, row, count; };

// Groups first .. last of a matrix, which begin at a tile's byte `start`.
struct Chunk {
    int first, last;
    size_t start;
    std::vector<Segment> segments;

    int row(const Matrix& m) const { return m.group_starts[first]; }
    int depth(const Matrix& m) const { return m.group_starts[last] - row(m); }
};

INLINE void next_chunk(const Matrix& m, Chunk& chunk) {
    for (int g = chunk.first; g < chunk.last; ++g)
        chunk.start += size_t(m.group_starts[g + 1] - m.group_starts[g]) * m.group_bits[g] * OUTPUTS / 8;
    chunk.first = chunk.last;
    chunk.segments.clear();
    for (; chunk.last < m.groups && chunk.depth(m) < DEEP; ++chunk.last)
        for (int row = m.group_starts[chunk.last], end = m.group_starts[chunk.last + 1]; row < end; row += SHARED)
            chunk.segments.push_back({chunk.last, row, std::min(SHARED, end - row)});
}

// A chunk's inputs as words [rows][stride], and shares [rows][segments].
struct FixedRows {
    int16_t* words;
    Share* shares;
    size_t stride;  // No power of two, which would share cache sets
    int segments;
};

// Two tiles of a chunk: codes less their zeros in pairs [WIDE][depth / 2][LANES]; scales and mins [groups][WIDE].
struct Panel {
    Ints* pairs;
    Scales* scales;
};

static void pack_tile(const Matrix& m, const Chunk& chunk, int tile, Ints* pairs, Scales* scales) {
    const Book book(m.codebook);
    const uint8_t* codes = m.codes + tile * m.tile_bytes + chunk.start;
    for_runs(m, chunk.first, chunk.last, [&](auto bits, auto coding, int first, int last) __attribute__((always_inline)) {
        constexpr int BITS = bits.value;
        constexpr Coding CODING = Coding(coding.value);
        for (int g = first; g < last; ++g, scales += WIDE) {
            *scales = scales_of(m, tile, g);
            const Ints zero = zero_of<BITS, CODING>(m, tile, g).part[0], zeros = zero | zero << 16;
            for (int left = m.group_starts[g + 1] - m.group_starts[g]; left > 0; left -= STEP<BITS, CODING>)
                read_step<BITS, CODING>(book, codes, g % 2, [&](int, const Line& four) __attribute__((always_inline)) {
                    const Words of = four.part[0];
                    const Words lower = (of & 0xff) | (of & 0xff00) << 8, upper = (of >> 16 & 0xff) | (of >> 8 & 0xff0000);
                    *pairs++ = (Ints)_mm512_sub_epi16((__m512i)lower, (__m512i)zeros);
                    *pairs++ = (Ints)_mm512_sub_epi16((__m512i)upper, (__m512i)zeros);
                });
        }
    });
}

static void pack_row(const Matrix& m, const Chunk& chunk, const float* x, int16_t* words, Share* shares) {
    alignas(64) float numbers[SHARED + LANES];
    alignas(64) int16_t whole[SHARED + LANES];
    for (const Segment& s : chunk.segments) {
        gather(m, x, s.row, s.count, numbers);
        *shares++ = to_whole(numbers, s.count, [&](int i, Ints some) __attribute__((always_inline)) {
            const __m256i narrow = _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)some);
            memcpy(whole + i, &narrow, sizeof narrow);
        });
        words = std::copy_n(whole, s.count, words);
    }
}

// TALL rows of x from `first` on times a panel, added to what `out` holds, columns `width` apart, but for the first chunk.
INLINE void multiply_panel(const Matrix& m, const Chunk& chunk, const FixedRows& x, const Panel& panel, int first,
                           int rows, const float* bias, float* out, size_t width, int columns) {
    const int row = chunk.row(m), depth = chunk.depth(m);
    const bool is_begin = chunk.first == 0, is_end = chunk.last == m.groups;
    Floats totals[TALL][WIDE] = {};
    const auto mask = [&](int j) { return __mmask16((1u << std::clamp(columns - j * LANES, 0, LANES)) - 1); };
    if (!is_begin)
        for (int i = 0; i < rows; ++i)
            for (int j = 0; j < WIDE; ++j)
                totals[i][j] = (Floats)_mm512_maskz_loadu_ps(mask(j), out + i * width + j * LANES);
    const int32_t* const words = (const int32_t*)(x.words + first * x.stride);
    const Share* share = x.shares + size_t(first) * x.segments;
    for (const Segment& s : chunk.segments) {
        const int pair = (s.row - row) / 2;
        const int32_t* const left = (const int32_t*)(panel.pairs + pair);
        Ints acc[TALL][WIDE] = {};
        word_products<TALL>(acc, words + pair, x.stride / 2, 1, left, left + depth / 2 * LANES, s.count / 2);
        const Scales* const of = panel.scales + (s.group - chunk.first) * WIDE;
#pragma GCC unroll 2
        for (int j = 0; j < WIDE; ++j)
#pragma GCC unroll 16
            for (int i = 0; i < TALL; ++i) {
                const Share& mine = share[i * x.segments];
                totals[i][j] += __builtin_convertvector(acc[i][j], Floats) * (of[j].scale.part[0] * mine.scale);
                if (m.mins) totals[i][j] += of[j].min.part[0] * mine.total;
            }
        ++share;
    }
    for (int i = 0; i < rows; ++i, out += width)
        for (int j = 0; j < WIDE; ++j) {
            Floats total = totals[i][j];
            if (is_end && bias) total += (Floats)_mm512_maskz_loadu_ps(mask(j), bias + j * LANES);
            _mm512_mask_storeu_ps(out + j * LANES, mask(j), (__m512)total);
        }
}

// One matrix; bias and rows of `out` begin with its own outputs, and rows are `width` apart.
static void multiply_many(const Matrix& m, const float* x, int rows, const float* bias, float* out, size_t width) {
    static thread_local Scratch of_caller, of_thread;
    const int tall_rows = (rows + TALL - 1) / TALL * TALL, tiles = (m.outputs + OUTPUTS - 1) / OUTPUTS;
    Chunk chunk{};
    for (next_chunk(m, chunk); chunk.first < m.groups; next_chunk(m, chunk)) {
        const int depth = chunk.depth(m), segments = int(chunk.segments.size());
        const size_t stride = size_t(depth) + 32;
        float* const memory = of_caller.floats(tall_rows * (stride / 2 + sizeof(Share) / 4 * segments) + 32);
        const FixedRows fixed{(int16_t*)memory, (Share*)(memory + tall_rows * stride / 2), stride, segments};
        pool().run(tall_rows, [&](int t) {
            int16_t* const words = fixed.words + t * stride;
            Share* const shares = fixed.shares + size_t(t) * segments;
            if (t < rows) return pack_row(m, chunk, x + size_t(t) * m.inputs, words, shares);
            std::fill_n(words, depth, int16_t(0));
            std::fill_n(shares, segments, Share{});
        });
        pool().run((tiles + WIDE - 1) / WIDE, [&](int task) {
            const int groups = chunk.last - chunk.first, n = task * PANEL;
            float* const place = of_thread.floats(size_t(depth / 2) * PANEL + groups * WIDE * sizeof(Scales) / 4 + 16);
            const Panel panel{(Ints*)place, (Scales*)(place + size_t(depth / 2) * PANEL)};
            for (int j = 0; j < WIDE; ++j)  // The last tile is repeated, and not stored.
                pack_tile(m, chunk, std::min(task * WIDE + j, tiles - 1), panel.pairs + j * (depth / 2), panel.scales + j);
            for (int first = 0; first < rows; first += TALL)
                multiply_panel(m, chunk, fixed, panel, first, std::min(TALL, rows - first), bias ? bias + n : nullptr,
                               out + first * width + n, width, m.outputs - n);
        });
    }
}

#endif

void linear(const Matrix* const* matrices, int count, const float* x, int rows, const float* bias, float* out) {
    int width = 0;
    for (int i = 0; i < count; ++i) width += matrices[i]->outputs;
    for (int first = 0, some; first < rows; first += some) {
        some = std::min(PASS, rows - first);
        const float* const part = x + size_t(first) * matrices[0]->inputs;
        float* const to = out + size_t(first) * width;
#if defined(__AVX512VNNI__)
        if (some > FEW_FOR_PANELS) {
            for (int i = 0, n = 0; i < count; n += matrices[i++]->outputs)
                multiply_many(*matrices[i], part, some, bias ? bias + n : nullptr, to + n, width);
            continue;
        }
#endif
        multiply(matrices, count, part, some, bias, to);
    }
}

}  // namespace quantized
