// Many rows of x times the transpose of a bfloat16 weight, both as words of 16 bits: 64 neighbours share a unit.
//
// A weight has eight bits of its own and is nearly always exact; x keeps some 13, five more than bfloat16 would.
#pragma once

#include "dots.h"
#include "transpose.h"
#include "words.h"

#if defined(__AVX512VNNI__)

constexpr int SHARING = 64;            // So many neighbours share a unit.
constexpr int FEW_FOR_WORDS = 64;      // So few rows of x don't make up for the weights' conversion.
constexpr int WORD_DEPTH = 2048;       // K is taken so many at a time: a panel of weights stays in a core's cache.
constexpr int WORD_ROWS = 512;         // Rows of x are taken so many at a time.

// x as words [rows][stride] with units [rows][groups].
struct WordRows {
    int16_t* words;
    float* units;
    size_t stride;  // Words between rows: no power of two, which would share cache sets
    int groups;
};

// Outputs n .. n + PANEL of the weight, inputs k0 .. k0 + depth: words [groups][WIDE][pairs][LANES], units [groups][PANEL].
static void pack_weights(const Linear& l, int n, int k0, int depth, int32_t* panel, float* units) {
    alignas(64) int16_t rows[PAGE][SHARING];
    alignas(64) float numbers[SHARING];
    for (int g = 0; g * SHARING < depth; ++g, units += PANEL)
        for (int j = 0; j < WIDE; ++j, panel += SHARING / 2 * LANES) {
            for (int i = 0; i < LANES; ++i) {
                const int output = std::min(n + j * LANES + i, l.outputs - 1);  // The last is repeated, and not stored.
                const bf16* const from = (const bf16*)l.weight + size_t(output) * l.inputs + k0 + g * SHARING;
                const int count = std::min(SHARING, depth - g * SHARING);
                if (count == SHARING) {
                    for (int k = 0; k < SHARING; k += LANES) store(numbers + k, load(from + k));
                } else {
                    for (int k = 0; k < SHARING; ++k) numbers[k] = k < count ? to_float(from[k]) : 0.0f;
                }
                units[j * LANES + i] = to_words<POWER_OF_TWO>(numbers, SHARING, SHORTER, rows[i]);
            }
            transpose((const uint8_t*)rows, sizeof rows[0], sizeof rows[0], (uint32_t*)panel);
        }
}

INLINE void pack_row(const float* x, int depth, int16_t* words, float* units) {
    int k = 0;
    for (; k + SHARING <= depth; k += SHARING) *units++ = to_words<ANY>(x + k, SHARING, LONG, words + k);
    if (k == depth) return;
    alignas(64) float rest[SHARING] = {};
    std::copy(x + k, x + depth, rest);
    *units = to_words<ANY>(rest, SHARING, LONG, words + k);
}

// TALL rows from `first` times a panel, into `out`, or added to it where k0 > 0.
INLINE void word_block(const Linear& l, const WordRows& x, const int32_t* panel, const float* panel_units, int first,
                       int n, int k0) {
    constexpr int PAIRS = SHARING / 2;
    const int16_t* words = x.words + first * x.stride;
    const float* units = x.units + size_t(first) * x.groups;
    Floats totals[TALL][WIDE] = {};
    for (int g = 0; g < x.groups; ++g, words += SHARING, panel += WIDE * PAIRS * LANES, panel_units += PANEL) {
        Ints acc[TALL][WIDE] = {};
        word_products<TALL>(acc, (const int32_t*)words, x.stride / 2, 1, panel, panel + PAIRS * LANES, PAIRS);
#pragma GCC unroll 2
        for (int j = 0; j < WIDE; ++j) {
            const Floats unit = load(panel_units + j * LANES);
#pragma GCC unroll 16
            for (int i = 0; i < TALL; ++i)
                totals[i][j] += __builtin_convertvector(acc[i][j], Floats) * unit * units[i * x.groups + g];
        }
    }
    float* out = l.out + size_t(first) * l.outputs + n;
    for (int t = 0; t < std::min(TALL, l.rows - first); ++t, out += l.outputs)
#pragma GCC unroll 2
        for (int j = 0; j < WIDE; ++j) {
            const int columns = std::max(0, std::min(LANES, l.outputs - n - j * LANES));
            const __mmask16 mask = __mmask16((1u << columns) - 1);
            const float* const before = k0 ? out : l.bias ? l.bias + n : nullptr;
            Floats total = totals[t][j];
            if (before) total += (Floats)_mm512_maskz_loadu_ps(mask, before + j * LANES);
            _mm512_mask_storeu_ps(out + j * LANES, mask, (__m512)total);
        }
}

// Inputs k0 .. k0 + depth of all rows, of which there are no more than WORD_ROWS.
static void add_word_products(const Linear& l, int k0, int depth) {
    static thread_local Scratch of_caller, of_thread;
    const int tall_rows = (l.rows + TALL - 1) / TALL * TALL, groups = (depth + SHARING - 1) / SHARING;
    const size_t stride = size_t(groups) * SHARING + 32;
    float* const memory = of_caller.floats(tall_rows * (stride / 2 + groups));
    const WordRows x{(int16_t*)memory, memory + tall_rows * stride / 2, stride, groups};
    pool().run(tall_rows / TALL, [&](int task) {
        for (int t = task * TALL; t < std::min(l.rows, (task + 1) * TALL); ++t)
            pack_row(l.x + size_t(t) * l.inputs + k0, depth, x.words + t * stride, x.units + size_t(t) * groups);
    });
    pool().run((l.outputs + PANEL - 1) / PANEL, [&](int task) {
        float* const units = of_thread.floats(size_t(groups) * PANEL * (1 + SHARING / 2));
        int32_t* const panel = (int32_t*)(units + groups * PANEL);
        pack_weights(l, task * PANEL, k0, depth, panel, units);
        for (int first = 0; first < l.rows; first += TALL) word_block(l, x, panel, units, first, task * PANEL, k0);
    });
}

inline void linear_words(const Linear& l) {
    Linear part = l;
    for (int first = 0; first < l.rows; first += WORD_ROWS) {
        part.rows = std::min(WORD_ROWS, l.rows - first);
        part.x = l.x + size_t(first) * l.inputs;
        part.out = l.out + size_t(first) * l.outputs;
        for (int k0 = 0; k0 < l.inputs; k0 += WORD_DEPTH)
            add_word_products(part, k0, std::min(WORD_DEPTH, l.inputs - k0));
    }
}

#endif
