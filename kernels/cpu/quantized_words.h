// Many rows of x times matrices of integer codes: the codes become words of 16 bits, a panel of a few tiles at a time, of
// few stored rows, so that a core's first cache holds it while all rows of x pass.
//
// Whole numbers and their order are those of the way of few rows (quantized.h), so that results are, to the last bit.
#pragma once

#include "quantized.h"
#include "transpose.h"
#include "words.h"

namespace quantized {

#if defined(__AVX512VNNI__)

constexpr int FEW_FOR_PANELS = 15;  // So few rows of x don't make up for the codes' conversion.
constexpr int PANEL_TILES = 3, PANEL_ROWS = 8;  // A block of sums, in registers: as many tiles, and rows of x.
constexpr int PIECE = UNIT_ROWS;    // Stored rows of a panel, where a scale doesn't need more.
constexpr int LEAST_DEEP = 2048;    // Stored rows that are taken at a time; more of few rows of x.
constexpr int KEPT_WORDS = 2 << 20; // Of x as many words stay in the processor's last cache.

// Segments first .. last of a chunk: `pairs` of stored rows before them, and as many bytes of a tile's codes.
struct Piece {
    int first, last, pairs, shares;
    size_t start;
};

// Groups first .. last of a matrix, which begin at a tile's byte `start`, cut into pieces.
struct Chunk {
    int first, last, shares;  // Shares of a row of x.
    size_t start, end;
    std::vector<Segment> segments;
    std::vector<Piece> pieces;

    int row(const Matrix& m) const { return m.group_starts[first]; }
    int depth(const Matrix& m) const { return m.group_starts[last] - row(m); }
};

INLINE size_t code_bytes(const Matrix& m, const Segment& s) { return size_t(s.count) * m.group_bits[s.group] * OUTPUTS / 8; }

inline void next_chunk(const Matrix& m, int deep, Chunk& chunk) {
    const int step = m.scale_codes ? UNIT_ROWS / m.group_rows : 1;
    chunk.first = chunk.last, chunk.start = chunk.end, chunk.shares = 0;
    chunk.segments.clear();
    chunk.pieces.clear();
    while (chunk.last < m.groups && chunk.depth(m) < deep) chunk.last += step;
    int end = 0;  // Of the piece, in rows.
    for_segments(m, chunk.first, chunk.last, [&](const Segment& s) {
        const int row = s.row - chunk.row(m);
        if (chunk.pieces.empty() || row + s.count > end) {
            chunk.pieces.push_back({int(chunk.segments.size()), 0, row / 2, chunk.shares, chunk.end});
            end = row + std::max(PIECE, s.count);
        }
        chunk.segments.push_back(s);
        chunk.pieces.back().last = int(chunk.segments.size());
        chunk.shares += s.count / s.part;
        chunk.end += code_bytes(m, s);
    });
}

// A chunk's inputs for rows of x, sixteen of these side by side: words in pairs [rows / PAGE][depth / 2][PAGE], where of four
// neighbours the first and third are a pair, and the second and fourth; and shares [rows / PAGE][shares][PAGE].
struct FixedRows {
    int32_t* pairs;
    float *sizes, *totals;
    int depth, shares;
};

static void fix_rows(const Matrix& m, const Chunk& chunk, const float* x, int rows, int block, const FixedRows& to) {
    typedef int16_t Sixteen __attribute__((vector_size(32)));
    alignas(64) float numbers[UNIT_ROWS + LANES];
    alignas(64) int16_t words[PAGE][UNIT_ROWS + 32];
    const float longest = most_length(m);
    int32_t* pairs = to.pairs + size_t(block) * to.depth / 2 * PAGE;
    float *sizes = to.sizes + size_t(block) * to.shares * PAGE, *totals = to.totals + size_t(block) * to.shares * PAGE;
    const int count = std::min(PAGE, rows - block * PAGE);
    if (count < PAGE) memset(words, 0, sizeof words);
    for (const Segment& s : chunk.segments) {
        const int parts = s.count / s.part;
        std::fill_n(sizes, parts * PAGE, 0.0f);
        std::fill_n(totals, parts * PAGE, 0.0f);
        for (int t = 0; t < count; ++t) {
            gather(m, x + size_t(block * PAGE + t) * m.inputs, s, numbers);
            const Unit unit = unit_of(numbers, s.count, longest);
            sizes[t] = unit.size;
            for (int p = 0; p < parts; ++p) {
                int16_t* const own = words[t] + p * s.part;
                const Share share = to_whole(numbers + p * s.part, s.part, unit, [&](int i, Ints whole) __attribute__((always_inline)) {
                    const Sixteen narrow = (Sixteen)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)whole);
                    const Sixteen paired = __builtin_shuffle(
                        narrow, Sixteen{0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15});
                    memcpy(own + i, &paired, sizeof paired);
                });
                totals[p * PAGE + t] = share.total;
            }
        }
        transpose((const uint8_t*)words, sizeof words[0], 2 * s.count, (uint32_t*)pairs);
        pairs += s.count / 2 * PAGE;
        sizes += parts * PAGE, totals += parts * PAGE;
    }
}

// Some tiles of a piece: codes less their zeros, perhaps times the codes of their scales, in pairs [pairs][PANEL_TILES]; by
// segment their scales, and by share their mins.
struct Panel {
    Ints* pairs;
    Floats *scales, *mins;
};

// A group's codes: each `zeros` less, and then `times` as much where FACTOR says so.
template <int BITS, Coding CODING, bool HAS_ZERO, bool FACTOR>
INLINE void pack_group(const Book& book, const uint8_t*& codes, int g, int rows, Ints zeros, Ints times, Ints*& pairs) {
    for (; rows > 0; rows -= STEP<BITS, CODING>)
        read_step<BITS, CODING>(book, codes, g % 2, [&](int, const Line& four) __attribute__((always_inline)) {
            const __m512i of = (__m512i)four.part[0];
            __m512i words[2] = {(__m512i)(four.part[0] & 0x00ff00ff), _mm512_maskz_srli_epi16(~0u, of, 8)};
#pragma GCC unroll 2
            for (__m512i& word : words) {
                if (HAS_ZERO) word = _mm512_sub_epi16(word, (__m512i)zeros);
                if (FACTOR) word = _mm512_maskz_mullo_epi16(~0u, word, (__m512i)times);
                *pairs = (Ints)word;
                pairs += PANEL_TILES;
            }
        });
}

INLINE Ints twice(Ints words) { return (words & 0xffff) | words << 16; }

static void pack_tile(const Matrix& m, const Chunk& chunk, const Piece& piece, int tile, Panel panel) {
    const Book book(m.codebook);
    const uint8_t* codes = m.codes + tile * m.tile_bytes + piece.start;
    const bool has_form = m.scale_codes && with_form(m, [&](auto form) __attribute__((always_inline)) {
        typedef decltype(form) F;
        if constexpr (F::HAS_CODES)
            for (int i = piece.first; i < piece.last; ++i) {
                UnitScales<F> of;
                const int first = chunk.segments[i].group;
                read_scales<F>(m, size_t(tile) * (m.groups / F::GROUPS) + first / F::GROUPS, of);
                *panel.scales = of.scale.part[0];
                panel.scales += PANEL_TILES;
                for (int g = 0; g < F::GROUPS; ++g) {
                    pack_group<F::BITS, F::CODING, (F::ZERO > 0), true>(
                        book, codes, g, F::ROWS, all(F::ZERO << 16 | F::ZERO), twice(of.codes[g].part[0]), panel.pairs);
                    if (F::HAS_MINS) panel.mins[g * PANEL_TILES] = of.mins[g].part[0];
                }
                panel.mins += F::GROUPS * PANEL_TILES;
            }
    });
    for (int i = piece.first; !has_form && i < piece.last; ++i) {
        const Segment& s = chunk.segments[i];
        const Scales of = scales_of(m, tile, s.group);
        *panel.scales = of.scale.part[0], *panel.mins = of.min.part[0];
        panel.scales += PANEL_TILES, panel.mins += PANEL_TILES;
        for_runs(m, s.group, s.group + 1, [&](auto bits, auto coding, int g, int) __attribute__((always_inline)) {
            constexpr int BITS = bits.value;
            constexpr Coding CODING = Coding(coding.value);
            const Ints zeros = twice(zero_of<BITS, CODING>(m, tile, g).part[0]);
            pack_group<BITS, CODING, true, false>(book, codes, g, s.count, zeros, zeros, panel.pairs);
        });
    }
}

// sums[i][j] += sum over pairs k of x[k][i] * panel[k][j].
INLINE void pair_products(Ints (&sums)[PANEL_ROWS][PANEL_TILES], const int32_t* x, const Ints* panel, int pairs) {
#pragma GCC unroll 4
    for (int k = 0; k < pairs; ++k, x += PAGE, panel += PANEL_TILES) {
        const Ints a = panel[0], b = panel[1], c = panel[2];
#pragma GCC unroll 8
        for (int i = 0; i < PANEL_ROWS; ++i) {
            const Ints number = (Ints)held((Floats)all(x[i]));
            sums[i][0] = plus_pairs(sums[i][0], number, a);
            sums[i][1] = plus_pairs(sums[i][1], number, b);
            sums[i][2] = plus_pairs(sums[i][2], number, c);
        }
    }
}

// Eight rows of x from row `first` on times a panel of a piece, added to totals [PANEL_ROWS][PANEL_TILES].
INLINE void multiply_piece(const Matrix& m, const Chunk& chunk, const Piece& piece, const FixedRows& x, const Panel& panel,
                           int first, Floats* totals) {
    const size_t block = first / PAGE, lane = first % PAGE;
    const int32_t* pairs = x.pairs + (block * x.depth / 2 + piece.pairs) * PAGE + lane;
    const size_t place = (block * x.shares + piece.shares) * PAGE + lane;
    const float *size = x.sizes + place, *total = x.totals + place;
    const Ints* codes = panel.pairs;
    const Floats *scales = panel.scales, *mins = panel.mins;
    for (int s = piece.first; s < piece.last; ++s, scales += PANEL_TILES) {
        const int count = chunk.segments[s].count / 2, shares = chunk.segments[s].count / chunk.segments[s].part;
        Ints sums[PANEL_ROWS][PANEL_TILES] = {};
        pair_products(sums, pairs, codes, count);
        Floats now[PANEL_ROWS][PANEL_TILES];
#pragma GCC unroll 8
        for (int i = 0; i < PANEL_ROWS; ++i)
#pragma GCC unroll 3
            for (int j = 0; j < PANEL_TILES; ++j)
                now[i][j] = totals[i * PANEL_TILES + j] + __builtin_convertvector(sums[i][j], Floats) * (scales[j] * size[i]);
        for (int p = 0; m.mins && p < shares; ++p, mins += PANEL_TILES)
#pragma GCC unroll 8
            for (int i = 0; i < PANEL_ROWS; ++i)
#pragma GCC unroll 3
                for (int j = 0; j < PANEL_TILES; ++j) now[i][j] += mins[j] * total[p * PAGE + i];
#pragma GCC unroll 8
        for (int i = 0; i < PANEL_ROWS; ++i)
#pragma GCC unroll 3
            for (int j = 0; j < PANEL_TILES; ++j) totals[i * PANEL_TILES + j] = now[i][j];
        pairs += count * PAGE, codes += count * PANEL_TILES;
        size += shares * PAGE, total += shares * PAGE;
    }
}

// Asks for a share of what the tiles from `tile` on have in a piece.
INLINE void fetch_piece(const Matrix& m, const Piece& piece, size_t end, int tile, int tiles, int share, int shares) {
    const size_t lines = (end - piece.start + LINE - 1) / LINE, first = lines * share / shares, last = lines * (share + 1) / shares;
    for (int j = 0; j < PANEL_TILES && tile + j < tiles; ++j)
        for (size_t i = first; i < last; ++i)
            __builtin_prefetch(m.codes + (tile + j) * m.tile_bytes + piece.start + i * LINE, 0, 2);
}

// Rows of totals [PANEL_ROWS][PANEL_TILES] from and to the output, rows of which are `width` apart; `count` outputs are there.
template <class Use> INLINE void for_outputs(Floats* totals, float* out, size_t width, int rows, int count, Use&& use) {
    for (int first = 0; first < rows; ++first, out += width, totals += PANEL_TILES)
        for (int j = 0; j < PANEL_TILES; ++j)
            use(totals[j], out + j * LANES, __mmask16((1u << std::clamp(count - j * LANES, 0, LANES)) - 1), j);
}

// Tiles tile .. tile + PANEL_TILES of a chunk times all rows, added to what `out` holds but for the first chunk.
static void multiply_panel(const Matrix& m, const Chunk& chunk, const FixedRows& x, int tile, int rows, const float* bias,
                           float* out, size_t width) {
    static thread_local Scratch memory;
    const int tiles = (m.outputs + OUTPUTS - 1) / OUTPUTS, blocks = (rows + PANEL_ROWS - 1) / PANEL_ROWS;
    const int count = m.outputs - tile * OUTPUTS, most = std::max(PIECE, SHARED);
    Floats* at = (Floats*)memory.floats(size_t(LANES) * PANEL_TILES * (blocks * PANEL_ROWS + most / 2 + most / 8 + most / 8));
    const auto take = [&](size_t vectors) { return at += vectors * PANEL_TILES, at - vectors * PANEL_TILES; };
    Floats* const totals = take(blocks * PANEL_ROWS);
    const Panel panel{(Ints*)take(most / 2), take(most / 8), take(most / 8)};
    if (chunk.first == 0) std::fill_n((float*)totals, size_t(blocks) * PANEL_ROWS * PANEL_TILES * LANES, 0.0f);
    else
        for_outputs(totals, out, width, rows, count, [](Floats& total, const float* from, __mmask16 mask, int) {
            total = (Floats)_mm512_maskz_loadu_ps(mask, from);
        });
    for (size_t p = 0; p < chunk.pieces.size(); ++p) {
        const Piece& piece = chunk.pieces[p];
        for (int j = 0; j < PANEL_TILES; ++j)  // The last tile is repeated, and not stored.
            pack_tile(m, chunk, piece, std::min(tile + j, tiles - 1), {panel.pairs + j, panel.scales + j, panel.mins + j});
        for (int block = 0; block < blocks; ++block) {
            if (p + 1 < chunk.pieces.size())
                fetch_piece(m, chunk.pieces[p + 1], p + 2 < chunk.pieces.size() ? chunk.pieces[p + 2].start : chunk.end,
                            tile, tiles, block, blocks);
            multiply_piece(m, chunk, piece, x, panel, block * PANEL_ROWS, totals + block * PANEL_ROWS * PANEL_TILES);
        }
    }
    const float* const more = chunk.last == m.groups ? bias : nullptr;
    for_outputs(totals, out, width, rows, count, [&](Floats total, float* to, __mmask16 mask, int j) {
        if (more) total += (Floats)_mm512_maskz_loadu_ps(mask, more + j * LANES);
        _mm512_mask_storeu_ps(to, mask, (__m512)total);
    });
}

// One matrix; bias and rows of `out` begin with its own outputs, and rows are `width` apart.
static void multiply_many(const Matrix& m, const float* x, int rows, const float* bias, float* out, size_t width) {
    static thread_local Scratch memory;
    const int blocks = (rows + PAGE - 1) / PAGE, tiles = (m.outputs + OUTPUTS - 1) / OUTPUTS;
    const int deep = std::max(LEAST_DEEP, KEPT_WORDS / rows);
    Chunk chunk{};
    for (next_chunk(m, deep, chunk); chunk.first < m.groups; next_chunk(m, deep, chunk)) {
        const int depth = chunk.depth(m);
        const size_t pairs = size_t(blocks) * PAGE * (depth / 2), shares = size_t(blocks) * PAGE * chunk.shares;
        float* const place = memory.floats(pairs + 2 * shares);
        const FixedRows fixed{(int32_t*)place, place + pairs, place + pairs + shares, depth, chunk.shares};
        pool().run(blocks, [&](int block) { fix_rows(m, chunk, x, rows, block, fixed); });
        pool().run((tiles + PANEL_TILES - 1) / PANEL_TILES, [&](int task) {
            const int n = task * PANEL_TILES * OUTPUTS;
            multiply_panel(m, chunk, fixed, task * PANEL_TILES, rows, bias ? bias + n : nullptr, out + n, width);
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
